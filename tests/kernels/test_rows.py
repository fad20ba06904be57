"""The check of a kernel's rows, as a card is asked it: planted faults that it must see, at lengths that matter.

Faults of long rows are planted in attention as fp32 torch computes it, faults of short ones in what the kernels are
given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from prerope.cache.attention.reference import reference_attention
from prerope.cache.cuda.attention import cuda_attention
from prerope.cache.cuda.plan import CudaPlan
from prerope.cache.kernels.triton.read import READ_FIELDS
from prerope.rope.scores import method_scores
from torch import Tensor

from bench.gpu.gemv import gemv
from bench.gpu.sdpa import sdpa_prefill, two_parts
from bench.gpu.sweep import Candidate, using
from bench.gpu.sweep import attended as attended_by_kernels
from bench.kernels.cases import Step, low_precision, make_step
from bench.kernels.rows import SHARPNESS, Verdict, judge, poisoned, row_errors
from bench.shared.shapes import SHAPES, AttentionShape
from tests.device import DEVICE
from tests.tiers import every

SHAPE = AttentionShape(2, 2, 64, 10_000.0, 8192)
LONG = 131_000
QUICK = 16_000
"""Keys of a long row: of a context of 128 Ki tokens, and of one whose faults are found in seconds."""
TILE = 64


@cache
def long_row(length: int, method: str, how: str) -> tuple[Step, Tensor, Tensor]:
    """A row behind this many keys in bf16: the step, the truth, and what a plain run gives."""
    torch.manual_seed(0)
    step = make_step(SHAPE, method, [(length, 1)], 16, torch.bfloat16, torch.device(DEVICE))
    step.query.mul_(SHARPNESS[how])
    truth = reference_attention(step.query.float(), step.keys.float(), step.values.float(), step.metadata, step.options)
    return step, truth, low_precision(step)


@cache
def scores_of(length: int, method: str, how: str, reading: str, shift: int = 0) -> Tensor:
    """[Hq, 1, n] of that row in fp32, as another method reads it, its query turned `shift` places further."""
    step = long_row(length, method, how)[0]
    query, keys, _ = step.rows()
    scores = method_scores(query[0].float(), keys[0].float(), SHAPE.method(reading), length + shift)
    return scores * step.options.scale


def attended(step: Step, scores: Tensor, sums: torch.dtype = torch.float32) -> Tensor:
    """In fp32 and rounded once; sums: in what weighted values are added up, a tile at a time."""
    value, weights = step.rows()[2][0].float(), scores.softmax(-1)
    out = torch.zeros(1, 2, 64, dtype=sums, device=value.device)
    each = len(value) if sums == torch.float32 else 16 * TILE
    for first in range(0, len(value), each):
        part = slice(first, first + each)
        out += torch.einsum("hij,jhd->ihd", weights[..., part], value[part]).to(sums)
    return out.to(step.query.dtype)


def keys_of(step: Step) -> int:
    return len(step.rows()[1][0])


def less(scores: Tensor, first: int, count: int = TILE) -> Tensor:
    scores = scores.clone()
    scores[..., first : first + count] = float("-inf")
    return scores


def twice(scores: Tensor, first: int, count: int) -> Tensor:
    scores = scores.clone()
    scores[..., first : first + count] += 0.6931
    return scores


FAULTS: dict[str, Callable[[Step, Callable[..., Tensor]], Tensor]] = {
    "zeros": lambda step, _: torch.zeros_like(step.query),
    "nothing written": lambda step, _: torch.full_like(step.query, float("nan")),
    "one head not written": lambda step, scores: attended(step, scores()).index_fill(
        1, torch.tensor([1], device=DEVICE), float("nan")
    ),
    "a tile in the middle left out": lambda step, scores: attended(step, less(scores(), keys_of(step) // 2)),
    "the last tile left out": lambda step, scores: attended(step, less(scores(), keys_of(step) - 61)),
    "an item merged twice": lambda step, scores: attended(step, twice(scores(), keys_of(step) // 2, 2048)),
    "an item left out": lambda step, scores: attended(step, less(scores(), 0, 2048)),
    "turned for the place after": lambda step, scores: attended(step, scores(shift=1)[..., : keys_of(step)]),
    "not turned": lambda step, _: attended(
        step, torch.einsum("ihd,jhd->hij", step.query.float(), step.rows()[1][0].float()) / 8
    ),
    "far keys turned as near ones": lambda step, scores: attended(step, scores(reading="rope")),
    "the other KV head": lambda step, scores: attended(step, scores()).roll(1, 1),
    "values added up in bf16": lambda step, scores: attended(step, scores(), torch.bfloat16),
}

NOISY = "values added up in bf16"
"""What a shorter row does not show: its sums have too few terms."""


@pytest.mark.parametrize("length", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def test_faults_of_a_long_row_are_seen(length: int) -> None:
    """And what is right passes."""
    found: dict[str, list[bool]] = {}
    for how in SHARPNESS:
        step, truth, plain = long_row(length, "rerope", how)
        scores = partial(scores_of, length, "rerope", how)
        assert judge(attended(step, scores(reading="rerope")), plain, truth).ratio < 1

        def own(scores: Callable[..., Tensor] = scores, reading: str = "rerope", shift: int = 0) -> Tensor:
            return scores(reading=reading, shift=shift)

        for name, fault in FAULTS.items():
            if length < LONG and name == NOISY:
                continue
            found.setdefault(name, []).append(judge(fault(step, own), plain, truth).right)
    assert [name for name, right in found.items() if all(right)] == []


def moved(field: str, by: int) -> Callable[[CudaPlan], CudaPlan]:
    """A field of every reading is off."""

    def changed(plan: CudaPlan) -> CudaPlan:
        reads = plan.reads.clone()
        reads.view(-1, len(READ_FIELDS))[:, READ_FIELDS.index(field)] += by
        return replace(plan, reads=reads)

    return changed


def another_block(plan: CudaPlan) -> CudaPlan:
    blocks = plan.blocks.clone()
    blocks[:, 2] = blocks[:, 1]
    return replace(plan, blocks=blocks)


def other_turns(plan: CudaPlan) -> CudaPlan:
    return replace(plan, turns=plan.turns.roll(1, 0))


PLANTED: dict[str, Callable[[CudaPlan], CudaPlan]] = {
    "the window's edge one off": moved("d_max", -1),
    "the first key left out": moved("first_key", 1),
    "a block read twice": another_block,
    "a row's turns another's": other_turns,
}


def judged(step: Step) -> list[Verdict]:
    """Of the kernels' rows, flat and peaked, with NaN where they write nothing."""
    verdicts = []
    for sharpness in SHARPNESS.values():
        step.metadata.plans.clear()
        own = replace(step, query=step.query * sharpness)
        truth = reference_attention(own.query.float(), own.keys.float(), own.values.float(), own.metadata, own.options)
        with poisoned():
            ours = cuda_attention(own.query, own.keys, own.values, own.metadata, own.options)
        verdicts.append(judge(ours, low_precision(own), truth))
    return verdicts


