"""Methods that change frequencies: every key at its exact distance, on a θ of the method's own.

Formulas live in `rope.frequencies`; here is which parameters they take, from the spec or from the model's config.
"""

from __future__ import annotations

from typing import Any

from prerope.rope import frequencies as freq
from prerope.rope.reading import MethodError, Reading, Rule, bucketed, plain_reading, switched
from prerope.rope.registry import Target, method
from torch import Tensor

XPOS_SCALE_BASE = 512
"""Tokens over which a pair fades by its ζ once, as in the paper."""


def _static(parameters: dict[str, Any], theta: Tensor, attention_factor: float = 1.0) -> Rule:
    reading = plain_reading(theta, attention_factor)
    return Rule(parameters, lambda _run: reading)


@method(
    "rope",
    source="Su 2021, arXiv 2104.09864",
    use="Within the trained length. Past it the loss explodes.",
)
def _rope(t: Target) -> Rule:
    """θ as trained."""
    return _static({}, freq.plain(t.rotary.dim, t.rotary.base))


@method(
    "linear",
    source="Chen 2023, arXiv 2306.15595",
    use="Models that were fine-tuned with this factor. Without that it blurs neighbours: yarn or dynamic_leaky do not.",
    takes=("factor",),
)
def _linear(t: Target) -> Rule:
    """θ/s: position interpolation."""
    return _static({"factor": t.scale}, freq.linear(t.rotary.dim, t.rotary.base, t.scale))


@method(
    "dynamic_linear",
    source="emozilla 2023",
    use="As linear, and untouched inside the trained length.",
)
def _dynamic_linear(t: Target) -> Rule:
    """θ·L/n."""
    d, b, trained = t.rotary.dim, t.rotary.base, t.train_length
    return Rule({}, lambda n: plain_reading(freq.linear(d, b, n / trained)), bucketed(trained))


@method(
    "ntk",
    source="bloc97 2023",
    use="A static, cheap extension by 2 to 4 without fine-tuning. Choose a factor above the extension that you need.",
    takes=("factor",),
)
def _ntk(t: Target) -> Rule:
    """Base b·s^(D/(D−2))."""
    return _static({"factor": t.scale}, freq.ntk(t.rotary.dim, t.rotary.base, t.scale))


@method(
    "ntk_fixed",
    source="Su 2023, spaces.ac.cn 9706",
    use="As ntk, with the factor spread so that the slowest pair is interpolated exactly by it.",
    takes=("factor",),
)
def _ntk_fixed(t: Target) -> Rule:
    """(b·s)^(−2m/D) / s^(2/D)."""
    return _static({"factor": t.scale}, freq.ntk_fixed(t.rotary.dim, t.rotary.base, t.scale))


@method(
    "ntk_mixed",
    source="Su 2023, spaces.ac.cn 9706",
    use="As ntk_fixed, with less change to fast pairs; the best of the three in Su's tables.",
    takes=("factor",),
)
def _ntk_mixed(t: Target) -> Rule:
    """θ_m·exp(−a(m+1)^0.625), a = ln s/(D/2)^0.625."""
    return _static({"factor": t.scale, "beta": 0.625}, freq.ntk_mixed(t.rotary.dim, t.rotary.base, t.scale, 0.625))


@method(
    "dynamic_ntk",
    source="emozilla 2023",
    use="As ntk, and untouched inside the trained length; what transformers calls dynamic, made row-consistent.",
    takes=("factor",),
)
def _dynamic_ntk(t: Target) -> Rule:
    """Base b·(f·n/L − (f−1))^(D/(D−2))."""
    d, b, trained = t.rotary.dim, t.rotary.base, t.train_length
    factor = float(t.option("factor", t.spec.factor or 2.0))

    def reading(n: int) -> Reading:
        return plain_reading(freq.dynamic_ntk(d, b, factor, n, trained))

    return Rule({"factor": factor}, reading, bucketed(trained))


@method(
    "ntk_by_parts",
    source="bloc97 2023; Peng 2023, arXiv 2309.00071, §3.2",
    use="To see what YaRN's attention factor adds; a model that was fine-tuned so.",
    takes=("factor",),
)
def _ntk_by_parts(t: Target) -> Rule:
    """YaRN's frequencies without its attention factor."""
    ramp = _yarn_ramp(t)
    theta = freq.yarn(t.rotary.dim, t.rotary.base, t.scale, t.train_length, **ramp)
    return _static({"factor": t.scale} | ramp, theta)


