"""The sampler of whole batches against the one of single rows, against the distribution itself, and without waiting."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prerope.server.engine.sampling import device as device_sampler
from prerope.server.engine.sampling.device import best, invert, sample_on_device
from prerope.server.engine.sampling.host import NUCLEUS_CANDIDATES, sample
from prerope.server.engine.sequence import SamplingParams, Sequence
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.sampling.test_sampler import sequence

PROMPT = [3, 4]
GRID = 2000
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"temperature": 1e-5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_p": 1e-9},
    {"top_p": 0.9999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.1, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
]


def sequences_of(options: list[dict[str, Any]], seed: int = 0) -> list[Sequence]:
    return [sequence(SamplingParams(max_tokens=9, seed=seed + i, **one), PROMPT) for i, one in enumerate(options)]


def random_rows(num_rows: int, size: int, seed: int, spread: float = 3.0) -> Tensor:
    """Rows whose logits are all different, so that there is one order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, size, generator=generator) * spread
    assert all(len(row.unique()) == size for row in rows)
    return rows


def evenly_spaced(num_rows: int, size: int, seed: int, step: float = 0.01) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator) * step for _ in range(num_rows)])


@pytest.mark.parametrize("size", [2, 40, 128, 3 * NUCLEUS_CANDIDATES])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_tokens_as_row_by_row(size: int, seed: int) -> None:
    """Same seeds, same tokens, all parameter sets in one batch, over several tokens of each stream."""
    options = OPTIONS * 3
    random.Random(seed).shuffle(options)
    together, apart = sequences_of(options), sequences_of(options)
    for step in range(5):
        logits = evenly_spaced(len(options), size, seed * 10 + step)
        before = logits.clone()
        expected = sample(logits.clone(), apart, frozenset())
        actual = sample_on_device(logits, together)
        assert (actual.dtype, actual.shape) == (torch.int64, (len(options),))
        assert actual.tolist() == expected
        assert torch.equal(logits, before)


@pytest.mark.parametrize("most", [1, 1000, 5000])
def test_slices_and_neighbours_change_nothing(most: int) -> None:
    logits = random_rows(len(OPTIONS), 300, seed=5)
    whole = sample_on_device(logits, sequences_of(OPTIONS))
    with patch.object(device_sampler, "SLICE_LOGITS", most):
        assert torch.equal(sample_on_device(logits, sequences_of(OPTIONS)), whole)
    for row, one in enumerate(sequences_of(OPTIONS)):
        assert torch.equal(sample_on_device(logits[row : row + 1], [one]), whole[row : row + 1])


# --- against the distribution -----------------------------------------------------------------------------------------


def exact(logits: NDArray[np.float64], sampling: SamplingParams) -> tuple[list[int], NDArray[np.float64]]:
    """(ids in the order that a draw runs through them, their probabilities), as the parameters are defined."""
    size = len(logits)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    ordered = 0 < sampling.top_k < size or sampling.top_p < 1
    ids = sorted(range(size), key=lambda i: (-logits[i], i)) if ordered else list(range(size))
    if 0 < sampling.top_k < size:
        weights[ids[sampling.top_k :]] = 0
    weights /= weights.sum()
    if sampling.top_p < 1:
        mass = 0.0
        for place, token in enumerate(ids):
            if place and mass >= sampling.top_p:
                weights[token] = 0
            else:
                mass += weights[token]
    weights[weights < sampling.min_p * weights.max()] = 0
    return ids, weights / weights.sum()


def drawn_on_a_grid(logits: Tensor, sampling: SamplingParams) -> tuple[NDArray[np.float64], list[int]]:
    """(points, tokens) when the uniform number runs evenly through [0, 1): one row a point."""
    points = (np.arange(GRID) + 0.5) / GRID
    with patch.object(device_sampler, "uniform", side_effect=points.tolist()):
        rows = sample_on_device(logits.expand(GRID, -1), [sequence(sampling, PROMPT)] * GRID)
    return points, rows.tolist()


