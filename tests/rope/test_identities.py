"""Where two methods are one: limits in which the published formulas coincide, and where a method's parts must meet."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from prerope.rope import frequencies
from prerope.rope.methods import resolve
from prerope.rope.reading import PositionMethod
from prerope.rope.scores import method_scores
from prerope.rope.spec import RopeSpec

from tests.rope.published import trained

DYNAMIC = ("dynamic_linear", "dynamic_ntk", "dynamic_yarn", "dynamic_leaky")
JAGGED_AND_EXACT: tuple[tuple[str, dict[str, int]], ...] = (("jagged_rerope", {"group": 1}), ("rerope", {}))
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


@pytest.mark.parametrize("name", ["linear", "ntk", "ntk_fixed", "ntk_mixed", "ntk_by_parts", "yarn", "llama3"])
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
        reading = dynamic.reading(dynamic.run_end(position))
        assert torch.equal(reading.theta, plain.reading(length).theta)
        assert (reading.attention_factor, len(reading.parts)) == (1.0, 1)
    past = dynamic.reading(dynamic.run_end(length))
    assert len(past.parts) > 1 or not torch.equal(past.theta, plain.reading(length).theta)


@pytest.mark.parametrize("factor", [1.5, 2.0, 2.3, 3.7, 8.1])
def test_dynamic_ntk_is_rope_inside_the_trained_length_for_every_factor(factor: float) -> None:
    inside = method("dynamic_ntk", length=3000, factor=factor).reading(3000)
    assert torch.equal(inside.theta, method("rope", length=3000).reading(3000).theta)


def test_leaky_with_leak_one_is_rope() -> None:
    leaky = method("leaky_rerope", leak=1.0, window=100).reading(1024)
    positions = torch.tensor([100, 500, 5000])
    np.testing.assert_allclose(leaky.parts[1].query.angles(positions), leaky.parts[0].key.angles(positions), rtol=1e-12)
    np.testing.assert_allclose(leaky.parts[1].key.angles(positions), leaky.parts[0].key.angles(positions), rtol=1e-15)


def test_self_extend_with_groups_of_one_is_rope() -> None:
    assert method("self_extend", group=1, window=100).digest() == method("rope").digest()
    assert method("dpe", groups=(1, 1), window=100).digest() == method("rope").digest()


@pytest.mark.parametrize("groups", [(8,), (8, 8, 8), (8,) * 32])
def test_dpe_with_one_group_for_all_pairs_is_self_extend(groups: tuple[int, ...]) -> None:
    grouped, extended = method("dpe", groups=groups, window=100), method("self_extend", group=8, window=100)
    positions = torch.tensor([0, 7, 8, 100, 5001])
    for part, other in zip(grouped.reading_of(0).parts, extended.reading_of(0).parts, strict=True):
        np.testing.assert_allclose(part.query.angles(positions), other.query.angles(positions), rtol=1e-14)
        np.testing.assert_allclose(part.key.angles(positions), other.key.angles(positions), rtol=1e-14)
    unasked = method("dpe", window=100)
    assert unasked.parameters["groups"] == [8], "six would fit four times L, and eight is the next power of two"


@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "jagged_rerope", "self_extend", "dpe", "streaming"])
def test_nothing_is_far_before_the_window_ends(name: str) -> None:
    """Rows up to the window read as rope does: a window at least the length is rope."""
    windowed, plain = method(name, window=800), method("rope")
    query, key = torch.randn(2, 800, 1, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method_scores(query, key, windowed), method_scores(query, key, plain))
    assert not torch.equal(*(method_scores(query[:40], key, m, start=900)[:, :, :40] for m in (windowed, plain)))


def test_jagged_rerope_with_blocks_of_one_is_rerope() -> None:
    query, key = torch.randn(2, 700, 1, 64, generator=torch.Generator().manual_seed(0))
    jagged, exact = (method_scores(query, key, method(name, window=100, **group)) for name, group in JAGGED_AND_EXACT)
    torch.testing.assert_close(jagged, exact, rtol=1e-5, atol=1e-4)


def test_jagged_rerope_differs_from_rerope_inside_one_block_alone() -> None:
    """Keys at w ≤ d < w + B − 1, of the block that straddles the window's edge, are read at d instead of w."""
    window, block = 100, 16
    i, j = torch.arange(300), torch.arange(300)
    distance = i[:, None] - j
    for start, stop, reading in method("jagged_rerope", window=window, group=block).runs(0, 300):
        far = reading.parts[1].reads(i[start:stop], j) if len(reading.parts) > 1 else torch.zeros(stop - start, 300)
        rows = distance[start:stop]
        assert not (far.bool() & (rows < window)).any()
        assert far.bool()[rows >= window + block - 1].all()
        assert (far.sum(0) % (stop - start) == 0).all(), "the rows of a run share the edge"
        assert far.bool().any(0).sum() % block == 0, "whole blocks"


