"""The search's candidates: continuous far angles, the product's own method among them, factors on far scores alone.

Proven against positions worked out a key at a time, and against attention by a plain softmax.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.kernels import build as native
from prerope.rope.frequencies import Rotary, plain
from prerope.rope.methods import resolve
from prerope.rope.reading import Part, PositionMethod, plain_reading
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.models.checkpoint import resolve_checkpoint
from torch import Tensor

from bench import quality
from bench.documents import Document
from bench.readings import Readings
from bench.search import Reader, Subject, finalists, in_halves, parse_arguments, read, search, tables
from bench.search_candidates import (
    BASELINE,
    CANDIDATES,
    HIGH,
    LOW,
    Candidate,
    Far,
    everywhere,
    far_method,
    scaled_parts,
)
from bench.search_report import difference
from tests.cache.layouts import Paged, contiguous, paged

L = 256
ROTARY = Rotary(16, 16, 10000.0, "default", train_length=L, max_length=L)


@pytest.fixture(scope="session")
def chunk_kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where there is no C compiler."""
    told = native.prepare(tmp_path_factory.mktemp("kernel"))
    if native.library() is None:
        pytest.skip(told)


def angle_between(part: Part, i: int, j: int) -> Tensor:
    """[D/2] fp64: what the score of row i and key j is turned by."""
    return (part.query.angles(torch.tensor([i])) - part.key.angles(torch.tensor([j])))[0]


def part_of(method: PositionMethod, i: int, j: int) -> Part:
    (part,) = [p for p in method.reading_of(i).parts if bool(p.reads(torch.tensor([i]), torch.tensor([j])))]
    return part


def test_the_baseline_is_the_products_dynamic_leaky() -> None:
    ours, products = far_method(Far(), ROTARY), resolve(RopeSpec(method="dynamic_leaky"), ROTARY)
    for i in (0, 100, L - 1, L, 3 * L, 4 * L - 1):
        assert ours.run_end(i) == products.run_end(i)
        for j in {0, i // 2, max(0, i - 64), max(0, i - 63), i}:
            mine, theirs = (angle_between(part_of(method, i, j), i, j) for method in (ours, products))
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-9)


NEW = [candidate for candidate in CANDIDATES.values() if candidate.served is None]


@pytest.mark.parametrize("candidate", NEW, ids=lambda candidate: candidate.label)
def test_candidates_are_rope_inside_the_trained_length_so_that_its_rows_are_shared(candidate: Candidate) -> None:
    positions, baseline = candidate.positions(ROTARY), BASELINE.positions(ROTARY)
    assert positions.plain_rows == L
    assert positions.plain_digest == baseline.plain_digest
    assert positions.methods[LOW].reading_of(L - 1).digest() == plain_reading(plain(16, 10000.0)).digest()


def test_a_served_method_is_the_products() -> None:
    spec = RopeSpec(method="dual_chunk")
    positions = Candidate("", served=spec).positions(Rotary(16, 16, 10000.0, "default", L, L))
    assert positions.methods[LOW].digest() == positions.methods[HIGH].digest() == resolve(spec, ROTARY).digest()


def test_candidates_differ_in_what_the_prefix_cache_knows_them_by() -> None:
    assert len({candidate.positions(ROTARY).digest for candidate in CANDIDATES.values()}) == len(CANDIDATES)


@pytest.mark.parametrize("candidate", [c for c in NEW if not c.high.recent], ids=lambda c: c.label)
def test_far_angles_meet_the_part_before(candidate: Candidate) -> None:
    """At each edge two parts give one angle; a key of no part, or of two, fails in `part_of`."""
    for far in (candidate.low, candidate.high):
        if far.recent:
            continue
        parts = far_method(far, ROTARY).reading_of(3 * L).parts
        assert [part.d_min for part in parts[1:]] == [part.d_max for part in parts[:-1]]
        for near, beyond in itertools.pairwise(parts):
            i, j = 3 * L, 3 * L - beyond.d_min
            assert torch.allclose(angle_between(near, i, j), angle_between(beyond, i, j), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("far", "distance"),
    [
        (Far(), L),
        (Far(window=1 / 2), L),
        (Far(farthest=3 / 4), 3 * L / 4),
        (Far(middle=(1.0, 1.5)), L),
        (Far(least_leak=16), L / 4 + 7 * L / 4 / 16),
    ],
)
def test_the_farthest_key_of_a_row_length_sits_where_it_says(far: Far, distance: float) -> None:
    end = 2 * L
    farthest = angle_between(part_of(far_method(far, ROTARY), end - 1, 0), end, 0)
    assert torch.allclose(farthest, distance * plain(16, 10000.0), rtol=1e-12)


