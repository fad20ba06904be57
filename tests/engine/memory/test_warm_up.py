"""The largest steps: their shapes, that they run, and that nothing a request may choose turns more keys."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any
from unittest.mock import patch

import pytest
import torch
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.cache.cuda.plan import PlanKey
from prerope.cache.cuda.prefill import plan_chunks
from prerope.cache.storage import KVStorage
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.reading import MethodError
from prerope.rope.spec import METHOD_NAMES, RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.memory.warm_up import allowed_positions, warm_up, worst_steps
from prerope.server.engine.sequence import Sequence
from prerope.server.models.model import Batch, Model
from torch import Tensor

from tests.engine.tiny_models import VOCABULARY, tiny

LENGTH, BUDGET, SEQUENCES, BLOCK_SIZE, NUM_BLOCKS = 1500, 64, 4, 16, 3
CONFIG = EngineConfig(
    rope=RopeSpec(method="rope"), max_batched_tokens=BUDGET, max_num_seqs=SEQUENCES, block_size=BLOCK_SIZE
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny("llama", max_position_embeddings=64, num_hidden_layers=2))


class Watched:
    """What the model was given, and what the samplers were asked."""

    def __init__(self, model: Model, config: EngineConfig, length: int) -> None:
        self.batches: list[Batch] = []
        self.lines: list[str] = []
        self.drawn: list[tuple[tuple[int, ...], set[float]]] = []
        self.storage = KVStorage(
            [layer.shape for layer in model.layers], NUM_BLOCKS, config.block_size, torch.float32, model.device
        )
        forward = model.forward

        def watch(batch: Batch, storage: KVStorage) -> Tensor:
            self.batches.append(batch)
            logits = forward(batch, storage)
            assert logits.isfinite().all()
            assert logits.shape == (len(batch.logit_rows), VOCABULARY)
            return logits

        def draw(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
            self.drawn.append((tuple(logits.shape), {one.sampling.top_p for one in sequences}))
            assert len(sequences) == len(logits)
            return logits.argmax(-1)

        with (
            patch.object(model, "forward", watch),
            patch("prerope.server.engine.memory.warm_up.sample_on_device", draw),
        ):
            warm_up(model, config, length, self.storage, self.lines.append)

    def shapes(self) -> list[tuple[list[int], int]]:
        """(rows of each sequence, logits) a step."""
        return [([one.count for one in b.metadata.sequences], len(b.logit_rows)) for b in self.batches]


CHUNK, CHUNKS, DECODE = ([64], 64), ([16] * 4, 64), ([1] * 4, 4)


@pytest.mark.parametrize(("per_request", "times"), [(False, 1), (True, 3)])
def test_the_largest_steps_run(model: Model, per_request: bool, times: int) -> None:
    """The deployment's own method alone; or with it the one that turns most keys, and the one with most parts."""
    config = EngineConfig(
        rope=CONFIG.rope,
        max_batched_tokens=BUDGET,
        max_num_seqs=SEQUENCES,
        block_size=BLOCK_SIZE,
        rope_per_request=per_request,
    )
    seen = Watched(model, config, LENGTH)
    assert seen.shapes() == [DECODE, CHUNK, CHUNKS] * times
    assert len(seen.lines) == len(seen.batches)
    assert seen.drawn == [((SEQUENCES, VOCABULARY), {0.999})] * 3 * times
    for batch in seen.batches:
        assert int(batch.position_ids.max()) == LENGTH - 1
        assert all(one.length <= LENGTH for one in batch.metadata.sequences)
        assert all(int(one.block_table.max()) < NUM_BLOCKS for one in batch.metadata.sequences)
        assert all(len(one.block_table) == -(-one.length // BLOCK_SIZE) for one in batch.metadata.sequences)
    methods = [{one.positions.methods[""].name for one in batch.metadata.sequences} for batch in seen.batches]
    assert methods[:3] == [{"rope"}] * 3
    if per_request:
        assert {"dual_chunk"} in methods
    assert all(tensor.isfinite().all() for tensor in seen.storage.keys + seen.storage.values)
    assert all(bool((tensor != 0).any()) for tensor in seen.storage.keys)


def test_rows_of_a_decode_step_have_maps_of_their_own(model: Model) -> None:
    """Of a length-dependent method, whose tables they take."""
    config = EngineConfig(rope=RopeSpec(method="dynamic_ntk"), max_batched_tokens=BUDGET, max_num_seqs=SEQUENCES)
    decodes = [
        rows
        for _, rows in worst_steps(config, allowed_positions(model, config, 4096), 4096)
        if {one.count for one in rows} == {1}
    ]
    (rows,) = (rows for rows in decodes if rows[0].positions.methods[""].name == "dynamic_ntk")
    assert len(rows) == SEQUENCES
    assert len({one.positions.methods[""].reading_of(one.start) for one in rows}) == SEQUENCES


@pytest.mark.parametrize(
    ("budget", "sequences", "length", "shapes"),
    [
        (64, 64, 1500, [([1] * 64, 64), CHUNK]),
        (64, 1, 1500, [([1], 1), CHUNK]),
        (64, 4, 20, [DECODE, ([20], 20), ([16] * 4, 64)]),
        (1, 1, 1, [([1], 1), ([1], 1)]),
    ],
)
def test_small_budgets_and_short_contexts(
    model: Model, budget: int, sequences: int, length: int, shapes: list[Any]
) -> None:
    config = EngineConfig(rope=CONFIG.rope, max_batched_tokens=budget, max_num_seqs=sequences, rope_per_request=False)
    assert Watched(model, config, length).shapes() == shapes


# --- which method is the hungriest ------------------------------------------------------------------------------------


def scratch_of_plan(positions: ModelPositions, start: int, count: int, group: str, head_dim: int) -> int:
    """Rows of scratch that the GPU path's own plan has."""
    sequence = SequenceRows(0, count, start, torch.arange(-(-(start + count) // 16)), positions)
    metadata = AttentionMetadata([sequence], torch.zeros(count, dtype=torch.int64), 16)
    tiles = {"rows": 32, "tile": 32, "fine_tile": 32}
    key = PlanKey(single=False, **tiles, kv_heads=2, head_dim=head_dim, group=group, sliding_window=None)
    return sum(one.scratch_rows for one in plan_chunks(metadata, key, torch.device("cpu")).passes)


def every_position(model: Model, length: int) -> dict[str, ModelPositions]:
    found = {}
    for name in METHOD_NAMES:
        try:
            found[name] = resolve_model(RopeSpec(method=name), model.rotaries, length)
        except MethodError:
            continue
    return found


@pytest.mark.parametrize("budget", [64, 600, 2000])
def test_no_method_turns_more_keys_or_has_more_parts(model: Model, budget: int) -> None:
    config = EngineConfig(rope=CONFIG.rope, max_batched_tokens=budget, max_num_seqs=1)
    chosen = [rows[0].positions for _, rows in worst_steps(config, allowed_positions(model, config, 2000), 2000)]
    everything = every_position(model, 2000).values()

    def most(positions: Any) -> tuple[int, int]:
        methods = [one.methods[""] for one in positions]
        turned = max(scratch_of_plan(one, 2000 - budget, budget, "", 16) for one in positions)
        return turned, max(len(r.parts) for m in methods for _, _, r in m.runs(2000 - budget, 2000))

    assert most(chosen) == most(everything)


def test_groups_of_a_model_with_several() -> None:
    """Gemma 3's sliding layers have positions of their own."""
    gemma = Model(tiny("gemma3_text"))
    allowed = allowed_positions(gemma, CONFIG, 1024)
    assert all(len(one.methods) == 2 for one in allowed)
    assert Watched(gemma, CONFIG, 300).shapes()[:3] == [DECODE, CHUNK, CHUNKS]
