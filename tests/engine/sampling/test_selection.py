"""Replies whose rows choose the far keys that they read: the same however they are cut, resumed, cached or accompanied.

What they must be comes from the specification of attention, the prompt in one forward and the reply in another.
"""

from __future__ import annotations

import pytest
import torch
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.selection import UNIT, WINDOW, selects_from
from prerope.cache.blocks.documents import DocumentSpan
from prerope.cache.storage import KVStorage, block_bytes
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.selection import check_deployment
from prerope.server.errors import ConfigurationError, InvalidRequest
from prerope.server.models.model import Chunk, Model, build_batch
from torch import Tensor

from tests.device import DEVICE
from tests.engine.test_invariance import distributions
from tests.engine.tiny_models import assert_idle, greedy, prompt_of, request, run, tiny, tiny_engine, tokens_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="rows choose on the CPU alone")

VOCABULARY, BLOCK, TOLERANCE = 64, 16, 1e-4
SELECT = 8 * UNIT
SPEC = RopeSpec(method="dynamic_leaky", select=SELECT)
PROMPT = [token % VOCABULARY for token in prompt_of(WINDOW + 36 * UNIT)]
NUM_NEW = 24


@pytest.fixture(scope="module")
def model() -> Model:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    sketch = tiny(
        "llama", sharpness=3.0, vocab_size=VOCABULARY, max_position_embeddings=256, rope_parameters=parameters
    )
    return Model(sketch)


def engine_for(model: Model, spec: RopeSpec = SPEC, **config: object) -> Engine:
    options = {"max_model_len": 4096, "num_blocks": 600, "max_batched_tokens": 512} | config
    return tiny_engine(model, spec, **options)  # type: ignore[arg-type]


def asked(engine: Engine, name: str = "one", prompt: list[int] = PROMPT, **options: object) -> list[TokenOutput]:
    return run(engine, [request(name, prompt, greedy(NUM_NEW, logprobs=VOCABULARY), **options)])[name]  # type: ignore[arg-type]


def expected(model: Model, tokens: list[int], num_prompt: int, *, select: bool = True) -> Tensor:
    """[new tokens, V] log-probabilities of prompt and output, the output's rows by the specification."""
    storage = KVStorage([layer.shape for layer in model.layers], 200, BLOCK, torch.float32, model.device)
    positions, start = engine_for(model).info.positions, selects_from(SELECT if select else None, num_prompt)
    prompt = Chunk.of(tokens[:num_prompt], 0, range(200), positions, 1)
    output = Chunk.of(
        tokens[num_prompt:], num_prompt, range(200), positions, len(tokens) - num_prompt, selects_from=start
    )
    found = [model.forward(build_batch([prompt], BLOCK, model.device), storage)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "attention", reference_attention)
        found.append(model.forward(build_batch([output], BLOCK, model.device), storage))
    return torch.cat(found)[:-1].log_softmax(-1)


def error(model: Model, outputs: list[TokenOutput], prompt: list[int] = PROMPT, *, select: bool = True) -> float:
    new = tokens_of(outputs)
    assert len(new) == NUM_NEW
    return float((distributions(outputs) - expected(model, prompt + new, len(prompt), select=select)).abs().max())


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_decode(block_size: int, model: Model) -> None:
    engine = engine_for(model, block_size=block_size, prefix_caching=False)
    outputs = asked(engine)
    assert error(model, outputs) <= TOLERANCE
    assert error(model, outputs, select=False) > 100 * TOLERANCE, "nothing was left out that could be seen"


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preemption(prefix_caching: bool, model: Model) -> None:
    """Rows of the reply are computed again in chunks, alone or behind the prompt's, or found again."""
    engine = engine_for(model, prefix_caching=prefix_caching, max_batched_tokens=1100)
    outputs: list[TokenOutput] = []
    engine.add(request("one", PROMPT, greedy(NUM_NEW, logprobs=VOCABULARY)))
    steps = 0
    while engine.has_work():
        steps += 1
        if steps % 7 == 0:
            for sequence in list(engine.scheduler.running.values()):
                engine.scheduler.preempt(sequence)
        engine.check_integrity()
        outputs += [output for _, output in engine.step()]
    assert_idle(engine)
    assert engine.scheduler.num_preemptions > 2
    assert (engine.stats().prefix_hit_tokens > len(PROMPT)) == prefix_caching
    assert error(model, outputs) <= TOLERANCE


def test_neighbours_and_a_warm_cache(model: Model) -> None:
    """The same blocks of a prompt serve replies that choose and replies that do not; neither sees the other."""
    engine = engine_for(model)
    full = engine.resolve_positions(RopeSpec(method="dynamic_leaky"))
    sampling = greedy(NUM_NEW, logprobs=VOCABULARY)
    both = run(engine, [request("chooses", PROMPT, sampling), request("reads all", PROMPT, sampling, full)])
    again = run(engine, [request("chooses", PROMPT, sampling), request("reads all", PROMPT, sampling, full)])
    for outputs in (both, again):
        assert error(model, outputs["chooses"]) <= TOLERANCE
        assert error(model, outputs["reads all"], select=False) <= TOLERANCE
    assert again["chooses"][0].num_cached_tokens == len(PROMPT) - BLOCK


