"""Few rows go through the C kernel, in a step of their own and beside chunks, to the specification's result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import FEW_ROWS, MAX_SPANS, SPAN, plan_step

from tests.cache.layouts import METHOD_NAMES, method, one_group, paged, rotary

OPTIONS = [
    AttentionOptions(0.25, ""),
    AttentionOptions(0.25, "", 7, 20.0, torch.randn(4)),
    AttentionOptions(0.25, None),
]


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_single_rows(name: str, options: AttentionOptions) -> None:
    """Sequences with methods of their own, query scale included."""
    own = [one_group(method(each, rotary(16, 16), logn=True)) for each in (name, "rope", name)]
    step = paged([(0, 1), (200, 1), (130, 1)], own)
    arguments = (step.query, step.keys, step.values, step.metadata, options)
    torch.testing.assert_close(paged_attention(*arguments), reference_attention(*arguments), rtol=0, atol=1e-5)
    plan = plan_step(step.metadata, options)
    assert plan is not None
    assert plan.num_rows == 3


@pytest.mark.usefixtures("decode_kernel")
def test_beside_chunks() -> None:
    positions = one_group(method("rope", rotary(16, 16)))
    step = paged([(5, 1), (20, FEW_ROWS + 1), (9, 3), (0, 1)], [positions] * 4)
    arguments = (step.query, step.keys, step.values, step.metadata, OPTIONS[0])
    for _ in range(2):  # before the plan of the single rows is kept, and after
        torch.testing.assert_close(paged_attention(*arguments), reference_attention(*arguments), rtol=0, atol=1e-5)
        plan = plan_step(step.metadata, OPTIONS[0])
        assert plan is not None
        assert plan.rows == [0, *range(FEW_ROWS + 2, FEW_ROWS + 6)]


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_rows_of_a_sequence_find_together_what_each_finds_alone(name: str, options: AttentionOptions) -> None:
    """Across borders of spans, windows and readings, in bits; 13 of 8 heads a KV head are more than one tile."""
    positions = one_group(method(name, rotary(16, 16), window=32, logn=True))
    for heads in (4, 16):
        if options.sinks is not None:
            options = replace(options, sinks=torch.randn(heads, generator=torch.Generator().manual_seed(0)))
        starts = [(0, 5), (25, 13), (505, 13), (1020, 9), (FEW_ROWS, FEW_ROWS)]
        step = paged(starts, [positions] * len(starts), heads=heads)
        plan = plan_step(step.metadata, options)
        assert plan is not None
        assert plan.num_rows == len(step.query)
        together = paged_attention(step.query, step.keys, step.values, step.metadata, options)
        singles = [
            SequenceRows(one.first + n, 1, one.start + n, one.block_table.clone(), one.positions)
            for one in step.metadata.sequences
            for n in range(one.count)
        ]
        alone = replace(step.metadata, sequences=singles, plans={})
        assert torch.equal(together, paged_attention(step.query, step.keys, step.values, alone, options))


@pytest.mark.usefixtures("decode_kernel")
def test_more_rows_are_a_chunk_of_their_own() -> None:
    """Many, few behind very many keys, and few that stand beside others of their sequence."""
    positions = one_group(method("rope", rotary(16, 16)))
    for rows in ([(20, FEW_ROWS + 1)], [(SPAN * MAX_SPANS // FEW_ROWS, FEW_ROWS)]):
        assert plan_step(paged(rows, [positions]).metadata, OPTIONS[0]) is None
    step = paged([(20, 6)], [positions])
    (whole,) = step.metadata.sequences
    parts = [replace(whole, count=3), replace(whole, first=3, count=3, start=23)]
    assert plan_step(replace(step.metadata, sequences=parts, plans={}), OPTIONS[0]) is None


SHAPES = [(group, 64) for group in (1, 2, 3, 4)] + [(group, 128) for group in (1, 2, 3, 4, 6, 7, 8)]
"""Query heads a KV head, and dims, that the kernel has loops of their own for."""


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize(
    ("group", "head_dim", "rotary_dim"),
    [(group, dim, dim) for group, dim in [*SHAPES, (5, 64), (4, 80), (2, 96), (2, 112), (3, 256)]]
    + [(4, 64, 32), (2, 80, 32), (2, 128, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_that_models_have(group: int, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    allowed = 2e-2 if dtype == torch.bfloat16 else 2e-5  # products of bf16 may be in pairs, of rounded operands
    for name, interleaved in (("rerope", False), ("rope", True)):
        positions = one_group(method(name, rotary(head_dim, rotary_dim, interleaved=interleaved)))
        step = paged([(190, 1), (70, 1)], [positions] * 2, heads=2 * group, head_dim=head_dim, dtype=dtype)
        arguments = (step.query.float(), step.keys, step.values, step.metadata, AttentionOptions(head_dim**-0.5, ""))
        torch.testing.assert_close(paged_attention(*arguments), reference_attention(*arguments), rtol=0, atol=allowed)
