"""The largest steps that a deployment allows, run before the first request.

They are run twice on a GPU: through a few blocks, to see what memory they take before the cache is sized (`sizing`),
and through the cache, so that a start that succeeds has shown that memory lasts, and no request waits for a kernel to
be compiled. Only memory counts: block tables repeat the blocks there are, and what is computed is nobody's.

What takes memory in a step, and which step takes most of it:

    rows            hidden states and logits, in fp32: a chunk of MAX_BATCHED_TOKENS, scored to its last row
    turned keys     a chunk reads them from scratch, each map's once. A method whose angles depend on the length has a
                    map a run of 256 rows, so it turns the whole context that often; and every sequence has its own
    tables          of angles: a map's grow with the context, and each row of a decode step may have its own maps
    sampled rows    MAX_NUM_SEQS of them, sorted for top-p, while the next step runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from prerope.cache.blocks.states import StateRows
from prerope.cache.cuda.decode import reserve_tables
from prerope.cache.cuda.plan import PlanKey
from prerope.cache.cuda.prefill import num_turned_keys
from prerope.cache.storage import KVStorage
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.reading import ROW_LENGTH_BUCKET, MethodError, PositionMethod
from prerope.rope.spec import METHOD_NAMES, RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.sampling.device import sample_on_device
from prerope.server.engine.sampling.host import PROMPT_LOGPROB_ROWS, logprobs, sample
from prerope.server.engine.sequence import EngineRequest, SamplingParams, Sequence
from prerope.server.models.model import Chunk, Model, build_batch
from torch import Tensor

NUM_ALTERNATIVES = 20
"""The most alternatives beside each scored token."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of one sequence from position `start` on, all of whose logits are wanted."""

    start: int
    count: int
    positions: ModelPositions


def warm_up(model: Model, config: EngineConfig, length: int, storage: KVStorage, report: Callable[[str], None]) -> None:
    """Run the largest steps at contexts of `length` tokens through `storage`, whose blocks are written to.

    Raises torch.OutOfMemoryError. `report` gets a line as each step begins.
    """
    under_way: Tensor | None = None
    allowed = allowed_positions(model, config, length)
    readings = readings_of_a_step(config.max_num_seqs, config.max_batched_tokens)
    for name, rows in worst_steps(config, allowed, length):
        report(f"warming up: {name}")
        under_way, keys = _run(model, config, rows, storage)  # what the step before sampled from is held until then
        reserve_tables(keys, allowed, readings, length, model.device)
    del under_way


def readings_of_a_step(num_seqs: int, num_tokens: int) -> int:
    """Ways in which the rows of one step may be read at most: each sequence in its own, and a chunk in several."""
    return num_seqs + -(-num_tokens // ROW_LENGTH_BUCKET) + 1


def worst_steps(config: EngineConfig, allowed: list[ModelPositions], length: int) -> Iterator[tuple[str, list[Rows]]]:
    """(what it is, its rows) of each, read by the first that is allowed and the hungriest; all end within `length`."""
    budget = min(config.max_batched_tokens, length)
    methods = {id(one): one for one in (allowed[0], *_hungriest(allowed, length - budget, length))}.values()
    for positions in methods:
        method = positions.described["method"]
        # This step comes first: it enlarges tables, which are to be there when the others' memory is measured.
        yield (
            f"one row of each of {config.max_num_seqs} sequences, read by {method}",
            [Rows(_spread(length, number), 1, positions) for number in range(config.max_num_seqs)],
        )
        yield (
            f"the last {budget} rows of a prompt of {length}, read by {method}",
            [Rows(length - budget, budget, positions)],
        )
        count = min(config.max_batched_tokens // config.max_num_seqs, length)
        if config.max_num_seqs > 1 and count > 1:
            yield (
                f"{count} rows of each of {config.max_num_seqs} such prompts, read by {method}",
                [Rows(length - count, count, positions)] * config.max_num_seqs,
            )


def _spread(length: int, number: int) -> int:
    """A late position whose row has maps of its own under a length-dependent method, as long as there are any."""
    return (length - 1 - number * ROW_LENGTH_BUCKET) % length


def allowed_positions(model: Model, config: EngineConfig, length: int) -> list[ModelPositions]:
    """The deployment's method, then those that a request may choose, with their default parameters."""
    names = METHOD_NAMES if config.rope_per_request else ()
    allowed = [resolve_model(config.rope, model.rotaries, length)]
    for name in names:
        try:
            allowed.append(resolve_model(RopeSpec(method=name), model.rotaries, length))
        except MethodError:  # not with this model
            continue
    return allowed


def _hungriest(allowed: list[ModelPositions], start: int, stop: int) -> tuple[ModelPositions, ModelPositions]:
    """The positions that rotate most keys for the rows [start, stop), and those that read keys in most parts."""

    def of_all(measure: Callable[[PositionMethod, int, int], int]) -> ModelPositions:
        return max(allowed, key=lambda one: max(measure(method, start, stop) for method in one.methods.values()))

    return of_all(num_turned_keys), of_all(_num_parts)


def _num_parts(method: PositionMethod, start: int, stop: int) -> int:
    return max(len(reading.parts) for _, _, reading in method.runs(start, stop))


def _run(model: Model, config: EngineConfig, rows: list[Rows], storage: KVStorage) -> tuple[Tensor, list[PlanKey]]:
    """A step as the engine runs it: the logits that it sampled from, and what its attention was planned for."""
    num_blocks = storage.keys[0].shape[0]
    chunks = []
    for number, one in enumerate(rows):
        blocks = np.arange(-(-(one.start + one.count) // config.block_size)) % num_blocks
        ids = [token % model.vocab_size for token in range(one.count)]
        state = StateRows(slot := number % len(storage.states[0]), slot) if storage.states else None
        chunks.append(Chunk.of(ids, one.start, blocks, one.positions, one.count, state=state))
    batch = build_batch(chunks, config.block_size, model.device)
    logits = model.forward(batch, storage)
    scored = min(PROMPT_LOGPROB_ROWS, len(logits))
    logprobs(logits[:scored], [0] * scored, NUM_ALTERNATIVES)
    sampled = logits[: config.max_num_seqs].clone()
    sequences = [_sampling(rows[0].positions, config)] * len(sampled)
    sample_on_device(sampled, sequences)
    raw = sampled.clone()
    sample(sampled[:1], sequences[:1], model.eos_token_ids)
    return raw, [key for key in batch.metadata.plans if isinstance(key, PlanKey)]


def _sampling(positions: ModelPositions, config: EngineConfig) -> Sequence:
    """Nobody's sequence, which asks for the draw that takes most."""
    request = EngineRequest("warm-up", [0], SamplingParams(max_tokens=1, top_p=0.999, seed=0))
    return Sequence.from_request(request, positions, config.block_size, None)