@method(
    "yarn",
    source="Peng 2023, arXiv 2309.00071",
    use="The best static frequencies without fine-tuning, and models that were fine-tuned with it.",
    takes=("factor",),
)
def _yarn(t: Target) -> Rule:
    """θ/s for slow pairs, θ for fast ones, a ramp between; attention factor 0.1·ln s + 1."""
    scale = float(t.option("factor", t.scale))
    ramp = _yarn_ramp(t)
    attention = t.option("attention_factor", None)
    if attention is None:
        mscale, all_dim = t.option("mscale", None), t.option("mscale_all_dim", None)
        attention = freq.yarn_attention_factor(scale, mscale if mscale and all_dim else 1.0)
        if mscale and all_dim:
            attention /= freq.yarn_attention_factor(scale, all_dim)
    theta = freq.yarn(t.rotary.dim, t.rotary.base, scale, t.train_length, **ramp)
    return _static({"factor": scale, "attention_factor": float(attention)} | ramp, theta, float(attention))


@method(
    "dynamic_yarn",
    source="Peng 2023, arXiv 2309.00071",
    use="YaRN that leaves prompts inside the trained length untouched.",
)
def _dynamic_yarn(t: Target) -> Rule:
    """YaRN with s = n/L: only as much as the row needs."""
    d, b, trained, ramp = t.rotary.dim, t.rotary.base, t.train_length, _yarn_ramp(t)

    def reading(n: int) -> Reading:
        s = n / trained
        return plain_reading(freq.yarn(d, b, s, trained, **ramp), freq.yarn_attention_factor(s))

    return Rule(dict(ramp), reading, bucketed(trained))


def _yarn_ramp(t: Target) -> dict[str, Any]:
    return {
        "beta_fast": float(t.option("beta_fast", None) or 32.0),
        "beta_slow": float(t.option("beta_slow", None) or 1.0),
        "truncate": bool(t.option("truncate", True)),
    }


@method(
    "longrope",
    source="Ding 2024, arXiv 2402.13753",
    use="Models that come with its factors (Phi-3, Phi-4-mini): use model.",
)
def _longrope(t: Target) -> Rule:
    """1/(ext_m·b^(2m/D)), the long factors iff the row length exceeds L; attention factor √(1 + ln s/ln L), unless the
    config has one for either (Phi-3.5-MoE's `short_mscale`, `long_mscale`)."""
    d, b, trained, config = t.rotary.dim, t.rotary.base, t.train_length, t.rotary.parameters
    if not config.get("long_factor") or not config.get("short_factor"):
        raise MethodError(
            "longrope needs long_factor and short_factor in the model config's rope_parameters, and this model has "
            "none; choose a method without trained factors, e.g. yarn or dynamic_leaky"
        )
    scale = float(config.get("factor") or t.rotary.max_length / trained)
    attention = float(config.get("attention_factor") or freq.longrope_attention_factor(scale, trained))
    short, long = (
        plain_reading(freq.longrope(d, b, config[f"{kind}_factor"]), float(config.get(f"{kind}_mscale") or attention))
        for kind in ("short", "long")
    )
    parameters = {"factor": scale, "attention_factor": attention}
    return Rule(parameters, lambda run: long if run > trained else short, switched(trained))


@method(
    "llama3",
    source="Llama 3.1, Meta 2024",
    use="Models that come with it (Llama 3.1 and later): use model.",
    takes=("factor",),
)
def _llama3(t: Target) -> Rule:
    """θ for fast pairs, θ/s for slow ones, blended between by turns in L."""
    trained_so = t.rotary.rope_type == "llama3"
    config = t.rotary.parameters if trained_so else {}
    scale = float(t.option("factor", t.spec.factor or config.get("factor") or t.scale))
    low, high = float(config.get("low_freq_factor", 1.0)), float(config.get("high_freq_factor", 4.0))
    theta = freq.llama3(t.rotary.dim, t.rotary.base, scale, t.train_length, low_freq_factor=low, high_freq_factor=high)
    return _static({"factor": scale, "low_freq_factor": low, "high_freq_factor": high}, theta)


@method(
    "proportional",
    source="Gemma 4, Google 2026",
    use="Models that come with it (Gemma 4): use model.",
)
def _proportional(t: Target) -> Rule:
    """The first pairs of a whole-head rotation; the tail has frequency zero."""
    if t.rotary.rope_type != "proportional":
        raise MethodError(
            f"proportional is a property of the trained model (rope_type is {t.rotary.rope_type!r} here): use model"
        )
    proportion = float(t.rotary.parameters.get("partial_rotary_factor", 1.0))
    scale = float(t.rotary.parameters.get("factor", 1.0))
    theta = freq.proportional(t.rotary.head_dim, t.rotary.base, proportion, scale)
    return _static({"factor": scale, "partial_rotary_factor": proportion}, theta)


@method(
    "xpos",
    source="Sun 2022, arXiv 2212.10554",
    use="Models that were trained with xPos. On others it only makes far keys fade.",
)
def _xpos(t: Target) -> Rule:
    """θ as trained, and pair m fades by ((2m + 0.4D)/(1.4D))^(d/512): for models trained with it."""
    theta = freq.plain(t.rotary.dim, t.rotary.base)
    reading = plain_reading(theta, decay=freq.xpos_decay(t.rotary.dim, XPOS_SCALE_BASE))
    return Rule({"scale_base": XPOS_SCALE_BASE}, lambda _run: reading)
