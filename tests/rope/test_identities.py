"""Where two methods are one: limits in which the published formulas coincide, and where a method's parts must meet."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from rope import frequencies
from rope.methods import resolve
from rope.reading import PositionMethod
from rope.spec import RopeSpec
from tests.rope.published import trained

DYNAMIC = ("dynamic_linear", "dynamic_ntk", "dynamic_yarn", "dynamic_leaky")
SHAPES = [(64, 10000.0, 1024), (128, 500000.0, 8192), (16, 1234.5, 300)]


def method(name: str, dim: int = 64, base: float = 1e4, length: int = 1024, **spec: object) -> PositionMethod:
    return resolve(RopeSpec(method=name, **spec), trained(dim, base, length))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [2.0, 5.0, 16.0])
@pytest.mark.parametrize(("dim", "base"), [(64, 1e4), (128, 5e5)])
def test_ntk_mixed_spans_linear_to_ntk_fixed(dim: int, base: float, scale: float) -> None:
    mixed = frequencies.ntk_mixed(dim, base, scale, beta=1.0)
    np.testing.assert_allclose(mixed, frequencies.ntk_fixed(dim, base, scale), rtol=1e-12)
    mixed = frequencies.ntk_mixed(dim, base, scale, beta=0.0)
    np.testing.assert_allclose(mixed, frequencies.linear(dim, base, scale), rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "ntk", "ntk_fixed", "ntk_mixed", "yarn", "llama3"])
def test_a_scale_of_one_is_rope(name: str) -> None:
    reading, plain = method(name, factor=1.0).reading(1024), method("rope").reading(1024)
    np.testing.assert_allclose(reading.theta, plain.theta, rtol=1e-15)
    assert reading.attention_factor == 1.0


@pytest.mark.parametrize(("dim", "base", "length"), SHAPES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_methods_are_rope_inside_the_trained_length(name: str, dim: int, base: float, length: int) -> None:
    """Bit for bit: blocks of those rows are shared with rope's."""
    dynamic, plain = method(name, dim, base, length), method("rope", dim, base, length)
    for position in (0, length // 2, length - 1):
        reading = dynamic.reading(dynamic.row_length(position))
        assert torch.equal(reading.theta, plain.reading(length).theta)
        assert (reading.attention_factor, reading.window) == (1.0, None)
    past = dynamic.reading(dynamic.row_length(length))
    assert past.window is not None or not torch.equal(past.theta, plain.reading(length).theta)


@pytest.mark.parametrize("factor", [1.5, 2.0, 2.3, 3.7, 8.1])
def test_dynamic_ntk_is_rope_inside_the_trained_length_for_every_factor(factor: float) -> None:
    inside = method("dynamic_ntk", length=3000, factor=factor).reading(3000)
    assert torch.equal(inside.theta, method("rope", length=3000).reading(3000).theta)


def test_leaky_with_leak_one_is_rope() -> None:
    leaky = method("leaky_rerope", leak=1.0, window=100).reading(1024)
    positions = torch.tensor([100, 500, 5000])
    np.testing.assert_allclose(leaky.far_query_angles(positions), leaky.near_angles(positions), rtol=1e-12)
    np.testing.assert_allclose(leaky.far_key_angles(positions), leaky.near_angles(positions), rtol=1e-15)


def test_self_extend_with_groups_of_one_is_rope() -> None:
    assert method("self_extend", group=1, window=100).digest() == method("rope").digest()


def test_self_extends_default_group_keeps_far_distances_inside_the_trained_length() -> None:
    """The farthest key of the target length, four times L here, sits inside L; a smaller group would not do."""
    extended = method("self_extend", window=256)
    group, last = extended.parameters["group"], torch.tensor([4 * 1024 - 1])
    for size, inside in ((group, True), (group - 1, False)):
        reading = method("self_extend", window=256, group=size).reading(1024)
        distance = (reading.far_query_angles(last) - reading.far_key_angles(torch.tensor([0])))[0, 0] / reading.theta[0]
        assert (float(distance) < 1024) is inside


def test_leaky_with_an_infinite_leak_is_rerope() -> None:
    leaky = method("leaky_rerope", leak=1e15, window=100).reading(1024)
    rerope = method("rerope", window=100).reading(1024)
    positions = torch.tensor([100, 500, 5000])
    np.testing.assert_allclose(leaky.far_query_angles(positions), rerope.far_query_angles(positions), rtol=1e-9)
    np.testing.assert_allclose(leaky.far_key_angles(positions), rerope.far_key_angles(positions), atol=1e-9)


@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "dynamic_leaky"])
@pytest.mark.parametrize("window", [1, 255, 256, 512])
def test_far_meets_near_at_the_window(name: str, window: int) -> None:
    """At d = w both parts give the same relative angle, whatever the row."""
    positional = method(name, window=window)
    for i in (1024, 1279, 1280, 4095, 65_535):
        reading = positional.reading(positional.row_length(i))
        query, key = torch.tensor([i]), torch.tensor([i - window])
        near = reading.near_angles(query) - reading.near_angles(key)
        far = reading.far_query_angles(query) - reading.far_key_angles(key)
        np.testing.assert_allclose(near, far, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(near[0], window * reading.theta, rtol=1e-10)


@pytest.mark.parametrize("window", [1, 256, 700])
@pytest.mark.parametrize("row_length", [1280, 4096, 100_096])
def test_dynamic_leaky_puts_the_farthest_key_at_the_trained_length(window: int, row_length: int) -> None:
    positional = method("dynamic_leaky", window=window)
    assert positional.row_length(row_length - 1) == row_length
    reading = positional.reading(row_length)
    distance = reading.far_query_angles(torch.tensor([row_length])) - reading.far_key_angles(torch.tensor([0]))
    np.testing.assert_allclose(distance[0], 1024 * reading.theta, rtol=1e-10)
    last = reading.far_query_angles(torch.tensor([row_length - 1])) - reading.far_key_angles(torch.tensor([0]))
    assert (last[0] < 1024 * reading.theta).all()


def test_row_lengths_at_the_boundaries() -> None:
    for length in (64, 1000, 1024):
        dynamic = method("dynamic_ntk", length=length)
        bucket_end = -(-(length + 1) // 256) * 256
        expected = {0: length, length - 1: length, length: bucket_end, bucket_end - 1: bucket_end}
        expected |= {bucket_end: bucket_end + 256, bucket_end + 255: bucket_end + 256}
        assert {i: dynamic.row_length(i) for i in expected} == expected
    assert method("dynamic_ntk").row_length(1024 + 255) == 1280
    assert method("dynamic_ntk").row_length(1024 + 256) == 1536


@pytest.mark.parametrize("name", [*DYNAMIC, "rope", "rerope"])
@pytest.mark.parametrize("length", [64, 300, 1024])
def test_runs_cover_rows_once_and_give_each_its_own_reading(name: str, length: int) -> None:
    positional = method(name, length=length)
    for start, stop in ((0, 1), (0, length), (length - 1, length + 1), (0, 2000), (length, length + 600), (777, 778)):
        runs = positional.runs(start, stop)
        assert [first for first, _, _ in runs] == [start, *(last for _, last, _ in runs[:-1])]
        assert runs[-1][1] == stop
        for first, last, reading in runs:
            for position in (first, last - 1):
                assert reading is positional.reading(positional.row_length(position))
        for (_, _, before), (_, _, after) in pairwise(runs):
            assert before is not after, "a run is cut where nothing changes"


def test_a_switch_has_two_runs_at_most() -> None:
    from tests.rope.published import longrope_trained

    positional = resolve(RopeSpec(method="longrope"), longrope_trained())
    assert [(first, last) for first, last, _ in positional.runs(0, 5000)] == [(0, 64), (64, 5000)]
    assert [(first, last) for first, last, _ in positional.runs(64, 5000)] == [(64, 5000)]
