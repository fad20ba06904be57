"""Chunk invariance, for every method: however a prompt is cut, and wherever its K and V come from, logits agree.

A 4-layer fp32 Llama trained at 64 reads 600 tokens: far past the trained length, over three row-length buckets. All
methods run side by side in shared batches, each with and without log-n: one of the two where it is quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from prerope.cache.storage import KVStorage
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.reading import PositionMethod
from prerope.rope.registry import METHODS
from prerope.rope.spec import RopeSpec, parse_layers
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import TokenLogprobs, TokenOutput
from prerope.server.models.model import Chunk, Model, build_batch
from torch import Tensor

from tests.device import DEVICE
from tests.engine.tiny_models import assert_idle, greedy, prompt_of, request, run, tiny, tiny_engine, tokens_of
from tests.tiers import every

TRAINED, LENGTH, VOCABULARY = 64, 600, 64
TOLERANCE = 1e-4
BLOCK = 16
PROMPT = [token % VOCABULARY for token in prompt_of(LENGTH)]
WINDOW = 32
GROUP = 13 if DEVICE == "cpu" else 8
"""Variants that share a batch."""

SPECS = {
    f"{name}{'+logn' if logn else ''}": RopeSpec(
        method=name,
        window=WINDOW if "window" in METHODS[name].takes else None,
        groups=(2, 1, 16, 128) if name == "dpe" else None,
        logn=logn,
    )
    for name in METHODS
    if name != "proportional"
    for logn in (False, True)
} | {"auto": RopeSpec(method="auto", window=WINDOW)}
QUICK = {name for place, name in enumerate(SPECS) if place % 4 in (0, 3)} | {"rope+logn", "auto"}
"""Every method, and one after the other with log-n."""
LONG_FACTORS = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": TRAINED,
    "short_factor": [1 + 0.1 * m for m in range(8)],
    "long_factor": [1 + 0.8 * m for m in range(8)],
}


def llama(parameters: dict[str, object] | None = None, length: int = TRAINED) -> Model:
    """Its `auto` is a method of its own in two layers of four."""
    parameters = parameters or {"rope_type": "default", "rope_theta": 10000.0}
    return Model(
        tiny("llama", sharpness=3.0, vocab_size=VOCABULARY, max_position_embeddings=length, rope_parameters=parameters),
        layer_methods=parse_layers("1+3=dynamic_rerope"),
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return llama()


@pytest.fixture(scope="module")
def variants(model: Model) -> dict[str, ModelPositions]:
    """Every method resolved; longrope's factors come from the config of a model that has them."""
    factors = llama(dict(LONG_FACTORS), 1024).rotaries
    return {
        name: resolve_model(spec, factors if spec.method == "longrope" else model.rotaries, 1024)
        for name, spec in SPECS.items()
    }


@pytest.fixture(scope="module", params=["quick", pytest.param("the others", marks=pytest.mark.slow)])
def some(request: pytest.FixtureRequest, variants: dict[str, ModelPositions]) -> dict[str, ModelPositions]:
    """The variants that run side by side in a test."""
    return {name: own for name, own in variants.items() if (name in QUICK) == (request.param == "quick")}


def by_chunks(model: Model, variants: Mapping[str, ModelPositions], chunk: int) -> dict[str, Tensor]:
    """Logits [LENGTH, V] of every variant, on the host; prompts in chunks, several variants to a forward."""
    logits: dict[str, Tensor] = {}
    for group in groups_of(variants):
        logits |= packed_by_chunks(model, group, chunk)
    return logits


def groups_of(variants: Mapping[str, ModelPositions]) -> list[dict[str, ModelPositions]]:
    """As many as share a batch while their tables of cos and sin are all kept."""
    names = list(variants)
    return [{name: variants[name] for name in names[i : i + GROUP]} for i in range(0, len(names), GROUP)]