@pytest.mark.parametrize("method", every(3, ["self_extend", "rope", "rerope", "dynamic_leaky"]))
def test_rows_of_heads_of_128_dims(method: str) -> None:
    """On a card those of an 8B Llama in bf16. The interpreter cuts bf16 off where a card rounds: without one, fp16."""
    torch.manual_seed(3)
    shape, dtype, rows = AttentionShape(2, 1, 128, 10_000.0, 64), torch.float16, [(100, 1), (63, 1), (60, 8)]
    if DEVICE != "cpu":
        shape, dtype, rows = SHAPES["llama-3-8b"], torch.bfloat16, [(9000, 1), (8191, 1), (63, 1), (8100, 200)]
    verdicts = judged(make_step(shape, method, rows, 16, dtype, torch.device(DEVICE)))
    assert all(verdict.right for verdict in verdicts), verdicts


@pytest.mark.parametrize("name", every(1, [None, *PLANTED], quick=2))
def test_faults_in_what_kernels_are_given_are_seen(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded rows and a chunk, window 16, through the kernels; None: as it should be."""
    torch.manual_seed(1)
    shape = AttentionShape(4, 2, 16, 10_000.0, 64)
    step = make_step(shape, "rerope", [(100, 1), (41, 1), (60, 5)], 16, torch.float16, torch.device(DEVICE))
    change = PLANTED.get(name or "", lambda plan: plan)
    for planner in ("plan_rows", "plan_chunks"):
        make: Any = getattr(__import__("prerope.cache.cuda.attention", fromlist=[planner]), planner)
        monkeypatch.setattr(f"prerope.cache.cuda.attention.{planner}", lambda *a, make=make: change(make(*a)))
    verdicts = judged(step)
    assert all(verdict.right for verdict in verdicts) == (name is None), verdicts


def test_candidates_of_the_sweep_give_the_rows_of_the_kernels() -> None:
    """A prompt by torch's SDPA over turned keys, by its two parts, the other order of decode's grid, and GEMV."""
    torch.manual_seed(2)
    shape = AttentionShape(4, 2, 16, 10_000.0, 64)
    for method, rows, candidate in (
        ("rope", [(0, 90)], Candidate("prefill", instead=sdpa_prefill)),
        ("rerope", [(0, 96)], Candidate("prefill", instead=two_parts(16))),
        ("rope", [(80, 1), (33, 1)], Candidate("decode", constants={"HEADS_FIRST": False})),
    ):
        step = make_step(shape, method, rows, 16, torch.float16, torch.device(DEVICE))
        expected = attended_by_kernels(step)
        step.metadata.plans.clear()
        with using(candidate):
            assert float(row_errors(attended_by_kernels(step), expected).max()) < 3e-3
    x, weight = (torch.randn(rows, 1024, dtype=torch.float16, device=DEVICE) for rows in (1, 16))
    torch.testing.assert_close(gemv(x, weight), torch.nn.functional.linear(x, weight), rtol=2**-9, atol=2**-6)
