"""The CPU path, the C kernels and the fallback in tiles of rows, against the reference, over shapes and methods."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cpu.attention import cpu_attention
from prerope.cache.cpu.tables import Readings
from prerope.rope.reading import AngleMap, Part, Reading
from torch import Tensor

from tests.cache.layouts import METHOD_NAMES, WINDOWED, Paged, method, one_group, paged, rotary
from tests.tiers import every

TOLERANCE = 1e-5


def attend(step: Paged, options: AttentionOptions, *, kernel: bool) -> Tensor:
    """The CPU path; `kernel=False` takes the fallback."""
    metadata = replace(step.metadata, plans={})  # what was found of a step is kept there
    arguments = (step.query, step.keys, step.values, metadata, options)
    if kernel:
        return cpu_attention(*arguments)
    with (
        patch("prerope.cache.cpu.attention.can_attend", return_value=False),
        patch("prerope.cache.cpu.attention.FALLBACK_SCORES", 2**16),  # a few rows a tile
    ):
        return cpu_attention(*arguments)


def difference(step: Paged, options: AttentionOptions, *, kernel: bool) -> float:
    """Largest, between the CPU path and the reference."""
    expected = reference_attention(step.query, step.keys, step.values, step.metadata, options)
    actual = attend(step, options, kernel=kernel)
    assert actual.dtype == step.query.dtype
    return float((actual.float() - expected.float()).abs().max())  # NaN fails every comparison


ROWS = st.tuples(st.integers(0, 600), st.one_of(st.just(1), st.integers(1, 40), st.integers(1, 330)))


@given(
    rows=st.lists(ROWS, min_size=1, max_size=3),
    names=st.lists(st.sampled_from(METHOD_NAMES), min_size=3, max_size=3),
    window=st.sampled_from([1, 2, 16, 31, 32, 63]),
    logn=st.booleans(),
    interleaved=st.booleans(),
    dim=st.sampled_from([4, 16, 24]),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1)]),
    block_size=st.sampled_from([1, 8, 16]),
    sliding_window=st.one_of(st.none(), st.integers(1, 80)),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    slopes=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(
    kernel: bool,
    rows: list[tuple[int, int]],
    names: list[str],
    window: int,
    logn: bool,
    interleaved: bool,
    dim: int,
    heads: tuple[int, int],
    block_size: int,
    sliding_window: int | None,
    softcap: float | None,
    sinks: bool,
    slopes: bool,
    seed: int,
) -> None:
    """Ragged sequences side by side, each with a method of its own."""
    embedding = rotary(24, dim, interleaved=interleaved)
    positions = [one_group(method(name, embedding, window=window, logn=logn)) for name in names]
    step = paged(rows, positions, heads=heads[0], kv_heads=heads[1], head_dim=24, block_size=block_size, seed=seed)
    sink = torch.linspace(-1, 2, heads[0]) if sinks else None
    slope = torch.linspace(0.02, 0.7, heads[0]) if slopes else None
    options = AttentionOptions(24**-0.5, "", sliding_window, softcap, sink, slope)
    assert difference(step, options, kernel=kernel) <= TOLERANCE


# Rows and keys on both sides of every edge: trained length 64, buckets of 256, tiles of 64, and the whole of them.
EDGES = [
    (0, 1),
    (1, 1),
    (62, 1),
    (63, 1),
    (64, 1),
    (127, 1),
    (255, 1),
    (256, 1),
    (511, 1),
    (512, 1),
    (0, 600),
    (63, 258),
]


@pytest.mark.parametrize("name", every(3, METHOD_NAMES))
def test_every_method_at_every_edge(name: str, kernel: bool) -> None:
    for logn in (False, True):
        positions = one_group(method(name, rotary(16, 16), window=32, logn=logn))
        step = paged(EDGES, [positions] * len(EDGES))
        assert difference(step, AttentionOptions(0.25, ""), kernel=kernel) <= TOLERANCE


@pytest.mark.parametrize(
    ("kernel", "window"),
    [("kernel", 1), ("kernel", 16), ("kernel", 32), ("kernel", 63), ("torch", 16)],
    indirect=["kernel"],
)
@pytest.mark.parametrize("name", every(3, WINDOWED))
def test_a_sliding_window_beside_the_methods_own(name: str, window: int, kernel: bool) -> None:
    """w − 1, w and w + 1: the far part is empty, is just empty, and has one key a row."""
    rows = [(0, 5), (window, 1), (window + 1, 1), (300, 1), (257, 70), (64, 1), (128, 3)]
    positions = one_group(method(name, rotary(16, 16), window=window))
    for reach in {1, 15, 16, 17, window - 1, window, window + 1, 64, 65} - {0}:
        step = paged(rows, [positions] * len(rows), seed=reach)
        assert difference(step, AttentionOptions(0.25, "", reach), kernel=kernel) <= TOLERANCE


def test_a_layer_without_positions(kernel: bool) -> None:
    positions = one_group(method("rerope", rotary(16, 16), window=32, logn=True))
    step = paged(EDGES, [positions] * len(EDGES))
    for reach in (None, 9):
        assert difference(step, AttentionOptions(0.25, None, reach), kernel=kernel) <= TOLERANCE


def test_a_soft_cap_over_several_tiles(kernel: bool) -> None:
    positions = one_group(method("leaky_rerope", rotary(16, 16), window=32))
    step = paged([(4500, 3), (4100, 1)], [positions] * 2)
    assert difference(step, AttentionOptions(0.25, "", softcap=3.0), kernel=kernel) <= TOLERANCE


@pytest.mark.parametrize("name", ["rope", "rerope", "dynamic_leaky"])
def test_scores_of_very_different_size(name: str, kernel: bool) -> None:
    """Bands whose best scores are far apart merge without overflow: one key far away outweighs all others."""
    positions = one_group(method(name, rotary(16, 16), window=32))
    step = paged([(400, 5), (400, 1)], [positions] * 2)
    step.query.mul_(30)
    assert difference(step, AttentionOptions(0.25, ""), kernel=kernel) <= 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", ["rope", "dynamic_ntk", "rerope", "leaky_rerope"])
def test_low_precision_caches(name: str, dtype: torch.dtype, tolerance: float, kernel: bool) -> None:
    positions = one_group(method(name, rotary(16, 16), window=32))
    rows = [(0, 80), (300, 1), (200, 100), (64, 1)]
    step = paged(rows, [positions] * len(rows), dtype=dtype)
    assert difference(step, AttentionOptions(0.25, ""), kernel=kernel) <= tolerance


@pytest.mark.parametrize("count", [1, 2, 100])
def test_nothing_beyond_a_row_is_read(count: int, kernel: bool) -> None:
    """Later tokens and rubbish in the last block's tail change nothing."""
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(150, count)], [positions])
    options = AttentionOptions(0.25, "")
    before = attend(step, options, kernel=kernel)
    table = step.metadata.sequences[0].block_table
    used = torch.zeros(step.keys.shape[:2], dtype=torch.bool)
    used.view(-1)[(table[:, None] * 16 + torch.arange(16)).flatten()[: 150 + count]] = True
    for cache in (step.keys, step.values):
        cache[~used] = torch.nan
    assert torch.equal(before, attend(step, options, kernel=kernel))


@example(start=0, count=1)
@given(start=st.integers(0, 700), count=st.integers(1, 100))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plans_are_shared_by_layers_of_a_step(kernel: bool, start: int, count: int) -> None:
    """The same metadata serves layers of other options: nothing that a layer asked for may stick."""
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(start, count), (start, 1)], [positions] * 2)
    for options in (
        AttentionOptions(0.25, ""),
        AttentionOptions(0.25, "", 9),
        AttentionOptions(0.25, None),
        AttentionOptions(0.5, "", None, 2.0, torch.ones(4)),
        AttentionOptions(0.25, ""),
    ):
        assert difference(step, options, kernel=kernel) <= TOLERANCE


def test_angles_stay_within_their_bytes_as_contexts_grow() -> None:
    """Each is small when it is first read; its table grows with the longest context."""
    readings, limit = Readings(max_bytes=2**20), 2**20
    kept = []
    for index in range(8):
        angles = AngleMap(torch.full((16,), 0.1 + index, dtype=torch.float64))
        kept.append(Reading((Part(angles, angles),)))
        readings.kept(kept[-1], 32, 64)
    for reading in kept:
        readings.kept(reading, 32, 2**17)
        assert readings.num_bytes <= limit