def test_the_next_turn_reads_a_reply_that_chose_as_any_prompt(model: Model) -> None:
    """Its K and V are the reply's own: a prompt with the same tokens does not find them."""
    engine = engine_for(model)
    first = asked(engine)
    turn = PROMPT + tokens_of(first) + PROMPT[:20]
    second = asked(engine, prompt=turn)
    assert second[0].num_cached_tokens == len(PROMPT) // BLOCK * BLOCK
    assert error(model, second, turn) <= TOLERANCE


def test_drafts_choose_as_the_tokens_that_they_become(model: Model) -> None:
    """A prompt that repeats itself is drafted from: the reply is the one without."""
    prompt = (PROMPT[:40] * 60)[: len(PROMPT)]
    drafted, plain = engine_for(model), engine_for(model, speculation="off")
    first, second = asked(drafted, prompt=prompt), asked(plain, prompt=prompt)
    assert tokens_of(first) == tokens_of(second)
    assert error(model, first, prompt) <= TOLERANCE
    assert error(model, second, prompt) <= TOLERANCE


def test_documents_that_are_copied_beneath(model: Model) -> None:
    """Bounds are of what was copied, though the blocks had been others' before: a warm cache does as a cold one."""
    spans = (DocumentSpan(40, 400, 8), DocumentSpan(400, 900, 8))
    warm = engine_for(model, num_blocks=170)
    asked(warm, prompt=PROMPT[::-1])
    cold = engine_for(model, num_blocks=170, prefix_caching=False)
    found = [asked(engine, "docs", PROMPT, documents=spans) for engine in (warm, cold)]
    assert (distributions(found[0]) - distributions(found[1])).abs().max() <= TOLERANCE


def test_blocks_from_a_tier_are_bounded_anew(model: Model) -> None:
    """What is written into blocks forgets their bounds; a reply over them has them made again."""
    engine = engine_for(model)
    asked(engine)
    bounds, blocks = engine.storage.bounds, [5, 6, 7]
    assert bounds is not None
    assert bounds._known[blocks].all()
    engine.storage.write_blocks(blocks, engine.storage.read_blocks(blocks))
    assert not bounds._known[blocks].any()
    assert bounds._known[4]
    assert error(model, asked(engine)) <= TOLERANCE
    assert bounds._known[blocks].all()


def stale(engine: Engine) -> list[int]:
    """Blocks of running sequences whose bounds are taken for known and are not those of the keys that they have."""
    bounds, found = engine.storage.bounds, []
    assert bounds is not None
    for sequence in engine.scheduler.running.values():
        for block in sequence.block_table.head(sequence.num_computed_tokens // engine.config.block_size):
            for keys in engine.storage.keys if bounds._known[block] else ():
                own = keys[block].view(-1, UNIT, *keys.shape[2:])
                kept = bounds.of(keys).view(len(keys), -1, 2, *keys.shape[2:])[block]
                if not torch.equal(kept, torch.stack([own.amin(1), own.amax(1)], 1)):
                    found.append(block)
    return found


@pytest.mark.parametrize(("block_size", "budget", "num_prompt"), [(16, 4096, 1800), (64, 1008, 1990), (64, 4096, 1990)])
def test_bounds_are_of_what_is_stored(block_size: int, budget: int, num_prompt: int, model: Model) -> None:
    """Also where one step reads a prompt again and rows behind it that choose."""
    config = {"block_size": block_size, "num_blocks": 9000 // block_size, "max_batched_tokens": budget}
    engine = engine_for(model, prefix_caching=False, speculation="off", **config)
    engine.add(request("one", [token % VOCABULARY for token in prompt_of(num_prompt)], greedy(60)))
    outputs: list[TokenOutput] = []
    while len(tokens_of(outputs)) < 30:
        outputs += [output for _, output in engine.step()]
    for sequence in list(engine.scheduler.running.values()):
        engine.scheduler.preempt(sequence)
    for keys in engine.storage.keys:  # as if others had used the blocks
        keys.copy_(20 * torch.randn(keys.shape, generator=torch.Generator().manual_seed(0)))
    engine.storage.bounds._known[:] = False  # type: ignore[union-attr]
    while engine.has_work():
        engine.step()
        assert stale(engine) == []


def test_memory_counts_bounds(model: Model) -> None:
    shapes = [layer.shape for layer in model.layers]
    own = sum(tensor[0].nbytes for tensor in (*engine_for(model).storage.keys, *engine_for(model).storage.values))
    bounds = engine_for(model).storage.bounds
    assert bounds is not None
    own += sum(bounds.of(keys)[0].nbytes for keys in bounds._keys)
    assert block_bytes(shapes, BLOCK, torch.float32, bounded=True) == own
    assert engine_for(model, RopeSpec(method="rope")).storage.bounds is None


def test_what_is_refused_by_name(model: Model) -> None:
    for config, device, ranks, named in (
        (EngineConfig(rope=SPEC), "cuda", 1, "DEVICE is cuda"),
        (EngineConfig(rope=SPEC), "cpu", 2, "TENSOR_PARALLEL_SIZE is 2"),
        (EngineConfig(rope=SPEC, block_size=24), "cpu", 1, "KV_BLOCK_SIZE is 24"),
    ):
        with pytest.raises(ConfigurationError, match=rf"ROPE_SELECT is {SELECT}.*{named}"):
            check_deployment(config, device, ranks)
    check_deployment(EngineConfig(rope=SPEC, block_size=8), "cpu", 1)
    with pytest.raises(InvalidRequest, match=r"'rope.select' is 128.*ROPE_SELECT"):
        engine_for(model, RopeSpec(method="rope")).resolve_positions(SPEC)
