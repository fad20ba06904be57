"""Rows of replies that choose their far keys: the kernel against the specification, and the specification itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.selection import SINKS, UNIT, WINDOW, far_units, selected_keys, selects_from, units_of
from prerope.cache.attention.types import AttentionOptions, SequenceRows
from prerope.cache.cpu.bounds import KeyBounds
from prerope.cache.cpu.decode import FEW_ROWS
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED
from prerope.rope.spec import RopeSpec
from torch import Tensor

from tests.cache.layouts import Paged, method, paged, rotary

TOKENS = 12 * UNIT
FIRST = selects_from(TOKENS, 0)
OPTIONS = AttentionOptions(0.25, "")


def selecting(name: str, head_dim: int = 16, tokens: int = TOKENS) -> ModelPositions:
    resolved = method(name, rotary(head_dim, head_dim), window=32)
    return ModelPositions({"": resolved}, "", RopeSpec(method=name, select=tokens))


def bounded(step: Paged, *selects: int) -> Paged:
    """Its sequences choose from these rows on, and the bounds of its keys are made."""
    sequences = [replace(one, selects_from=n) for one, n in zip(step.metadata.sequences, selects, strict=True)]
    keys = step.keys
    bounds = KeyBounds([keys], [torch.full(KeyBounds.shape_of(keys.shape), torch.nan, dtype=keys.dtype)])
    bounds.prepare(sequences)
    return replace(step, metadata=replace(step.metadata, sequences=sequences, bounds=bounds))


def both(step: Paged, options: AttentionOptions = OPTIONS) -> tuple[Tensor, Tensor]:
    arguments = (step.query.float(), step.keys, step.values, step.metadata, options)
    return paged_attention(*arguments), reference_attention(*arguments)


def test_which_rows_choose_and_among_what() -> None:
    """By counting keys: the first unit, the window, whole units between."""
    assert selects_from(None, 5) == UNBOUNDED
    assert selects_from(TOKENS, 10 * FIRST) == 10 * FIRST
    for position in (0, WINDOW, WINDOW + UNIT, FIRST - 1, FIRST, FIRST + 1, 9999):
        first, stop = far_units(position)
        far = [
            unit
            for unit in range(SINKS // UNIT, position // UNIT + 1)
            if all(position - key >= WINDOW for key in range(unit * UNIT, (unit + 1) * UNIT))
        ]
        assert list(range(first, stop)) == far
        assert (len(far) > units_of(TOKENS)) == (position >= FIRST)


def test_a_unit_with_the_key_that_a_query_looks_for_is_read() -> None:
    """Each KV head its own, and everything that is not far."""
    key = 0.1 * torch.randn(2500, 2, 16, generator=torch.Generator().manual_seed(0))
    query = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    key[777, 0], key[1200, 1] = 3 * query[1], 3 * query[2]
    read = selected_keys(query, key, 2499, UNIT)
    first, stop = far_units(2499)
    for head, place in ((0, 777), (1, 1200)):
        unit = place // UNIT
        assert read[head, unit * UNIT : (unit + 1) * UNIT].all()
        assert read[head].sum() == len(key) - (stop - first - 1) * UNIT
        assert read[head, : first * UNIT].all()
        assert read[head, stop * UNIT :].all()


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize(
    "name", ["rope", "dynamic_leaky", "rerope", "self_extend", "dpe", "dual_chunk", "streaming", "xpos"]
)
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_the_kernel_finds_what_the_specification_finds(name: str, block_size: int) -> None:
    """Single rows, drafts, a chunk that begins in the prompt, rows that read all, and prompts beside them."""
    own = selecting(name)
    rows = [(2300, 1), (1999, 1), (1700, 5), (1500, FEW_ROWS + 9), (900, 1), (1900, 3), (30, 40)]
    step = paged(rows, [own] * len(rows), block_size=block_size)
    step = bounded(step, FIRST, FIRST, FIRST, 1510, FIRST, UNBOUNDED, UNBOUNDED)
    found, wanted = both(step)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    full = [replace(one, selects_from=UNBOUNDED) for one in step.metadata.sequences]
    _, unselected = both(replace(step, metadata=replace(step.metadata, sequences=full, plans={})))
    if name != "streaming":  # which reads no far keys at all here
        assert (unselected - wanted).abs().amax((1, 2))[:2].min() > 1e-3, "there is nothing to be seen here"


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 80), (8, 128), (2, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_that_models_have(group: int, head_dim: int, dtype: torch.dtype) -> None:
    rows = [(1800, 1), (1650, 2)]
    step = paged(rows, [selecting("rerope", head_dim)] * 2, heads=2 * group, head_dim=head_dim, dtype=dtype)
    found, wanted = both(bounded(step, FIRST, FIRST), AttentionOptions(head_dim**-0.5, ""))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.usefixtures("decode_kernel")
def test_rows_find_together_what_each_finds_alone() -> None:
    """In bits, however many stand side by side: what a row reads is its own."""
    step = bounded(paged([(1500, 40)], [selecting("dynamic_leaky")]), 1510)
    together, _ = both(step)
    (whole,) = step.metadata.sequences
    singles = [
        SequenceRows(n, 1, whole.start + n, whole.block_table.clone(), whole.positions, whole.selects_from)
        for n in range(whole.count)
    ]
    alone = replace(step.metadata, sequences=singles, plans={})
    assert torch.equal(together, paged_attention(step.query, step.keys, step.values, alone, OPTIONS))


@pytest.mark.usefixtures("decode_kernel")
def test_all_far_units_are_all_keys() -> None:
    """Room for all of them reads what plain reading reads, to the bit, and a sliding layer leaves nothing out."""
    step = paged([(2300, 1), (1700, 3)], [selecting("rope", tokens=4096)] * 2)
    plain, _ = both(step)
    assert torch.equal(both(bounded(step, 0, 0))[0], plain)
    sliding = AttentionOptions(0.25, "", sliding_window=1500)
    step = paged([(2300, 1)], [selecting("rope")])
    assert torch.equal(both(bounded(step, 0), sliding)[0], both(step, sliding)[0])


@pytest.mark.usefixtures("decode_kernel")
def test_bounds_follow_what_is_written() -> None:
    """A block that is written again has new bounds, and no other is made twice."""
    step = bounded(paged([(2300, 1)], [selecting("rope")]), FIRST)
    (sequence,), bounds = step.metadata.sequences, step.metadata.bounds
    assert bounds is not None
    block = int(sequence.block_table[20])
    step.keys[block] *= 5
    stale = bounds.of(step.keys)[block].clone()
    bounds.prepare([sequence])
    assert torch.equal(bounds.of(step.keys)[block], stale)
    bounds.forget(torch.tensor([16 * block + 3]))
    bounds.prepare([sequence])
    assert torch.equal(bounds.of(step.keys)[block], torch.stack([step.keys[block].amin(0), step.keys[block].amax(0)]))
    found, wanted = both(step)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
