"""RotaryEmbedding against rotary-embedding-torch, and against complex numbers in fp64 where that one is wrong.

Those tests hold the package's error, too: one that fails there says that a newer version has mended it.
"""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import rotary_embedding_torch as original
import torch
from prerope.rope import RotaryEmbedding, apply_learned_rotations, apply_rotary_emb, broadcat
from prerope.rope.rotation import rotate, table
from torch import Tensor

from prerope import rope

DIM, HEAD_DIM = 8, 12
PARITY = {"rtol": 0.0, "atol": 1e-5}
ULPS = {"rtol": 0.0, "atol": 2e-7}
"""Numbers below 1.5, whose two products were rounded or fused."""


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).sub(1).to(dtype)


def both(dim: int = DIM, **options: Any) -> tuple[RotaryEmbedding, original.RotaryEmbedding]:
    return RotaryEmbedding(dim, **options), original.RotaryEmbedding(dim, **options)


def formula(x: Tensor, positions: Tensor, dim: int = DIM, theta: float = 10000.0, log_scale: float = 0.0) -> Tensor:
    """x [..., n, head_dim] in fp64: interleaved pairs times e^(i·position·θ_m), and times ζ_m^(log_scale·position)."""
    m = np.arange(dim // 2)
    zeta = (2 * m + 0.4 * dim) / (1.4 * dim)
    p = positions.double().numpy()[..., None]
    turn = np.exp(1j * p * theta ** (-2.0 * m / dim)) * zeta ** (p * log_scale)
    out = x.double().numpy().copy()
    turned = (out[..., 0:dim:2] + 1j * out[..., 1:dim:2]) * turn
    out[..., 0:dim:2], out[..., 1:dim:2] = turned.real, turned.imag
    return torch.from_numpy(out)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q.double() @ k.double().transpose(-1, -2)


OPTIONS: dict[str, dict[str, Any]] = {
    "lang": {},
    "theta": {"theta": 500.0},
    "custom": {"custom_freqs": torch.tensor([1.0, 0.5, 0.3, -0.1])},
    "pixel": {"freqs_for": "pixel", "max_freq": 4},
    "constant": {"freqs_for": "constant", "num_freqs": DIM // 2},
    "learned": {"learned_freq": True},
    "interpolated": {"interpolate_factor": 2.5},
    "ntk": {"theta_rescale_factor": 4.0},
    "no cache": {"cache_if_possible": False},
    "small cache": {"cache_max_seq_len": 10},
    "before heads": {"seq_before_head_dim": True},
}


class TestParity:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_rotate_queries_or_keys(self, options: dict[str, Any]) -> None:
        ours, theirs = both(**options)
        x = uniform(2, 9, 3, HEAD_DIM)
        for offset in (0, 5):
            expected = theirs.rotate_queries_or_keys(x, offset=offset)
            torch.testing.assert_close(ours.rotate_queries_or_keys(x, offset=offset), expected, **PARITY)
        expected = theirs.rotate_queries_or_keys(x, seq_dim=-3, scale=0.5)
        torch.testing.assert_close(ours.rotate_queries_or_keys(x, seq_dim=-3, scale=0.5), expected, **PARITY)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_cached_keys(self, options: dict[str, Any]) -> None:
        ours, theirs = both(**options)
        q, k = uniform(2, 4, 4, HEAD_DIM), uniform(2, 9, 9, HEAD_DIM, seed=1)
        q = q[:, :, :1] if ours.default_seq_dim == -2 else q
        for offset in (0, 3):
            expected = theirs.rotate_queries_with_cached_keys(q, k, offset=offset)
            for mine, other in zip(ours.rotate_queries_with_cached_keys(q, k, offset=offset), expected, strict=True):
                torch.testing.assert_close(mine, other, **PARITY)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_frequencies_positions_and_angles(self, options: dict[str, Any]) -> None:
        ours, theirs = both(**options)
        torch.testing.assert_close(ours.freqs, theirs.freqs, rtol=1e-6, atol=0)
        assert ours.freqs.requires_grad == theirs.freqs.requires_grad
        assert ours.default_seq_dim == theirs.default_seq_dim
        expected = theirs.get_seq_pos(7, device="cpu", dtype=torch.float32, offset=2)
        assert torch.equal(ours.get_seq_pos(7, device="cpu", dtype=torch.float32, offset=2), expected)
        positions = uniform(2, 5) * 10
        torch.testing.assert_close(ours(positions), theirs(positions), **PARITY, check_dtype=False)

    @pytest.mark.parametrize("seq_dim", [None, -3])
    @pytest.mark.parametrize("length", [1, 8, 9])
    def test_xpos(self, length: int, seq_dim: int | None) -> None:
        ours, theirs = both(use_xpos=True, xpos_scale_base=16)
        q, k = uniform(2, length, length, HEAD_DIM), uniform(2, length, length, HEAD_DIM, seed=1)
        expected = theirs.rotate_queries_and_keys(q, k, seq_dim=seq_dim)
        for mine, other in zip(ours.rotate_queries_and_keys(q, k, seq_dim=seq_dim), expected, strict=True):
            torch.testing.assert_close(mine, other, **PARITY)
        positions = torch.arange(length).float()
        torch.testing.assert_close(ours.get_scale(positions), theirs.get_scale(positions), **PARITY, check_dtype=False)

    def test_xpos_where_all_keys_have_a_query(self) -> None:
        """There the original's two centres are one."""
        ours, theirs = both(use_xpos=True)
        q, k = uniform(2, 9, DIM), uniform(2, 9, DIM, seed=1)
        for mine, other in zip(
            ours.rotate_queries_with_cached_keys(q, k), theirs.rotate_queries_with_cached_keys(q, k), strict=True
        ):
            torch.testing.assert_close(mine, other, **PARITY)

    @pytest.mark.parametrize("dims", [(5,), (3, 5), (2, 3, 4)])
    @pytest.mark.parametrize("options", [{"freqs_for": "pixel"}, {"cache_if_possible": False}], ids=["pixel", "lang"])
    def test_axial(self, options: dict[str, Any], dims: tuple[int, ...]) -> None:
        ours, theirs = both(4, **options)
        x = uniform(2, *dims, 4 * len(dims) + 3)
        for offsets in (None, (0.5, 2, 1)[: len(dims)], torch.tensor([3.0, 1.0, 2.0][: len(dims)])):
            mine, other = ours.get_axial_freqs(*dims, offsets=offsets), theirs.get_axial_freqs(*dims, offsets=offsets)
            assert mine.shape == (*dims, 4 * len(dims))
            torch.testing.assert_close(mine, other, **PARITY, check_dtype=False)
            for start in (0, 3):
                expected = original.apply_rotary_emb(other, x, start_index=start)
                torch.testing.assert_close(apply_rotary_emb(mine, x, start_index=start), expected, **PARITY)

    def test_axial_of_a_video(self) -> None:
        """Their fp32 angles are off by some 3e-5 at 402 rad; ours are the formula's."""
        ours, theirs = both(16, freqs_for="pixel", max_freq=256)
        mine, other = ours.get_axial_freqs(8, 6, 4), theirs.get_axial_freqs(8, 6, 4)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, check_dtype=False)
        steps = np.float32(np.linspace(1, 128, 8) * np.pi).astype(np.float64)
        expected = np.linspace(-1, 1, 6)[:, None] * steps
        np.testing.assert_allclose(mine[3, :, 2, 16:32:2], expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("freqs_shape", "shape", "options"),
        [
            ((9, 6), (2, 3, 9, 8), {}),
            ((9, 6), (2, 3, 4, 8), {}),  # the last four rows
            ((9, 6), (4, 8), {"start_index": 1}),
            ((9, 6), (5, 4, 8), {"scale": 0.3}),
            ((9, 1, 6), (4, 5, 8), {"seq_dim": -3, "start_index": 2}),
            ((2, 1, 9, 6), (2, 3, 9, 8), {}),
            ((2, 1, 9, 6), (2, 3, 4, 8), {"freqs_seq_dim": 2}),
            ((1, 6), (2, 3, 4, 8), {}),
            ((1, 6), (1, 9), {"start_index": 3}),  # a view at an odd place
        ],
    )
    def test_apply_rotary_emb(
        self, freqs_shape: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        freqs = (10 * uniform(*freqs_shape[:-1], 3)).repeat_interleave(2, -1)
        x = uniform(*shape, seed=1)
        expected = original.apply_rotary_emb(freqs, x, **options)
        torch.testing.assert_close(apply_rotary_emb(freqs, x, **options), expected, **PARITY)
        torch.testing.assert_close(RotaryEmbedding(DIM).apply_rotary_emb(freqs, x, **options), expected, **PARITY)

    @pytest.mark.parametrize("ranges", [None, torch.tensor([1.0, 2.0, 5.0])])
    def test_learned_rotations(self, ranges: Tensor | None) -> None:
        rotations, x = uniform(7, 2), uniform(3, 7, 16, seed=1)
        expected = original.apply_learned_rotations(rotations, x, start_index=2, freq_ranges=ranges)
        found = apply_learned_rotations(rotations, x, start_index=2, freq_ranges=ranges)
        torch.testing.assert_close(found, expected, **PARITY)

    def test_broadcat(self) -> None:
        tensors = [uniform(3, 1, 2), uniform(1, 4, 2)]
        theirs = original.broadcat if hasattr(original, "broadcat") else original.broadcast
        assert torch.equal(broadcat(tensors), theirs(tensors))
        assert torch.equal(broadcat(tensors, dim=0), theirs(tensors, dim=0))

    @pytest.mark.parametrize("name", ["RotaryEmbedding", "apply_rotary_emb", "apply_learned_rotations", "broadcat"])
    def test_signatures(self, name: str) -> None:
        """Every public name, with the package's parameters in its order with its defaults; ours may have more after."""
        pairs = [(getattr(rope, name), getattr(original, name))]
        if name == "RotaryEmbedding":
            public = [method for method in vars(original.RotaryEmbedding) if not method.startswith("_")]
            assert {"forward", "get_axial_freqs", "rotate_queries_and_keys"} <= set(public)
            pairs += [
                (getattr(RotaryEmbedding, method), getattr(original.RotaryEmbedding, method))
                for method in public
                if callable(getattr(original.RotaryEmbedding, method))
            ]
        for ours, theirs in pairs:
            mine, other = (
                [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
                for function in (ours, theirs)
            )
            assert mine[: len(other)] == other, f"{theirs.__qualname__}"

    @pytest.mark.parametrize("options", [{}, {"use_xpos": True}, {"learned_freq": True}, {"freqs_for": "pixel"}])
    def test_state_dicts_go_both_ways(self, options: dict[str, Any]) -> None:
        ours, theirs = both(**options)
        assert ours.state_dict().keys() == theirs.state_dict().keys() == {"freqs"}
        with torch.no_grad():
            theirs.freqs.mul_(1.25)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.freqs, theirs.freqs)
        with torch.no_grad():
            ours.freqs.mul_(3)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours.freqs, theirs.freqs)

    def test_gradients(self) -> None:
        ours, theirs = both(learned_freq=True)
        theirs.load_state_dict(ours.state_dict())
        x, weight = uniform(2, 7, HEAD_DIM), uniform(2, 7, HEAD_DIM, seed=1)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for module, x_in in ((ours, inputs[0]), (theirs, inputs[1])):
            (module.rotate_queries_or_keys(x_in) * weight).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **PARITY)
        assert ours.freqs.grad is not None
        torch.testing.assert_close(ours.freqs.grad, theirs.freqs.grad, **PARITY)