def packed_by_chunks(model: Model, variants: Mapping[str, ModelPositions], chunk: int) -> dict[str, Tensor]:
    num_blocks = -(-LENGTH // BLOCK)
    storage = KVStorage(
        [layer.shape for layer in model.layers], num_blocks * len(variants), BLOCK, torch.float32, model.device
    )
    tables = torch.randperm(num_blocks * len(variants), generator=torch.Generator().manual_seed(chunk))
    pieces = []
    for start in range(0, LENGTH, chunk):
        tokens = PROMPT[start : start + chunk]
        chunks = [
            Chunk.of(tokens, start, table.tolist(), positions, len(tokens))
            for table, positions in zip(tables.split(num_blocks), variants.values(), strict=True)
        ]
        logits = model.forward(build_batch(chunks, BLOCK, model.device), storage)
        pieces.append(logits.view(len(variants), len(tokens), -1))
    return dict(zip(variants, torch.cat(pieces, dim=1).cpu(), strict=True))


@pytest.fixture(scope="module")
def one_shot(model: Model, variants: dict[str, ModelPositions]) -> Mapping[str, Tensor]:
    """Prefill of each variant alone, when it is asked for first."""

    class OneShot(dict[str, Tensor]):
        def __missing__(self, name: str) -> Tensor:
            self[name] = by_chunks(model, {name: variants[name]}, LENGTH)[name]
            return self[name]

    return OneShot()


@pytest.mark.parametrize("chunk", every(1, [7, 64, 1], quick=2))
def test_chunks(chunk: int, model: Model, some: dict[str, ModelPositions], one_shot: Mapping[str, Tensor]) -> None:
    found = by_chunks(model, some, chunk)
    off = {name: float((logits - one_shot[name]).abs().max()) for name, logits in found.items()}
    assert {name: error for name, error in off.items() if not error <= TOLERANCE} == {}
    assert found.keys() == some.keys()


def test_methods_differ_here_by_far_more_than_the_tolerance(
    some: dict[str, ModelPositions], one_shot: Mapping[str, Tensor]
) -> None:
    """What the comparisons would show if a row were read by another method, or without log-n."""
    names = list(some)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            assert (one_shot[name] - one_shot[other]).abs().max() > 100 * TOLERANCE, f"{name} and {other}"


@pytest.mark.parametrize("name", ["dynamic_linear", "dynamic_ntk", "dynamic_yarn", "dynamic_leaky", "longrope"])
def test_a_length_shared_by_the_chunk_would_be_seen(
    name: str,
    model: Model,
    variants: dict[str, ModelPositions],
    one_shot: Mapping[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As other servers do it: all rows of a forward read with the last row's length."""

    def runs(self: PositionMethod, start: int, stop: int) -> list[tuple[int, int, object]]:
        return [(start, stop, self.reading_of(stop - 1))]

    monkeypatch.setattr(PositionMethod, "runs", runs)
    sticky = by_chunks(model, {name: variants[name]}, 100)[name]  # 64 would never cross an edge between lengths
    assert (sticky - one_shot[name]).abs().max() > 100 * TOLERANCE


# --- through the engine: decode, preemption and the prefix cache ------------------------------------------------------

NUM_PROMPT, NUM_NEW = 290, 40
"""The output crosses no bucket, so a second prompt of 500 tokens is decoded across the edge at 512."""


def engine_for(model: Model, num_blocks: int = 2000, **config: object) -> Engine:
    options = {"max_model_len": 1024, "num_blocks": num_blocks, "max_batched_tokens": 4096} | config
    return tiny_engine(model, RopeSpec(method="rope"), **options)  # type: ignore[arg-type]


def table(scored: TokenLogprobs) -> Tensor:
    """The whole distribution [V] of one token."""
    row = torch.full((VOCABULARY,), math.nan)
    ids, logprobs = zip(*scored.top, strict=True)
    row[list(ids)] = torch.tensor(logprobs)
    assert not row.isnan().any()
    return row


def distributions(outputs: list[TokenOutput]) -> Tensor:
    """[new tokens, V] log-probabilities."""
    return torch.stack([table(scored) for output in outputs for scored in output.logprobs or ()])


def expected(model: Model, positions: ModelPositions, tokens: list[int], num_new: int) -> Tensor:
    """The same rows from one forward of prompt and output together."""
    num_blocks = -(-len(tokens) // BLOCK)
    storage = KVStorage([layer.shape for layer in model.layers], num_blocks, BLOCK, torch.float32, model.device)
    chunk = Chunk.of(tokens, 0, list(range(num_blocks)), positions, num_new + 1)
    return model.forward(build_batch([chunk], BLOCK, model.device), storage)[:-1].log_softmax(-1).cpu()


Requests = dict[str, list[TokenOutput]]


def run_all(
    engine: Engine, variants: Mapping[str, ModelPositions], num_prompt: int, *, preempt_every: int | None = None
) -> Requests:
    """Several variants at once; with `preempt_every`, all running sequences are thrown back each so many steps."""
    outputs: Requests = {name: [] for name in variants}
    for group in groups_of(variants):
        for name, positions in group.items():
            engine.add(request(name, PROMPT[:num_prompt], greedy(NUM_NEW, logprobs=VOCABULARY), positions))
        steps = 0
        while engine.has_work():
            steps += 1
            if preempt_every and steps % preempt_every == 0:
                for sequence in list(engine.scheduler.running.values()):
                    engine.scheduler.preempt(sequence)
                engine.check_integrity()
            for name, output in engine.step():
                outputs[name].append(output)
        assert_idle(engine)
    return outputs


def assert_as_one_shot(
    model: Model, variants: Mapping[str, ModelPositions], outputs: Requests, num_prompt: int
) -> None:
    for name, positions in variants.items():
        new = tokens_of(outputs[name])
        assert len(new) == NUM_NEW
        error = distributions(outputs[name]) - expected(model, positions, PROMPT[:num_prompt] + new, NUM_NEW)
        assert error.abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("num_prompt", [30, 290, 490])
def test_decode(num_prompt: int, model: Model, some: dict[str, ModelPositions]) -> None:
    """Token by token, across the trained length, within a bucket, and across the edge at row 512."""
    engine = engine_for(model, prefix_caching=False)
    assert_as_one_shot(model, some, run_all(engine, some, num_prompt), num_prompt)
    assert engine.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize("prefix_caching", every(2, [True, False]))
def test_forced_preemption(prefix_caching: bool, model: Model, some: dict[str, ModelPositions]) -> None:
    """In mid-prefill and in mid-decode; recomputed whole, or from the blocks that survived."""
    engine = engine_for(model, prefix_caching=prefix_caching, max_batched_tokens=600)
    outputs = run_all(engine, some, 490, preempt_every=4 if prefix_caching else 20)
    assert_as_one_shot(model, some, outputs, 490)
    assert engine.scheduler.num_preemptions >= len(some)
    assert (engine.stats().prefix_hit_tokens > 0) == prefix_caching


def test_a_prefix_cache_hit(model: Model, some: dict[str, ModelPositions]) -> None:
    """All methods fill the cache with the same prompt, then read it again: each finds its own blocks and no other's."""
    engine = engine_for(model)
    first, second = run_all(engine, some, 290), run_all(engine, some, 290)
    for outputs in second.values():
        assert outputs[0].num_cached_tokens == 288
    assert_as_one_shot(model, some, first, 290)
    assert_as_one_shot(model, some, second, 290)


@pytest.mark.parametrize(
    ("first", "name"),
    every(
        4,
        [
            (first, name)
            for name, spec in SPECS.items()
            for first in ("rope", "self")
            if spec.method != "longrope" and (first == "rope" or not spec.logn)
        ],
        quick=8,
    ),
)
def test_blocks_are_shared_with_rope(name: str, first: str, model: Model, variants: dict[str, ModelPositions]) -> None:
    """rope first, then another method on the same prompt, or the other way round: the second takes over exactly the
    rows that are rope's in both, and its logits are those of a run without a cache."""
    pair = {"one": variants["rope"], "two": variants[name]}
    if first == "self":
        pair = {"one": variants[name], "two": variants["rope"]}
    engine = engine_for(model)
    run_all(engine, {"one": pair["one"]}, 200)
    outputs = run_all(engine, {"two": pair["two"]}, 200)
    if SPECS[name].method == "rope":
        shared = TRAINED if SPECS[name].logn else 192
    elif SPECS[name].method in ("rerope", "leaky_rerope", "self_extend", "dpe", "dual_chunk", "string", "streaming"):
        shared = WINDOW  # dual_chunk: its first chunk, of L − w; streaming: w and four sinks, in whole blocks
    elif SPECS[name].method == "jagged_rerope":
        shared = TRAINED - BLOCK  # w and a block of 32, less one
    else:
        shared = TRAINED if SPECS[name].method.startswith("dynamic") else 0
    assert outputs["two"][0].num_cached_tokens == shared
    assert_as_one_shot(model, {"two": pair["two"]}, outputs, 200)


def test_prompt_logprobs_are_the_one_shot_rows(
    model: Model, variants: dict[str, ModelPositions], one_shot: Mapping[str, Tensor]
) -> None:
    """`echo` of a long prompt in chunks, beside others, with a warm cache."""
    engine = engine_for(model, max_batched_tokens=100)
    run_all(engine, {"warm": variants["dynamic_ntk"]}, 290)
    sampling = greedy(0, prompt_logprobs=VOCABULARY)
    chosen = ("dynamic_ntk", "rerope", "dynamic_leaky+logn")
    outputs = run(engine, [request(name, PROMPT, sampling, variants[name]) for name in chosen])
    for name in chosen:
        scored = outputs[name][-1].prompt_logprobs
        assert scored is not None
        assert (len(scored), scored[0]) == (LENGTH, None)
        rows = torch.stack([table(one) for one in scored[1:] if one is not None])
        assert (rows - one_shot[name][:-1].log_softmax(-1)).abs().max() <= TOLERANCE
        assert [one.token_id for one in scored[1:] if one is not None] == PROMPT[1:]
