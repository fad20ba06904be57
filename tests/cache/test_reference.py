"""The specification against the papers: naive two-matrix ReRoPE and Leaky ReRoPE in fp64, and torch's own attention."""

from __future__ import annotations

import math

import pytest
import torch
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.rope.scores import method_scores

from tests.cache import published_attention as naive
from tests.cache.layouts import METHOD_NAMES, TRAINED, Paged, contiguous, method, one_group, paged, rotary
from tests.tiers import every

SCALE = 16**-0.5


def reference(step: Paged, options: AttentionOptions) -> torch.Tensor:
    return reference_attention(step.query, step.keys, step.values, step.metadata, options)


def one_sequence(name: str, length: int, *, interleaved: bool = False, dim: int = 16, **spec: object) -> Paged:
    resolved = method(name, rotary(16, dim, interleaved=interleaved), **spec)  # type: ignore[arg-type]
    return paged([(0, length)], [one_group(resolved)])


@pytest.mark.parametrize("length", [1, 30, 64, 65, 300])
@pytest.mark.parametrize("window", [1, 16, 32, 63])
@pytest.mark.parametrize(("name", "leak"), [("rerope", math.inf), ("leaky_rerope", 3.0)])
def test_naive_two_matrix_definition(name: str, leak: float, window: int, length: int) -> None:
    step = one_sequence(name, length, window=window)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = naive.two_matrices(query, key, value, window=window, leak=leak)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_naive_grouped_definition(group: int, window: int, length: int) -> None:
    step = one_sequence("self_extend", length, window=window, group=group)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = naive.grouped(query, key, value, window=window, group=group)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize("groups", [(2,), (1, 32), (4, 1, 128, 8), (2, 8, 2, 8, 32, 32, 32, 4)])
def test_naive_dpe_definition(groups: tuple[int, ...], window: int, length: int) -> None:
    """The last are those of Llama 3 8B as published, of one pair each here."""
    step = one_sequence("dpe", length, window=window, groups=groups)
    query, key, value = (x.double() for x in contiguous(step, 0))
    scales = torch.tensor(groups).repeat_interleave(8 // len(groups))
    expected = naive.by_dimension(query, key, value, window=window, scales=scales)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("window", [1, 16, 33])
def test_naive_string_definition(window: int, length: int) -> None:
    step = one_sequence("string", length, window=window)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = naive.string(query, key, value, shift=window, local=window // 2)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 47, 65, 300])
@pytest.mark.parametrize("window", [1, 16, 33])
def test_naive_dual_chunk_definition(window: int, length: int) -> None:
    step = one_sequence("dual_chunk", length, window=window)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = naive.dual_chunk(query, key, value, window=window, length=TRAINED)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 16, 17, 18, 300])
@pytest.mark.parametrize("window", [1, 16, 63])
def test_naive_streaming_definition(window: int, length: int) -> None:
    step = one_sequence("streaming", length, window=window)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = naive.streaming(query, key, value, window=window, sinks=1)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 65, 300])
def test_naive_xpos_definition(length: int) -> None:
    step = one_sequence("xpos", length)
    query, key, value = (x.double() for x in contiguous(step, 0))
    assert (reference(step, AttentionOptions(SCALE, "")) - naive.xpos(query, key, value)).abs().max() <= 1e-5


@pytest.mark.parametrize("start", every(2, [100_000, 1_000_000]))
def test_xpos_far_out(start: int) -> None:
    """Where powers of its scales are no numbers of fp32, scores are finite and those of the same distances at first."""
    xpos = method("xpos", rotary(16, 16))
    query, key = torch.randn(2, 40, 1, 16, generator=torch.Generator().manual_seed(0))
    beginning = method_scores(query, key, xpos)
    key = torch.cat([torch.randn(start, 1, 16), key])
    far = method_scores(query, key, xpos, start=start)
    assert far[..., :start].isfinite().all()
    torch.testing.assert_close(far[..., start:], beginning, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [16, 32])