class TestFormula:
    @pytest.mark.parametrize("offset", [0, 3, 1_000_000])
    def test_against_complex_numbers(self, offset: int) -> None:
        """In thirds of a position, which fp32 has not at a million."""
        freqs, x = 10000.0 ** (-torch.arange(4).double() / 4), uniform(2, 6, 10)
        module = RotaryEmbedding(DIM, custom_freqs=freqs, interpolate_factor=3.0)
        expected = formula(x, (offset + torch.arange(6)) / torch.tensor(3.0, dtype=torch.float64))
        torch.testing.assert_close(
            module.rotate_queries_or_keys(x, offset=offset).double(), expected, rtol=0, atol=3e-7
        )
        found = module.rotate_queries_or_keys(x.double(), offset=offset)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    def test_against_the_rotation_that_serves(self) -> None:
        """A model trained with this module is served by rope.rotation."""
        module, x = RotaryEmbedding(DIM), uniform(6, 3, HEAD_DIM)
        angles = torch.arange(6).double()[:, None] * module.freqs.double()
        expected = rotate(x, table(angles), interleaved=True)
        torch.testing.assert_close(module.rotate_queries_or_keys(x, seq_dim=-3), expected, **ULPS)

    def test_learned_frequencies_pass_gradcheck(self) -> None:
        module = RotaryEmbedding(4, custom_freqs=torch.tensor([1.0, 0.3], dtype=torch.float64), learned_freq=True)
        x = uniform(3, 5, dtype=torch.float64).requires_grad_()

        def rotated(freqs: Tensor, x: Tensor) -> Tensor:
            return torch.func.functional_call(_Rotating(module), {"module.freqs": freqs}, (x,))

        assert torch.autograd.gradcheck(rotated, (module.freqs.detach().clone().requires_grad_(), x))

    def test_learned_frequencies_are_found_by_training(self) -> None:
        module, target = (
            RotaryEmbedding(4, learned_freq=True),
            RotaryEmbedding(4, custom_freqs=torch.tensor([0.9, 0.1])),
        )
        x = uniform(8, 6, 4)
        for _ in range(100):
            error = (module.rotate_queries_or_keys(x) - target.rotate_queries_or_keys(x)).square().mean()
            (gradient,) = torch.autograd.grad(error, [module.freqs])
            with torch.no_grad():
                module.freqs -= 0.1 * gradient
        torch.testing.assert_close(module.freqs, target.freqs, rtol=0, atol=1e-3)

    def test_position_ids(self) -> None:
        module, x = RotaryEmbedding(DIM, interpolate_factor=2.0), uniform(2, 3, 4, HEAD_DIM)
        straight = module.rotate_queries_or_keys(x, offset=7)
        torch.testing.assert_close(module.rotate_queries_or_keys(x, position_ids=torch.arange(7, 11)), straight, **ULPS)
        ids = torch.tensor([[0, 1, 2, 9], [300, 5, 5, 0]])
        rotated = module.rotate_queries_or_keys(x, position_ids=ids)
        for row in range(2):
            expected = formula(x[row], ids[row] / 2)
            torch.testing.assert_close(rotated[row].double(), expected, rtol=0, atol=2e-5)
        before_heads = module.rotate_queries_or_keys(x.transpose(1, 2), seq_dim=1, position_ids=ids)
        torch.testing.assert_close(before_heads.transpose(1, 2), rotated, **ULPS)

    def test_per_sample_gradients(self) -> None:
        """torch.func goes through it: vmap over a gradient is the gradient of each."""
        module, x = RotaryEmbedding(4, learned_freq=True), uniform(3, 5, 4)

        def energy(freqs: Tensor, x: Tensor) -> Tensor:
            return torch.func.functional_call(_Rotating(module), {"module.freqs": freqs}, (x,))[..., 0].square().sum()

        gradient = torch.func.grad(energy)
        found = torch.func.vmap(gradient, in_dims=(None, 0))(module.freqs.detach(), x)
        expected = torch.stack([gradient(module.freqs.detach(), row) for row in x])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("rescale", [1.0, 4.0])
    def test_one_pair(self, rescale: float) -> None:
        """θ_0 is 1 for every base."""
        module, x = RotaryEmbedding(2, theta_rescale_factor=rescale), uniform(5, 3)
        found = module.rotate_queries_or_keys(x).double()
        torch.testing.assert_close(found, formula(x, torch.arange(5), dim=2), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("seq_dim", [-3, 1])
    def test_any_sequence_axis(self, seq_dim: int) -> None:
        module, x = RotaryEmbedding(DIM), uniform(2, 5, 3, HEAD_DIM)
        expected = module.rotate_queries_or_keys(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(module.rotate_queries_or_keys(x, seq_dim=seq_dim), expected, **ULPS)


class TestWhereTheOriginalIsWrong:
    @pytest.mark.parametrize("seq_before_head_dim", [False, True])
    @pytest.mark.parametrize("queries", [1, 5])
    def test_xpos_with_cached_keys(self, queries: int, seq_before_head_dim: bool) -> None:
        """The last rows of the whole, from queries and cached keys alone: scores depend on the distance alone."""
        n = 100
        module = RotaryEmbedding(DIM, use_xpos=True, xpos_scale_base=32, seq_before_head_dim=seq_before_head_dim)
        q, k = uniform(2, n, DIM), uniform(2, n, DIM, seed=1)

        def layout(x: Tensor) -> Tensor:
            return x.transpose(0, 1) if seq_before_head_dim else x

        whole = [layout(x) for x in module.rotate_queries_and_keys(layout(q), layout(k))]
        cached = [layout(x) for x in module.rotate_queries_with_cached_keys(layout(q[:, -queries:]), layout(k))]
        causal = torch.ones(n, n).tril().bool()[-queries:]
        expected = scores(*whole)[:, -queries:].where(causal, 0)
        torch.testing.assert_close(scores(*cached).where(causal, 0), expected, rtol=1e-6, atol=1e-6)
        relative = scores(
            formula(q[:, -queries:], torch.arange(n - queries, n), log_scale=1 / 32),
            formula(k, torch.arange(n), log_scale=-1 / 32),
        )
        torch.testing.assert_close(expected, relative.where(causal, 0), rtol=1e-5, atol=2e-6)

    def test_the_originals_scores_shrink_with_the_cache(self) -> None:
        """By ζ^(n/1024) a pair: a query and its own key, at the end of 1024."""
        ours, theirs = both(4, use_xpos=True)
        q = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        k = q.expand(1024, 4)
        alone = scores(q, q).item()
        wrong = scores(*theirs.rotate_queries_with_cached_keys(q, k))[0, -1].item()
        assert wrong == pytest.approx(alone * (0.4 / 1.4) ** (1024 / 1024), rel=5e-3)
        assert scores(*ours.rotate_queries_with_cached_keys(q, k))[0, -1].item() == pytest.approx(alone, rel=1e-6)

    def test_xpos_at_a_million_tokens(self) -> None:
        n = 1_000_000
        ours, theirs = both(4, use_xpos=True, cache_max_seq_len=16)
        q, k = uniform(3, 4), uniform(n, 4, seed=1)
        rotated_q, rotated_k = ours.rotate_queries_with_cached_keys(q, k)
        assert rotated_q.isfinite().all()
        assert rotated_k.isfinite().all()
        near = 3000
        relative = scores(
            formula(q, torch.arange(-3, 0), dim=4, log_scale=1 / 512),
            formula(k[-near:], torch.arange(-near, 0), dim=4, log_scale=-1 / 512),
        )
        # Frequencies are fp32: a millionth position is 1e6·0.01·2⁻²⁵ rad from the formula's, its distances are not.
        torch.testing.assert_close(scores(rotated_q, rotated_k[-near:]), relative, rtol=0, atol=5e-6)
        assert scores(rotated_q, rotated_k[:-100_000]).abs().max() < 1e-12, "far keys decay"
        assert not scores(*theirs.rotate_queries_with_cached_keys(q, k)).isfinite().all()

    def test_xpos_of_more_queries_than_fp32_can_scale_is_refused(self) -> None:
        module = RotaryEmbedding(4, use_xpos=True, cache_max_seq_len=16)
        most = 36_260
        x = uniform(most, 4)
        q, k = module.rotate_queries_and_keys(x, x)
        torch.testing.assert_close((q * k).sum(-1), (x * x).sum(-1), rtol=1e-4, atol=1e-6)
        for call in (module.rotate_queries_and_keys, module.rotate_queries_with_cached_keys):
            with pytest.raises(ValueError, match=r"up to 18130 positions .* torch.float32; got 18500. Rotate fewer"):
                call(uniform(37_000, 4), uniform(37_000, 4))
        with pytest.raises(ValueError, match=r"up to 2266 positions .* torch.float16"):
            module.rotate_queries_and_keys(x[:5000].half(), x[:5000].half())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_positions(self, dtype: torch.dtype) -> None:
        """At the end of 3000 tokens: ours is the formula rounded once; the original has rounded the positions."""
        ours, theirs = both()
        x = uniform(3000, DIM).to(dtype)
        expected = formula(x, torch.arange(3000))[-500:]
        bound = 0.53 * torch.finfo(dtype).eps  # half a unit in the last place of numbers below 2
        found = ours.rotate_queries_or_keys(x)
        assert found.dtype == dtype
        assert (found[-500:].double() - expected).abs().max() <= bound
        assert torch.equal(apply_rotary_emb(ours(torch.arange(3000)), x), found)
        wrong = (theirs.rotate_queries_or_keys(x)[-500:].double() - expected).abs().max()
        assert wrong > 0.5

    def test_a_low_precision_call_leaves_later_ones_alone(self) -> None:
        ours, theirs = both()
        x = uniform(400, DIM)
        expected = formula(x, torch.arange(400))
        for module in (ours, theirs):
            module.rotate_queries_or_keys(x.bfloat16())
        torch.testing.assert_close(ours.rotate_queries_or_keys(x).double(), expected, rtol=0, atol=5e-5)
        assert (theirs.rotate_queries_or_keys(x).double() - expected).abs().max() > 0.5

    def test_a_module_in_low_precision(self) -> None:
        ours, theirs = both()
        x = uniform(400, DIM)
        expected = formula(x, torch.arange(400))
        torch.testing.assert_close(ours.bfloat16().rotate_queries_or_keys(x).double(), expected, rtol=0, atol=5e-5)
        assert (theirs.bfloat16().rotate_queries_or_keys(x).double() - expected).abs().max() > 0.1

    def test_axial_offsets_of_token_positions(self) -> None:
        ours, theirs = both(4)
        found, wrong = (module.get_axial_freqs(3, 3, offsets=(1, 20)) for module in (ours, theirs))
        assert found[2, 2, [0, 4]].tolist() == [3.0, 22.0]
        assert wrong[2, 2, [0, 4]].tolist() == [3.0, 3.0], "the second axis has the first one's offset"
        x = uniform(3, 4)
        torch.testing.assert_close(
            ours.rotate_queries_or_keys(x).double(), formula(x, torch.arange(3), dim=4), rtol=0, atol=1e-6
        )
        assert (theirs.rotate_queries_or_keys(x).double() - formula(x, torch.arange(3), dim=4)).abs().max() > 0.1

    def test_frequencies_loaded_after_a_call(self) -> None:
        ours, theirs = both()
        x, state = uniform(9, DIM), {"freqs": torch.tensor([0.5, 0.2, 0.1, 0.05])}
        expected = original.RotaryEmbedding(DIM, custom_freqs=state["freqs"]).rotate_queries_or_keys(x)
        for module in (ours, theirs):
            module.rotate_queries_or_keys(x)
            module.load_state_dict(state)
        torch.testing.assert_close(ours.rotate_queries_or_keys(x), expected, **PARITY)
        assert (theirs.rotate_queries_or_keys(x) - expected).abs().max() > 0.1

    @pytest.mark.parametrize(
        "options", [{"freqs_for": "constant"}, {"custom_freqs": torch.tensor([1.0, 0.1])}], ids=["constant", "custom"]
    )
    def test_a_number_of_frequencies_of_its_own(self, options: dict[str, Any]) -> None:
        ours, theirs = both(**options)
        x = uniform(5, DIM)
        expected = original.RotaryEmbedding(DIM, **options, cache_if_possible=False).rotate_queries_or_keys(x)
        torch.testing.assert_close(ours.rotate_queries_or_keys(x), expected, **PARITY)
        with pytest.raises(RuntimeError):
            theirs.rotate_queries_or_keys(x)


class TestKeptTable:
    def test_it_changes_nothing(self) -> None:
        kept, plain = RotaryEmbedding(DIM, cache_max_seq_len=50), RotaryEmbedding(DIM, cache_if_possible=False)
        for length, offset in ((5, 0), (3, 4), (20, 10), (50, 0), (2, 48), (10, 45), (60, 0), (4, 0)):
            x = uniform(length, DIM, seed=length)
            found = kept.rotate_queries_or_keys(x, offset=offset)
            assert torch.equal(found, plain.rotate_queries_or_keys(x, offset=offset)), (length, offset)
        assert torch.equal(kept.rotate_queries_or_keys(x, offset=-4), plain.rotate_queries_or_keys(x, offset=-4))

    def test_it_follows_the_frequencies(self) -> None:
        module, x = RotaryEmbedding(DIM), uniform(5, DIM)
        before = module.rotate_queries_or_keys(x)
        swapped = torch.func.functional_call(_Rotating(module), {"module.freqs": module.freqs * 2}, (x,))
        with torch.no_grad():
            module.freqs.mul_(2)
        twin = copy.deepcopy(module)
        doubled = RotaryEmbedding(DIM, custom_freqs=module.freqs, cache_if_possible=False).rotate_queries_or_keys(x)
        assert not torch.equal(before, doubled)
        assert torch.equal(swapped, doubled)
        assert torch.equal(module.rotate_queries_or_keys(x), doubled)
        assert torch.equal(twin.rotate_queries_or_keys(x), doubled)
        other = torch.func.functional_call(_Rotating(module), {"module.freqs": module.freqs / 2}, (x,))
        assert torch.equal(other, before)

    def test_training_after_inference_mode(self) -> None:
        module, x = RotaryEmbedding(DIM), uniform(5, DIM)
        with torch.inference_mode():
            expected = module.rotate_queries_or_keys(x)
        rotated = module.rotate_queries_or_keys(x.clone().requires_grad_())
        rotated.sum().backward()
        assert torch.equal(rotated, expected)

    def test_autocast_leaves_the_angles_alone(self) -> None:
        module, x = RotaryEmbedding(DIM, learned_freq=True), uniform(300, DIM)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rotated = module.rotate_queries_or_keys(x)
        assert torch.equal(rotated, module.rotate_queries_or_keys(x))


class _Rotating(torch.nn.Module):
    def __init__(self, module: RotaryEmbedding) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.rotate_queries_or_keys(x)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"interpolate_factor": 0.5}, "at least 1; got 0.5"),
            ({"dim": 7}, "even and at least 2; got 7"),
            ({"freqs_for": "words"}, "lang, pixel or constant; got 'words'"),
            ({"custom_freqs": torch.ones(2, 2)}, r"one vector.*\(2, 2\)"),
            ({"custom_freqs": torch.ones(3), "use_xpos": True}, "each pair of dim 8; got 3"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RotaryEmbedding(**{"dim": DIM, **options})

    def test_calls(self) -> None:
        plain, xpos, x = RotaryEmbedding(DIM), RotaryEmbedding(DIM, use_xpos=True), uniform(2, 5, DIM)
        with pytest.raises(ValueError, match="use rotate_queries_and_keys or"):
            xpos.rotate_queries_or_keys(x)
        with pytest.raises(ValueError, match="use_xpos is False: use rotate_queries_or_keys"):
            plain.rotate_queries_and_keys(x, x)
        with pytest.raises(ValueError, match="use_xpos is False"):
            plain.get_scale(torch.arange(4))
        with pytest.raises(ValueError, match="got 5 queries and 4 keys"):
            plain.rotate_queries_with_cached_keys(x, x[:, :4])
        with pytest.raises(ValueError, match="got 5 queries and 4 keys"):
            xpos.rotate_queries_and_keys(x, x[:, :4])
        with pytest.raises(ValueError, match=r"8 dims .* from dim 0 on, but the tensor's last axis has 7"):
            plain.rotate_queries_or_keys(x[..., :7])
        with pytest.raises(ValueError, match=r"8 dims .* from dim 3 on, but the tensor's last axis has 8"):
            apply_rotary_emb(plain(torch.arange(5)), x, start_index=3)
        with pytest.raises(ValueError, match=r"are \[5\], or \[2, 5\]; got \[4\]"):
            plain.rotate_queries_or_keys(x, position_ids=torch.arange(4))
        with pytest.raises(ValueError, match="got 1 for 2 axes"):
            plain.get_axial_freqs(2, 3, offsets=(1,))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, prerope.rope.spec; from prerope import rope; assert 'torch' not in sys.modules; rope.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().endswith("AttributeError: module 'prerope.rope' has no attribute 'nothing'")


def test_xpos_reach_is_the_fastest_pairs() -> None:
    decay = RotaryEmbedding(DIM, use_xpos=True, xpos_scale_base=1).xpos_decay
    assert decay[0].item() == pytest.approx(-math.log(3.5))
    assert decay.argmin() == 0
