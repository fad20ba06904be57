"""Inverse frequencies θ [D/2], in fp64 radians a token, and attention factors, one function a published formula.

Notation as in the papers: D rotary dim, m = 0…D/2−1, b base, L trained length, s scale = target length / L.
`Rotary` is what a model's config says about one group of layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from prerope.rope.spec import RopeSpec
from torch import Tensor

UNROTATED = "unrotated"
"""The rope_type of a model without rotary embedding, whose positions are learned, or none."""

ALIBI = "alibi"
"""The rope_type of a model without rotary embedding whose scores fall with the distance: its positions do not end."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary embedding of one group of layers, as the model was trained.

    Attributes:
        head_dim: dims of a head; the leading `dim` of them rotate.
        dim: D.
        base: b, `rope_theta` in configs.
        rope_type: the config's method: default, linear, dynamic, yarn, longrope, llama3 or proportional; or
            `UNROTATED` or `ALIBI`.
        parameters: the config's `rope_parameters`, whole.
        train_length: L: `original_max_position_embeddings` where the config has one, else `max_position_embeddings`.
        max_length: how far the config's own method is meant to reach, see `_reach`.
        interleaved: pairs are (2m, 2m+1) rather than (m, m + D/2).
        dual_chunk: the config's `dual_chunk_attention_config`, of a model tuned to read in chunks (Qwen2.5-1M).
        layers: which layers of a group these are, where `auto` is a method of its own for them; "" otherwise.
        auto: that method.
    """

    head_dim: int
    dim: int
    base: float
    rope_type: str
    train_length: int
    max_length: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    dual_chunk: Mapping[str, Any] | None = None
    layers: str = ""
    auto: RopeSpec | None = None

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, *, interleaved: bool = False, head_dim: int | None = None
    ) -> Rotary:
        """Read a transformers config (or anything with its attributes).

        layer_type: the key of this group where `rope_parameters` holds one dict a layer type (Gemma 3).
        head_dim: where it is known; a config with one a layer (Gemma 4) does not say it.
        Raises KeyError or AttributeError where the config has no rotary parameters.
        """
        parameters: Mapping[str, Any] = config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        head_dim = head_dim or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope_type = parameters.get("rope_type", "default")
        partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        # Proportional RoPE spans the whole head and leaves the tail at frequency zero.
        dim = head_dim if rope_type == "proportional" else int(head_dim * partial)
        max_length = int(config.max_position_embeddings)
        original = parameters.get("original_max_position_embeddings")
        return cls(
            head_dim=head_dim,
            dim=dim,
            base=float(parameters["rope_theta"]),
            rope_type=rope_type,
            train_length=int(original or max_length),
            max_length=_reach(config, parameters, rope_type),
            parameters=dict(parameters),
            interleaved=interleaved,
            dual_chunk=getattr(config, "dual_chunk_attention_config", None) or None,
        )


def unrotated(head_dim: int, length: int, kind: str = UNROTATED) -> Rotary:
    """The `Rotary` of a model without rotation, trained at this length, where positions end unless it is `ALIBI`."""
    return Rotary(head_dim, 0, 1.0, kind, length, length)


def _reach(config: Any, parameters: Mapping[str, Any], rope_type: str) -> int:
    """The longest context, in tokens, that the config claims for its own method.

    `max_position_embeddings` at least. A factor stretches what the positions were before it, so yarn, longrope and
    dynamic reach factor × original: Qwen's recipe adds a factor of 4 and leaves the rest of the config as it was.
    llama3's factor is no ratio of lengths. linear's is one only where the config names the original, since without it
    configs mean both: DeepSeek-Coder's 16,384 holds the factor, Vicuna-16k's 4096 does not, and says 16,384 elsewhere.
    """
    reach = int(config.max_position_embeddings)
    for name in ("max_sequence_length", "model_max_length"):  # Vicuna and LongChat; Command R
        declared = getattr(config, name, None)
        reach = max(reach, declared if isinstance(declared, int) else 0)
    original, factor = parameters.get("original_max_position_embeddings"), parameters.get("factor")
    if rope_type in ("yarn", "longrope", "dynamic"):
        original = original or config.max_position_embeddings
    if original and factor and rope_type != "llama3":
        reach = max(reach, int(original * factor))
    return reach


def pairs(dim: int) -> Tensor:
    """m = 0…D/2−1, fp64."""
    return torch.arange(dim // 2, dtype=torch.float64)


def plain(dim: int, base: float) -> Tensor:
    """θ_m = b^(−2m/D) (Su 2021, arXiv 2104.09864)."""
    theta: Tensor = base ** (-2.0 * pairs(dim) / dim)
    return theta


def linear(dim: int, base: float, scale: float) -> Tensor:
    """θ/s: position interpolation (Chen 2023, arXiv 2306.15595)."""
    return plain(dim, base) / scale


def ntk(dim: int, base: float, scale: float) -> Tensor:
    """Base b·s^(D/(D−2)): the last pair is interpolated by s, the first not at all (bloc97 2023)."""
    return plain(dim, base * scale ** (dim / (dim - 2)))


def ntk_fixed(dim: int, base: float, scale: float) -> Tensor:
    """(b·s)^(−2m/D) / s^(2/D) (Su, spaces.ac.cn 9706)."""
    return plain(dim, base * scale) / math.pow(scale, 2.0 / dim)


def ntk_mixed(dim: int, base: float, scale: float, beta: float = 0.625) -> Tensor:
    """θ_m·exp(−a(m+1)^β), a = ln s/(D/2)^β (Su 9706): β = 1 is ntk_fixed, β = 0 is linear."""
    a = math.log(scale) / (dim / 2) ** beta
    return plain(dim, base) * torch.exp(-a * (pairs(dim) + 1) ** beta)


def dynamic_ntk(dim: int, base: float, factor: float, length: int, train_length: int) -> Tensor:
    """Base b·(f·n/L − (f−1))^(D/(D−2)) with n = max(length, L) (emozilla 2023; transformers' `dynamic`)."""
    n = max(length, train_length)
    # f·n/L − (f−1), written so that n = L gives exactly 1: rows inside the trained length are rope's, bit for bit.
    return plain(dim, base * (1 + factor * (n / train_length - 1)) ** (dim / (dim - 2)))


def yarn(
    dim: int,
    base: float,
    scale: float,
    train_length: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """θ/s·(1−γ) + θ·γ, γ a ramp over the pairs between β_fast and β_slow turns in L (Peng 2023, arXiv 2309.00071)."""

    def pair_with(turns: float) -> float:
        return dim * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the reference code: a step instead of a division by zero
    keep = 1 - ((pairs(dim) - low) / (high - low)).clamp(0, 1)
    theta = plain(dim, base)
    return torch.lerp(theta / scale, theta, keep)  # exactly θ where s = 1


def yarn_attention_factor(scale: float, mscale: float = 1.0) -> float:
    """0.1·mscale·ln s + 1, on q and on k; 1 where s ≤ 1 (Peng 2023, eq. 22)."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def longrope(dim: int, base: float, extension: Sequence[float]) -> Tensor:
    """1/(ext_m·b^(2m/D)), ext the short or the long factors (Ding 2024, arXiv 2402.13753)."""
    return plain(dim, base) / torch.tensor(list(extension), dtype=torch.float64)


def longrope_attention_factor(scale: float, train_length: int) -> float:
    """√(1 + ln s / ln L); 1 where s ≤ 1."""
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(train_length))


def xpos_decay(dim: int, scale_base: float) -> Tensor:
    """ln ζ_m / scale_base a token, ζ_m = (2m + 0.4D)/(1.4D) (Sun 2022, arXiv 2212.10554): [D/2] ≤ 0."""
    return ((2 * pairs(dim) + 0.4 * dim) / (1.4 * dim)).log() / scale_base


def llama3(
    dim: int,
    base: float,
    scale: float,
    train_length: int,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Tensor:
    """θ where a pair turns over `high_freq_factor` times in L, θ/s where under `low_freq_factor`, blended between."""
    theta = plain(dim, base)
    turns = train_length * theta / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return theta / scale * (1 - keep) + theta * keep


def proportional(head_dim: int, base: float, proportion: float, scale: float = 1.0) -> Tensor:
    """The first int(p·head_dim/2) pairs at b^(−2m/head_dim)/s, the rest at zero: [head_dim/2] (Gemma 4)."""
    theta = plain(head_dim, base) / scale
    theta[int(proportion * head_dim // 2) :] = 0.0
    return theta