def test_dual_chunk_inside_one_chunk_and_with_neighbours() -> None:
    """Own chunk and the neighbouring tokens of the last one are read at their exact distance (An 2024, fig. 2)."""
    chunked = method("dual_chunk", window=256)  # chunks of 768
    theta = chunked.reading_of(0).theta
    for i in (0, 767, 768, 800, 1535, 1536, 5000):
        for part in chunked.reading_of(i).parts:
            low, high = part.keys(i, i + 1)
            angles = part.query.angles(torch.tensor([i])) - part.key.angles(torch.arange(low, high))
            distance = angles[:, 0] / theta[0]
            assert (distance > -1e-9).all()
            assert (distance < 1024).all()
            exact = i - torch.arange(low, high)
            near = exact < 256
            np.testing.assert_allclose(distance[near], exact[near], atol=1e-9)


def test_self_extends_default_group_keeps_far_distances_inside_the_trained_length() -> None:
    """The farthest key of the target length, four times L here, sits inside L; a smaller group would not do."""
    extended = method("self_extend", window=256)
    group, last = extended.parameters["group"], torch.tensor([4 * 1024 - 1])
    for size, inside in ((group, True), (group - 1, False)):
        reading = method("self_extend", window=256, group=size).reading(1024)
        distance = (reading.parts[1].query.angles(last) - reading.parts[1].key.angles(torch.tensor([0])))[
            0, 0
        ] / reading.theta[0]
        assert (float(distance) < 1024) is inside


def test_leaky_with_an_infinite_leak_is_rerope() -> None:
    leaky = method("leaky_rerope", leak=1e15, window=100).reading(1024)
    rerope = method("rerope", window=100).reading(1024)
    positions = torch.tensor([100, 500, 5000])
    np.testing.assert_allclose(
        leaky.parts[1].query.angles(positions), rerope.parts[1].query.angles(positions), rtol=1e-9
    )
    np.testing.assert_allclose(leaky.parts[1].key.angles(positions), rerope.parts[1].key.angles(positions), atol=1e-9)


@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "dynamic_leaky", "dynamic_rerope"])
@pytest.mark.parametrize("window", [1, 255, 256, 512])
def test_far_meets_near_at_the_window(name: str, window: int) -> None:
    """At d = w both parts give the same relative angle, whatever the row."""
    positional = method(name, window=window)
    for i in (1024, 1279, 1280, 4095, 65_535):
        reading = positional.reading(positional.run_end(i))
        query, key = torch.tensor([i]), torch.tensor([i - window])
        near = reading.parts[0].key.angles(query) - reading.parts[0].key.angles(key)
        far = reading.parts[1].query.angles(query) - reading.parts[1].key.angles(key)
        np.testing.assert_allclose(near, far, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(near[0], window * reading.theta, rtol=1e-10)


@pytest.mark.parametrize("length", [1024, 8192, 131_072])
def test_string_leaves_the_largest_third_of_the_distances_unused(length: int) -> None:
    """The first key of the last row is read at ⅔ L and the local value: far keys go on from 128 (An 2024, fig. 4)."""
    reading = method("string", length=length).reading_of(0)
    shift = length // 3
    for key, seen in ((0, length - 1 - shift + 128), (length - 1 - shift, 128)):
        query, turned = torch.tensor([length - 1]), torch.tensor([key])
        (part,) = (part for part in reading.parts if bool(part.reads(query, turned)))
        angles = part.query.angles(query) - part.key.angles(turned)
        np.testing.assert_allclose(angles[0], seen * reading.theta, rtol=1e-10)


@pytest.mark.parametrize("window", [1, 256, 700])
@pytest.mark.parametrize("row_length", [1280, 4096, 100_096])
def test_dynamic_leaky_puts_the_farthest_key_at_the_trained_length(window: int, row_length: int) -> None:
    positional = method("dynamic_leaky", window=window)
    assert positional.run_end(row_length - 1) == row_length
    reading = positional.reading(row_length)
    distance = reading.parts[1].query.angles(torch.tensor([row_length])) - reading.parts[1].key.angles(
        torch.tensor([0])
    )
    np.testing.assert_allclose(distance[0], 1024 * reading.theta, rtol=1e-10)
    last = reading.parts[1].query.angles(torch.tensor([row_length - 1])) - reading.parts[1].key.angles(
        torch.tensor([0])
    )
    assert (last[0] < 1024 * reading.theta).all()


def test_row_lengths_at_the_boundaries() -> None:
    for length in (64, 1000, 1024):
        dynamic = method("dynamic_ntk", length=length)
        bucket_end = -(-(length + 1) // 256) * 256
        expected = {0: length, length - 1: length, length: bucket_end, bucket_end - 1: bucket_end}
        expected |= {bucket_end: bucket_end + 256, bucket_end + 255: bucket_end + 256}
        assert {i: dynamic.run_end(i) for i in expected} == expected
    assert method("dynamic_ntk").run_end(1024 + 255) == 1280
    assert method("dynamic_ntk").run_end(1024 + 256) == 1536


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
                assert reading is positional.reading(positional.run_end(position))
        for (_, _, before), (_, _, after) in pairwise(runs):
            assert before is not after, "a run is cut where nothing changes"


def test_a_switch_has_two_runs_at_most() -> None:
    from tests.rope.published import longrope_trained

    positional = resolve(RopeSpec(method="longrope"), longrope_trained())
    assert [(first, last) for first, last, _ in positional.runs(0, 5000)] == [(0, 64), (64, 5000)]
    assert [(first, last) for first, last, _ in positional.runs(64, 5000)] == [(64, 5000)]