def test_fast_pairs_keep_their_angle_or_stay_at_the_windows_and_slow_ones_leak() -> None:
    theta, i = plain(16, 10000.0), 2 * L - 1
    turns = L * theta / (2 * math.pi)
    fast, slow = turns >= 32, turns <= 1
    assert fast.any()
    assert slow.any()
    keep, still, leak = (far_method(Far(fast=kind), ROTARY) for kind in ("keep", "still", "leak"))
    kept, frozen, leaked = (angle_between(part_of(method, i, 5), i, 5) for method in (keep, still, leak))
    assert torch.allclose(kept[fast], (i - 5) * theta[fast])
    assert torch.allclose(frozen[fast], L / 4 * theta[fast])
    assert torch.allclose(kept[slow], leaked[slow])
    assert torch.allclose(frozen[slow], leaked[slow])


def by_distance(step: Paged, window: int, factor: float) -> Tensor:
    """[T, H, D] of a step of one sequence: dynamic_leaky with a factor on far scores, by a formula of the distance."""
    query, key, value = contiguous(step, 0)
    heads_each = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads_each, dim=1) for x in (key, value))
    half, start = query.shape[-1] // 2, len(key) - len(query)
    i, j = torch.arange(start, len(key)).double()[:, None], torch.arange(len(key)).double()
    length = torch.where(i < L, L, 256 * (i // 256 + 1))
    leak = ((length - window) / (L - window)).clamp(min=1)
    far = (i - j >= window) & (i >= L)
    position = torch.where(far, window + (i - j - window) / leak, i - j)
    turn = torch.polar(torch.ones(()).double(), position[..., None] * plain(16, 10000.0))
    q, k = (torch.complex(x[..., :half].double(), x[..., half:].double()) for x in (query, key))
    scores = torch.einsum("ihm,jhm,ijm->hij", q, k.conj(), turn).real * torch.where(far, factor, 1.0) / 4.0
    weights = scores.masked_fill(j > i, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value.double()).float()


@pytest.mark.usefixtures("chunk_kernel")
@pytest.mark.parametrize("factor", [1.0, 1.5, 0.5])
def test_a_factor_on_far_scores_is_that_of_a_plain_softmax_and_ends_with_its_context(factor: float) -> None:
    positions = everywhere("", Far(factor=factor)).positions(ROTARY)
    step = paged([(L - 40, 400)], [positions])
    options = AttentionOptions(scale=0.25, group=LOW)

    def attended() -> Tensor:
        step.metadata.plans.clear()
        return paged_attention(step.query, step.keys, step.values, step.metadata, options)

    with scaled_parts():
        assert torch.allclose(attended(), by_distance(step, L // 4, factor), rtol=0, atol=1e-5)
    assert torch.allclose(attended(), by_distance(step, L // 4, 1.0), rtol=0, atol=1e-5)


def test_without_the_kernel_a_factor_is_refused() -> None:
    with (
        patch("prerope.cache.kernels.build.library", return_value=None),
        pytest.raises(RuntimeError, match="could not be built"),
    ):
        scaled_parts().__enter__()


@pytest.mark.usefixtures("chunk_kernel")
def test_halves_of_the_layers_are_read_by_their_own_method(tiny_checkpoint: Path) -> None:
    """Equal halves read as the server does; and each half counts. The prefix cache changes nothing."""
    config = EngineConfig(max_model_len=2 * L, max_num_seqs=2, max_batched_tokens=128)
    engine = Engine.load(resolve_checkpoint(str(tiny_checkpoint), None, lambda _: None), config)
    served = Engine.load(resolve_checkpoint(str(tiny_checkpoint), None, lambda _: None), config)
    in_halves(engine)
    assert [layer.group for layer in engine.model.layers] == [LOW, HIGH]
    token_ids = torch.randint(0, 40000, (2 * L,), generator=torch.Generator().manual_seed(0)).tolist()
    subject = quality.Subject(served, [], [], {"model": "tiny", "dtype": "float32"})
    (expected,) = quality.Reader(subject, 64).losses(token_ids, RopeSpec(), [2 * L], lambda _: None)
    small, large = Far(window=1 / 16), Far(window=1 / 2)
    candidates = [
        BASELINE,
        Candidate("a", small, large),
        Candidate("b", large, small),
        everywhere("c", Far(factor=2.0)),
    ]
    losses = [read(engine, token_ids, candidate, 64) for candidate in candidates]
    assert statistics.fmean(losses[0]) == pytest.approx(expected, abs=1e-5)
    means = [statistics.fmean(found) for found in losses]
    assert len({round(mean, 6) for mean in means}) == len(means)
    assert read(engine, token_ids, candidates[1], 64) == pytest.approx(losses[1], abs=1e-6)


def made_up(losses: dict[str, float], *documents: str) -> tuple[Subject, Any, list[tuple[str, int]]]:
    """Documents of 32 tokens and what reads them: the loss of a label, and half as much more on each document."""
    subject = Subject("m", [Document(name, (n,) * 32) for n, name in enumerate(documents)], (), 32, 16)
    seen: list[tuple[str, int]] = []

    def reads(token_ids: list[int], candidate: Candidate) -> list[float]:
        seen.append((candidate.label, token_ids[0]))
        return [losses[candidate.label] + token_ids[0] / 2 + token / 16 for token in range(16)]

    return subject, reads, seen


def test_the_best_of_the_first_document_read_the_others_and_nothing_is_read_twice(tmp_path: Path) -> None:
    candidates = [BASELINE, *(everywhere(name, Far(factor=n + 2.0)) for n, name in enumerate("abc"))]
    subject, reads, seen = made_up({"dynamic_leaky": 2.0, "a": 2.25, "b": 1.5, "c": 1.75}, "tuned", "second", "third")
    search(Reader(subject, Readings(tmp_path), reads), candidates[1:], 2)
    assert seen[:4] == [("dynamic_leaky", 0), ("a", 0), ("b", 0), ("c", 0)]
    assert seen[4:] == [(name, n) for n in (1, 2) for name in ("dynamic_leaky", "b", "c")]
    search(Reader(subject, Readings(tmp_path)), candidates[1:], 2)  # all is kept
    kept = Reader(subject, Readings(tmp_path))
    assert [candidate.label for candidate in finalists(kept, candidates, 9)] == ["b", "c", "a"]
    tuning, held_out = tables(kept, candidates)
    assert [row[0] for row in tuning.rows()] == ["b", "c", "dynamic_leaky", "a"]
    assert tuning.rows()[0][1:] == ["1.9688", "-0.5000 ± 0.0000"]
    assert held_out.rows() == [
        ["dynamic_leaky", "2.9688", "3.4688", ""],
        ["b", "-0.5000 ± 0.0000", "-0.5000 ± 0.0000", "-0.5000 ± 0.0000"],
        ["c", "-0.2500 ± 0.0000", "-0.2500 ± 0.0000", "-0.2500 ± 0.0000"],
    ]
    assert "A: second; B: third" in held_out.notes()[0]


def test_what_is_not_kept_is_not_made_up(tmp_path: Path) -> None:
    subject, _, _ = made_up({}, "tuned")
    reader = Reader(subject, Readings(tmp_path))
    assert [table.rows() for table in tables(reader, [BASELINE])] == [[], []]
    with pytest.raises(RuntimeError, match="dynamic_leaky has not read document 1"):
        reader.losses(BASELINE, 0)


def test_the_error_of_a_difference_is_that_of_sixteen_stretches() -> None:
    generator = torch.Generator().manual_seed(0)
    stretches = torch.randn(16, generator=generator).double()
    ours = (stretches.repeat_interleave(8) + 1).tolist()
    mean, error = difference(ours, [1.0] * 128)
    assert mean == pytest.approx(stretches.mean().item())
    assert error == pytest.approx(stretches.std().item() / 4)


def test_candidates_are_chosen_by_name_and_models_of_another_embedding_are_refused() -> None:
    assert parse_arguments(["--candidates", "log n; window L/2"]).candidates == [
        CANDIDATES["log n"],
        CANDIDATES["window L/2"],
    ]
    with pytest.raises(SystemExit):
        parse_arguments(["--candidates", "no such"])
    with pytest.raises(ValueError, match="this one has yarn"):
        far_method(Far(), replace(ROTARY, rope_type="yarn"))