def test_naive_definition_with_each_rows_own_slope(window: int) -> None:
    """dynamic_leaky row by row: k = max(1, (n − w)/(L − w)), n the row's length in runs of 256."""
    step = one_sequence("dynamic_leaky", 600, window=window)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = torch.cat(
        [
            naive.two_matrices(
                query[a:b], key[:b], value[:b], window=window, leak=max(1.0, (n - window) / (TRAINED - window)), start=a
            )
            for a, b, n in ((0, 64, 64), (64, 256, 256), (256, 512, 512), (512, 600, 768))
        ]
    )
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [4, 16])
@pytest.mark.parametrize("sliding_window", [None, 7])
def test_torch_attention_for_plain_rope(dim: int, interleaved: bool, sliding_window: int | None) -> None:
    length = 50
    step = one_sequence("rope", length, interleaved=interleaved, dim=dim)
    query, key, value = (x.double() for x in contiguous(step, 0))
    rotated = [naive.rotated(x, torch.arange(length), dim, interleaved=interleaved) for x in (query, key)]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (sliding_window or length))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (*rotated, value)), attn_mask=visible, scale=SCALE, enable_gqa=True
    )[0].transpose(0, 1)
    actual = reference(step, AttentionOptions(SCALE, "", sliding_window))
    assert (actual - expected).abs().max() <= 1e-5


def test_a_layer_without_positions() -> None:
    step = one_sequence("rope", 40)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), is_causal=True, scale=SCALE, enable_gqa=True
    )[0].transpose(0, 1)
    assert (reference(step, AttentionOptions(SCALE, None)) - expected).abs().max() <= 1e-5


def test_log_n_scales_the_query_of_each_row() -> None:
    plain, scaled = one_sequence("rope", 200), one_sequence("rope", 200, logn=True)
    factors = (torch.log(torch.arange(200.0).double() + 1) / math.log(TRAINED)).clamp(min=1.0)
    plain.query.mul_(factors[:, None, None].float())
    options = AttentionOptions(SCALE, "")
    assert (reference(plain, options) - reference(scaled, options)).abs().max() <= 1e-6


def test_the_attention_factor_is_on_query_and_key() -> None:
    """Of the rotated dims only: with partial rotary it is not a scale of the softmax."""
    step = one_sequence("yarn", 30, dim=8)
    resolved = step.metadata.sequences[0].positions.methods[""]
    reading = resolved.reading(TRAINED)
    assert reading.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    query, key, value = (x.double() for x in contiguous(step, 0))
    angles = torch.arange(30, dtype=torch.float64)[:, None] * reading.theta
    turned = [naive.turned(x, angles, interleaved=False) for x in (query, key)]
    for x in turned:
        x[..., :8] *= reading.attention_factor
    expected = naive.attend(turned[0], turned[1], value)
    assert (reference(step, AttentionOptions(SCALE, "")) - expected).abs().max() <= 1e-5


def test_soft_cap_and_sinks() -> None:
    step = one_sequence("rope", 40)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    query, key, value = (x.double() for x in contiguous(step, 0))
    turned = [naive.rotated(x, torch.arange(40), 16, interleaved=False) for x in (query, key)]
    expected = naive.attend(*turned, value, softcap=1.5, sinks=sinks.double())
    actual = reference(step, AttentionOptions(SCALE, "", softcap=1.5, sinks=sinks))
    assert (actual - expected).abs().max() <= 1e-5


def test_scores_that_fall_with_the_distance() -> None:
    """ALiBi (Press 2021, arXiv 2108.12409), whose bias is of the key's position: softmax sees no difference."""
    step = one_sequence("rope", 40)
    slopes = 2.0 ** -torch.arange(1, 5)
    query, key, value = (x.double() for x in contiguous(step, 0))
    expected = naive.attend(query, key, value, slopes=slopes.double())
    actual = reference(step, AttentionOptions(SCALE, None, slopes=slopes))
    assert (actual - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_rows_do_not_depend_on_how_they_are_cut(name: str) -> None:
    """Row consistency at its root: a row alone, in a chunk or in the whole prompt reads the same."""
    resolved = one_group(method(name, rotary(16, 16), window=20, logn=True))
    whole = paged([(0, 530)], [resolved])
    options = AttentionOptions(SCALE, "")
    expected = reference(whole, options)
    sequence = whole.metadata.sequences[0]
    for start, stop in ((0, 63), (63, 65), (255, 257), (300, 530), (529, 530)):
        whole.metadata.sequences[0] = type(sequence)(0, stop - start, start, sequence.block_table, resolved)
        part = Paged(whole.query[start:stop], whole.keys, whole.values, whole.metadata)
        assert (reference(part, options) - expected[start:stop]).abs().max() <= 1e-6