@pytest.mark.parametrize("options", [one for one in OPTIONS if one.get("temperature") != 0.0], ids=str)
@pytest.mark.parametrize("kind", ["distinct", "ties", "forbidden", "flat"])
def test_every_point_gives_the_token_that_lies_there(options: dict[str, Any], kind: str) -> None:
    logits = random_rows(1, 60, seed=7, spread=1.5)[0]
    if kind == "ties":
        logits = logits.mul(2).round()
    elif kind == "forbidden":
        logits[torch.randperm(60, generator=torch.Generator().manual_seed(1))[:30]] = -torch.inf
        logits[[0, 59]] = -torch.inf
    elif kind == "flat":
        logits = torch.zeros(60)
    sampling = SamplingParams(max_tokens=1, **options)
    ids, probabilities = exact(logits.double().numpy(), sampling)
    ends = np.cumsum(probabilities[ids])
    points, tokens = drawn_on_a_grid(logits, sampling)
    clear = np.abs(points[:, None] - ends[None, :]).min(axis=1) > 1e-12
    expected = np.array(ids)[np.minimum(np.searchsorted(ends, points, side="right"), 59)]
    assert clear.sum() > 0.9 * GRID
    assert np.array_equal(np.array(tokens)[clear], expected[clear])
    assert (probabilities[tokens] > 0).all()


# --- extremes ---------------------------------------------------------------------------------------------------------


def test_the_best_token_stays_whatever_is_asked() -> None:
    logits = random_rows(1, 5000, seed=2, spread=0.001).expand(4, -1)
    options = [{"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}, {"temperature": 1e-9}]
    with patch.object(device_sampler, "uniform", return_value=1 - 2**-53):
        tokens = sample_on_device(logits, sequences_of(options))
    assert tokens.tolist() == [int(logits[0].argmax())] * 4


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.99}, {"min_p": 0.2}], ids=str)
def test_a_token_of_probability_zero_is_never_drawn(point: float, options: dict[str, Any]) -> None:
    """First and last ids are impossible, and the point lies at the very ends of the distribution, or past them."""
    logits = torch.full((1, 9), -torch.inf)
    logits[0, [2, 3, 6]] = torch.tensor([1.0, 1.5, 1.25])
    with patch.object(device_sampler, "uniform", return_value=point):
        token = sample_on_device(logits, sequences_of([options])).item()
    assert token in (2, 3, 6)


def test_a_sum_that_grows_where_nothing_is_added() -> None:
    """As rounding of a parallel sum may: the zero after it is passed over, in the middle and at the end."""
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    drifting = torch.tensor([[0.0, 0.25, 0.25 + 1e-3, 1.0, 1.0 + 1e-3]], dtype=torch.float64)
    with patch.object(Tensor, "cumsum", return_value=drifting):
        points = [0.0, 0.2501 / 1.001, 0.5, 1.0005 / 1.001]
        places = [int(invert(probabilities, torch.tensor([[point]], dtype=torch.float64))) for point in points]
    assert places == [1, 3, 3, 3]


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e38, 2e38, -3e38], [-1e38, -2e38, -3e38]])
    options = [{"temperature": 1e-5}, {"temperature": 1e-5, "top_p": 0.5}]
    assert sample_on_device(logits, sequences_of(options)).tolist() == [1, 0]


def test_one_number_a_draw_and_none_for_greedy() -> None:
    options = [{"top_p": 0.5}, {"temperature": 0.0}, {}]
    sequences = sequences_of(options)
    sample_on_device(random_rows(3, 50, seed=1), sequences)
    for row, one in enumerate(sequences):
        other = torch.Generator().manual_seed(row)
        if not one.sampling.greedy:
            torch.rand((), dtype=torch.float64, generator=other)
        assert one.generator is not None
        assert torch.equal(one.generator.get_state(), other.get_state())


