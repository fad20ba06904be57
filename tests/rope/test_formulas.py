"""Every method's θ and angles against its published formula in fp64 (design table: θ, near (q, k), far (q, k))."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from prerope.rope import frequencies
from prerope.rope.methods import resolve
from prerope.rope.reading import UNBOUNDED
from prerope.rope.registry import METHODS
from prerope.rope.spec import RopeSpec

from tests.rope import published
from tests.rope.published import trained

SHAPES = [(64, 10000.0, 1024), (128, 500000.0, 8192), (16, 10000.0, 64), (80, 1e6, 4096), (32, 130.0, 2048)]
SCALES = [1.0, 2.0, 4.0, 7.5, 32.0]
FAR_POSITION = 131_072


def assert_close(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), np.array(expected), rtol=1e-11, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("dim", "base", "length"), SHAPES)
@pytest.mark.parametrize("name", published.STATIC)
def test_theta_of_a_static_method(name: str, dim: int, base: float, length: int, scale: float) -> None:
    method = resolve(RopeSpec(method=name, factor=scale), trained(dim, base, length))
    assert_close(method.reading(length).theta, published.STATIC[name](dim, base, scale, length))
    assert method.run_end(0) == UNBOUNDED
    expected = published.yarn_factor(scale) if name == "yarn" else 1.0
    assert method.reading(length).attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("dim", "base", "length"), SHAPES)
@pytest.mark.parametrize("name", published.DYNAMIC)
def test_theta_of_a_dynamic_method_follows_the_row(name: str, dim: int, base: float, length: int) -> None:
    method = resolve(RopeSpec(method=name), trained(dim, base, length))
    for i in (0, length - 1, length, length + 255, length + 256, 3 * length + 17, 16 * length):
        n = published.row_length(i, length)
        reading = method.reading(method.run_end(i))
        assert_close(reading.theta, published.DYNAMIC[name](dim, base, n, length))
        expected = published.yarn_factor(n / length) if name == "dynamic_yarn" else 1.0
        assert reading.attention_factor == pytest.approx(expected, rel=1e-12)


def test_dynamic_ntk_takes_its_own_factor() -> None:
    method = resolve(RopeSpec(method="dynamic_ntk", factor=3.5), trained(64, 1e4, 512))
    assert_close(method.reading(2048).theta, published.dynamic_ntk(64, 1e4, 3.5, 2048, 512))


def test_longrope_changes_factors_past_the_trained_length_only() -> None:
    rotary = published.longrope_trained()
    method = resolve(RopeSpec(method="longrope"), rotary)
    short, long = rotary.parameters["short_factor"], rotary.parameters["long_factor"]
    for position, extension in ((0, short), (63, short), (64, long), (511, long), (100_000, long)):
        reading = method.reading(method.run_end(position))
        assert_close(reading.theta, published.longrope(16, 10000.0, extension))
        assert reading.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)), rel=1e-12)


@pytest.mark.parametrize(("dim", "base"), [(64, 1e4), (32, 5e5)])
def test_proportional_leaves_the_tail_unrotated(dim: int, base: float) -> None:
    theta = frequencies.proportional(dim, base, 0.25, 4.0)
    rotating = int(0.25 * dim // 2)
    assert_close(theta[:rotating], [base ** -(2 * m / dim) / 4.0 for m in range(rotating)])
    assert not theta[rotating:].any()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"longrope", "proportional", "dual_chunk"}))
def test_near_angles_are_position_times_theta(name: str) -> None:
    method = resolve(RopeSpec(method=name), trained(64, 1e4, 1024), 8192)
    reading = method.reading(method.run_end(5000))
    positions = [0, 1, 1023, 5000, FAR_POSITION]
    expected = [[p * t for t in reading.theta.tolist()] for p in positions]
    np.testing.assert_allclose(reading.parts[0].key.angles(torch.tensor(positions)).numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("window", [1, 100, 256, 512, 1023])
@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "dynamic_leaky", "dynamic_rerope", "string"])
def test_far_angles_read_at_the_published_distance(name: str, window: int) -> None:
    length, leak = 1024, 9.0
    method = resolve(
        RopeSpec(method=name, window=window, leak=leak if name == "leaky_rerope" else None), trained(64, 1e4, length)
    )
    theta = np.array(published.rope(64, 1e4))
    for i in (length, 1500, 4095, 20_000):
        n = published.row_length(i, length)
        reading = method.reading(method.run_end(i))
        assert reading.parts[1].d_min == window
        for d in (window, window + 1, (window + i) // 2, i):
            query = reading.parts[1].query.angles(torch.tensor([i]))[0].numpy()
            key = reading.parts[1].key.angles(torch.tensor([i - d]))[0].numpy()
            distance = published.far_position(name, d, w=window, L=length, n=n, k=leak)
            np.testing.assert_allclose(query - key, distance * theta, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(("window", "group"), [(1, 2), (256, 4), (300, 7), (512, 16)])
def test_self_extend_reads_far_keys_in_groups(window: int, group: int) -> None:
    """⌊i/G⌋ + w − ⌊w/G⌋ and ⌊j/G⌋."""
    reading = resolve(RopeSpec(method="self_extend", window=window, group=group), trained(64, 1e4, 1024)).reading(1024)
    theta = np.array(published.rope(64, 1e4))
    for i in (window, 1023, 1024, 4095, 20_001):
        query = reading.parts[1].query.angles(torch.tensor([i]))[0].numpy()
        np.testing.assert_allclose(query, (i // group + window - window // group) * theta, rtol=1e-12)
        for j in {0, i - window, (i - window) // 2}:
            np.testing.assert_allclose(
                reading.parts[1].key.angles(torch.tensor([j]))[0], j // group * theta, rtol=1e-12
            )


@pytest.mark.parametrize("window", [1, 256, 300, 1023])
@pytest.mark.parametrize("groups", [(2,), (1, 32), (2, 8, 2, 8, 32, 32, 32, 4), (1, 65536, 2, 64, 16), (128, 1) * 16])
def test_dpe_reads_far_keys_in_groups_of_each_pairs_own(groups: tuple[int, ...], window: int) -> None:
    reading = resolve(RopeSpec(method="dpe", window=window, groups=groups), trained(64, 1e4, 1024)).reading(1024)
    assert (reading.parts[0].d_max, reading.parts[1].d_min) == (window, window)
    theta = published.rope(64, 1e4)
    for i in (window, 1023, 4095, 20_001, FAR_POSITION):
        query = reading.parts[1].query.angles(torch.tensor([i]))[0].numpy()
        for j in {0, 1, i - window, (i - window) // 2}:
            key = reading.parts[1].key.angles(torch.tensor([j]))[0].numpy()
            seen = [published.dpe_position(m, 32, i, j, w=window, scales=list(groups)) for m in range(32)]
            np.testing.assert_allclose(query - key, np.array(seen) * theta, rtol=1e-11, atol=1e-9)


def test_rerope_reads_far_keys_with_no_rotation_at_all() -> None:
    assert resolve(RopeSpec(method="rerope"), trained()).reading(1024).parts[1].key.unrotated
    for name in ("leaky_rerope", "dynamic_leaky"):
        assert not resolve(RopeSpec(method=name), trained()).reading(4096).parts[1].key.unrotated


@pytest.mark.parametrize("length", [512, 8192])
def test_log_n_scale(length: int) -> None:
    method = resolve(RopeSpec(method="rope", logn=True), trained(64, 1e4, length))
    positions = torch.tensor([0, 1, length - 2, length - 1, length, 2 * length, 100_000])
    scale = method.query_scale(positions)
    assert scale is not None
    assert scale.dtype == torch.float64
    expected = [max(1.0, math.log(i + 1) / math.log(length)) for i in positions.tolist()]
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-14)
    assert resolve(RopeSpec(method="rope"), trained()).query_scale(positions) is None
