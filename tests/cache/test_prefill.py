"""The C prefill kernel: the shapes it packs, and results that depend on nothing but a row and its keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import can_attend
from prerope.cache.cpu.prefill import _Run, _tiles, prefill
from prerope.cache.cpu.tables import NO_POSITIONS
from torch import Tensor

from tests.cache.layouts import METHOD_NAMES, Paged, method, one_group, paged, rotary
from tests.tiers import every

pytestmark = pytest.mark.usefixtures("decode_kernel")

TOLERANCE = 1e-5


def through_kernel(step: Paged, options: AttentionOptions) -> Tensor:
    """[T, Hq, Dv] fp32, single rows too."""
    assert can_attend(step.query, step.keys, step.values)
    parts = [
        prefill(step.query[s.first : s.first + s.count], step.keys, step.values, [s], step.metadata, options)
        for s in step.metadata.sequences
    ]
    return torch.cat(parts)


def difference(step: Paged, options: AttentionOptions) -> float:
    expected = reference_attention(step.query, step.keys, step.values, step.metadata, options)
    return float((through_kernel(step, options) - expected.float()).abs().max())


def cut(step: Paged, at: Sequence[int]) -> Paged:
    """The one sequence of a step in chunks that end at these rows."""
    (whole,) = step.metadata.sequences
    edges = [0, *at, whole.count]
    chunks = [
        SequenceRows(a, b - a, whole.start + a, whole.block_table, whole.positions)
        for a, b in itertools.pairwise(edges)
    ]
    metadata = AttentionMetadata(chunks, step.metadata.slot_mapping, step.metadata.block_size)
    return Paged(step.query, step.keys, step.values, metadata)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dim"), [(2, 2), (20, 6), (64, 64), (64, 32), (80, 80), (96, 72), (112, 112), (128, 128), (256, 64)]
)
def test_head_dims(head_dim: int, dim: int, interleaved: bool) -> None:
    positions = one_group(method("leaky_rerope", rotary(head_dim, dim, interleaved=interleaved), window=32))
    step = paged([(100, 70), (0, 9), (63, 1)], [positions] * 3, head_dim=head_dim)
    assert difference(step, AttentionOptions(head_dim**-0.5, "")) <= TOLERANCE


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (7, 1), (16, 1), (71, 1), (96, 1), (10, 5)])
def test_groups_of_query_heads(heads: tuple[int, int]) -> None:
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(100, 70), (0, 9), (63, 1)], [positions] * 3, heads=heads[0], kv_heads=heads[1])
    assert difference(step, AttentionOptions(0.25, "", sinks=torch.linspace(-2, 2, heads[0]))) <= TOLERANCE


def test_values_narrower_and_wider_than_keys() -> None:
    positions = one_group(method("rope", rotary(16, 16)))
    for value_dim in (8, 40, 112):
        step = paged([(100, 70), (0, 9)], [positions] * 2)
        values = torch.randn(*step.values.shape[:3], value_dim)
        assert difference(Paged(step.query, step.keys, values, step.metadata), AttentionOptions(0.25, "")) <= TOLERANCE


@pytest.mark.parametrize("name", ["rope", "rerope", "dynamic_leaky", "dpe", "dual_chunk", "string", "streaming"])
def test_contexts_of_several_spans(name: str) -> None:
    """More keys than are packed at once, and sinks, soft-cap and sliding window over all of them."""
    positions = one_group(method(name, rotary(64, 64), window=32))
    step = paged([(2500, 130), (1021, 7), (1000, 50)], [positions] * 3, head_dim=64)
    for options in (
        AttentionOptions(0.125, ""),
        AttentionOptions(0.125, "", 1500, 30.0, torch.tensor([-1.0, 0.0, 3.0, 9.0])),
    ):
        assert difference(step, options) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *every(3, ((name, torch.bfloat16) for name in METHOD_NAMES), quick=4),
        # What a kernel does with a type is nothing of a method's: a row of each shape of maps is enough.
        *itertools.product(["rope", "dynamic_leaky", "dual_chunk", "xpos"], [torch.float32, torch.float16]),
    ],
)
def test_a_row_does_not_depend_on_its_chunk(name: str, dtype: torch.dtype) -> None:
    """To the bit, single rows beside others included, so that a reply cannot depend on what else is served."""
    positions = one_group(method(name, rotary(16, 16), window=32, logn=True))
    step = paged([(40, 600)], [positions], dtype=dtype)
    options = AttentionOptions(0.25, "", 500, sinks=torch.ones(4))
    whole = through_kernel(step, options)
    for at in ([1, 2, 90, 353], [24, 216, 472], [599], range(1, 600, 2), [*range(200, 240)]):
        pieces = cut(step, list(at))
        assert torch.equal(through_kernel(pieces, options), whole)
        assert torch.equal(paged_attention(step.query, step.keys, step.values, pieces.metadata, options), whole)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_chunks_of_one_sequence_are_read_together(name: str) -> None:
    """As many places of one sequence are, whose rows between them are there already; keys are turned once for all."""
    positions = one_group(method(name, rotary(16, 16), window=32, logn=True))
    step = paged([(1500, 300)], [positions], dtype=torch.bfloat16)
    options = AttentionOptions(0.25, "", sinks=torch.ones(4))
    whole, (rows,) = through_kernel(step, options), step.metadata.sequences
    places = [(0, 16), (40, 48), (48, 90), (200, 201), (220, 300)]
    picked = torch.cat([torch.arange(*place) for place in places])
    chunks, first = [], 0
    for start, stop in places:
        chunks.append(SequenceRows(first, stop - start, rows.start + start, rows.block_table, positions))
        first += stop - start
    metadata = AttentionMetadata(chunks, step.metadata.slot_mapping, step.metadata.block_size)
    found = paged_attention(step.query[picked], step.keys, step.values, metadata, options)
    assert torch.equal(found, whole[picked])
    assert sum(key[0] == "prefill" for key in metadata.plans if isinstance(key, tuple)) == 2  # before and after one row


@pytest.mark.parametrize(("heads", "dim"), [((9, 3), 64), ((8, 1), 128), ((20, 1), 24)])
@pytest.mark.parametrize("name", ["rope", "dynamic_leaky", "dual_chunk", "xpos"])
def test_a_row_of_a_long_context_is_the_same_alone(name: str, heads: tuple[int, int], dim: int) -> None:
    """Over several spans, with soft-cap and without."""
    positions = one_group(method(name, rotary(dim, dim), window=32))
    step = paged([(2000, 100)], [positions], heads=heads[0], kv_heads=heads[1], head_dim=dim, dtype=torch.bfloat16)
    for options in (AttentionOptions(dim**-0.5, ""), AttentionOptions(dim**-0.5, "", 1500, 20.0)):
        whole = through_kernel(step, options)
        pieces = cut(step, [1, 2, 50, 51])
        assert torch.equal(paged_attention(step.query, step.keys, step.values, pieces.metadata, options), whole)


def test_a_row_does_not_depend_on_the_number_of_threads() -> None:
    positions = one_group(method("dynamic_leaky", rotary(64, 64), window=32))
    step = paged([(1100, 400)], [positions], head_dim=64)
    one = through_kernel(step, AttentionOptions(0.125, ""))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(through_kernel(step, AttentionOptions(0.125, "")), one)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("lengths", [(160,), (512,), (7,), (0, 40), (33, 1, 300), (16,) * 10])
def test_tiles_share_out_all_rows(lengths: Sequence[int], threads: int) -> None:
    """Each row once, no more of a tile than it holds, and those of one run are alike and as many for each thread."""
    edges = [*itertools.accumulate(lengths, initial=0)]
    runs = [_Run(a, b, 0, NO_POSITIONS) for a, b in itertools.pairwise(edges)]
    tiles = _tiles(runs, 32, threads)
    assert [row for _, begin, end in tiles for row in range(begin, end)] == list(range(edges[-1]))
    assert all(runs[run].first <= begin < end <= runs[run].stop for run, begin, end in tiles)
    sizes = [end - begin for _, begin, end in tiles]
    assert max(sizes) <= 32
    if len(runs) == 1:
        assert max(sizes) - min(sizes) <= 1
        assert len(tiles) % threads == 0 or max(sizes) == 1