# --- without waiting --------------------------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Every operation leaves its result on the device, and none has a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for one in out if isinstance(out, tuple | list) else [out]:
            assert not isinstance(one, Tensor) or one.device.type == "cuda", f"{func} leaves the device"
        for arg in args:
            indices = arg if isinstance(arg, list | tuple) else []
            assert not any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices), f"{func} by a mask"
        return out


@pytest.fixture
def fake_cuda() -> Iterator[FakeTensorMode]:
    def send(values: NDArray[Any], device: torch.device) -> Tensor:
        assert values.dtype == np.float64
        return torch.empty(values.shape, dtype=torch.float64, device=device)

    with patch.object(device_sampler, "send", send), patch.object(device_sampler, "uniform", return_value=0.5):
        yield FakeTensorMode()


@pytest.mark.parametrize("greedy", [True, False])
def test_nothing_waits_for_the_device(fake_cuda: FakeTensorMode, greedy: bool) -> None:
    options = [{"temperature": 0.0}] * 5 if greedy else OPTIONS
    sequences = sequences_of(options)
    with fake_cuda, OnDevice() as seen:
        tokens = sample_on_device(torch.empty(len(options), 1000, device="cuda"), sequences)
    assert (tokens.device.type, tokens.dtype, tokens.shape) == ("cuda", torch.int64, (len(options),))
    assert any("argmax" in name for name in seen.names)
    assert any("sort" in name for name in seen.names) is not greedy


def test_the_mode_above_sees_a_wait(fake_cuda: FakeTensorMode) -> None:
    with fake_cuda:
        logits = torch.empty(3, 1000, device="cuda")
        with OnDevice(), pytest.raises(AssertionError, match="leaves the device"):
            logits.cpu()
        with pytest.raises(DataDependentOutputException):
            logits.argmax().item()
        with pytest.raises(DynamicOutputShapeException):
            torch.masked_select(logits, logits > 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"min_p": 0.1}, set()),
        ({"top_k": 1000}, set()),
        ({"top_k": 9, "top_p": 0.5}, {"topk"}),
        ({"top_p": 0.5}, {"sort"}),
        ({"top_k": 200}, {"sort"}),
    ],
    ids=str,
)
def test_the_vocabulary_is_ordered_only_where_asked(
    fake_cuda: FakeTensorMode, options: dict[str, Any], expected: set[str]
) -> None:
    sequences = sequences_of([options, {"temperature": 0.0}])
    with patch.object(device_sampler, "MOST_CANDIDATES", 100), fake_cuda, OnDevice() as seen:
        sample_on_device(torch.empty(2, 1000, device="cuda"), sequences)
    assert {name for name in ("topk", "sort") if any(name in one for one in seen.names)} == expected


# --- the best tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 31, 99])
def test_the_best_by_selection_are_the_best_by_sorting(width: int) -> None:
    """Ties, signs, infinities, both zeros and denormal numbers: of equals the lowest id first."""
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, -torch.inf, 1.0000001, -1.0000001]
    generator = torch.Generator().manual_seed(width)
    logits = torch.tensor(special)[torch.randint(len(special), (50, 100), generator=generator)]
    values, ids = best(logits, width)
    expected, order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :width])
    assert torch.equal(ids, order[:, :width])


@pytest.mark.parametrize("most", [1, 6, 20, 5000])
def test_a_row_has_one_result_whichever_way_its_order_is_found(most: int) -> None:
    """Logits with many ties, as low-precision models have them."""
    logits = (random_rows(len(OPTIONS), 300, seed=8) * 4).round() / 4
    with patch.object(device_sampler, "MOST_CANDIDATES", 0):
        expected = sample_on_device(logits, sequences_of(OPTIONS))
    with patch.object(device_sampler, "MOST_CANDIDATES", most):
        assert torch.equal(sample_on_device(logits, sequences_of(OPTIONS)), expected)
