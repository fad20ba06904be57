"""Position methods: the registry, and the way from a `RopeSpec` and a model to a `PositionMethod`.

A method resolves to a `Rule`, which gives the `Reading` of each row length (`rope.reading` says what that means). A new
method is one function with `@method(...)` below and a test. It touches no scheduler and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rope import frequencies as freq
from rope.frequencies import Rotary
from rope.reading import MethodError, PositionMethod, Reading, Rule
from rope.spec import ALIASES, METHOD_NAMES, RopeSpec

DEFAULT_EXTENSION = 4.0
"""Target length ÷ trained length where neither ROPE_FACTOR nor MAX_MODEL_LEN says otherwise."""

MAX_GROUP = 65536

WINDOWED = ("rerope", "leaky_rerope", "self_extend", "dynamic_leaky")

# --- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """What a method's function is given: the model's embedding, the spec, and the lengths they resolve to.

    `scale` is s: ROPE_FACTOR, else the target length ÷ L.
    """

    rotary: Rotary
    spec: RopeSpec
    train_length: int
    scale: float
    from_config: bool

    def option(self, name: str, default: Any) -> Any:
        """A method parameter that only a model's config can set."""
        value = self.rotary.parameters.get(name) if self.from_config else None
        return default if value is None else value


MethodFunction = Callable[[Target], Rule]


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One line of the registry: what the method is, where it comes from, which `RopeSpec` fields it reads."""

    name: str
    resolve: MethodFunction
    summary: str
    source: str
    takes: tuple[str, ...] = ()


METHODS: dict[str, MethodEntry] = {}


def method(name: str, *, source: str, takes: tuple[str, ...] = ()) -> Callable[[MethodFunction], MethodFunction]:
    """Enter a method under `name`; its docstring is its summary."""

    def enter(function: MethodFunction) -> MethodFunction:
        METHODS[name] = MethodEntry(name, function, (function.__doc__ or "").strip(), source, takes)
        return function

    return enter


def _static(parameters: dict[str, Any], theta: Tensor, attention_factor: float = 1.0) -> Rule:
    reading = Reading(theta, attention_factor)
    return Rule(parameters, lambda _length: reading)


@method("rope", source="Su 2021, arXiv 2104.09864")
def _rope(t: Target) -> Rule:
    """θ as trained."""
    return _static({}, freq.plain(t.rotary.dim, t.rotary.base))


@method("linear", source="Chen 2023, arXiv 2306.15595", takes=("factor",))
def _linear(t: Target) -> Rule:
    """θ/s: position interpolation."""
    return _static({"factor": t.scale}, freq.linear(t.rotary.dim, t.rotary.base, t.scale))


@method("dynamic_linear", source="emozilla 2023")
def _dynamic_linear(t: Target) -> Rule:
    """θ·L/n."""
    d, b, trained = t.rotary.dim, t.rotary.base, t.train_length
    return Rule({}, lambda n: Reading(freq.linear(d, b, n / trained)), "bucketed")


@method("ntk", source="bloc97 2023", takes=("factor",))
def _ntk(t: Target) -> Rule:
    """Base b·s^(D/(D−2))."""
    return _static({"factor": t.scale}, freq.ntk(t.rotary.dim, t.rotary.base, t.scale))


@method("ntk_fixed", source="Su 2023, spaces.ac.cn 9706", takes=("factor",))
def _ntk_fixed(t: Target) -> Rule:
    """(b·s)^(−2m/D) / s^(2/D)."""
    return _static({"factor": t.scale}, freq.ntk_fixed(t.rotary.dim, t.rotary.base, t.scale))


@method("ntk_mixed", source="Su 2023, spaces.ac.cn 9706", takes=("factor",))
def _ntk_mixed(t: Target) -> Rule:
    """θ_m·exp(−a(m+1)^0.625), a = ln s/(D/2)^0.625."""
    return _static({"factor": t.scale, "beta": 0.625}, freq.ntk_mixed(t.rotary.dim, t.rotary.base, t.scale, 0.625))


@method("dynamic_ntk", source="emozilla 2023", takes=("factor",))
def _dynamic_ntk(t: Target) -> Rule:
    """Base b·(f·n/L − (f−1))^(D/(D−2))."""
    d, b, trained = t.rotary.dim, t.rotary.base, t.train_length
    factor = float(t.option("factor", t.spec.factor or 2.0))
    return Rule({"factor": factor}, lambda n: Reading(freq.dynamic_ntk(d, b, factor, n, trained)), "bucketed")


@method("yarn", source="Peng 2023, arXiv 2309.00071", takes=("factor",))
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


@method("dynamic_yarn", source="Peng 2023, arXiv 2309.00071")
def _dynamic_yarn(t: Target) -> Rule:
    """YaRN with s = n/L: only as much as the row needs."""
    d, b, trained, ramp = t.rotary.dim, t.rotary.base, t.train_length, _yarn_ramp(t)

    def reading(n: int) -> Reading:
        s = n / trained
        return Reading(freq.yarn(d, b, s, trained, **ramp), freq.yarn_attention_factor(s))

    return Rule(dict(ramp), reading, "bucketed")


def _yarn_ramp(t: Target) -> dict[str, Any]:
    return {
        "beta_fast": float(t.option("beta_fast", None) or 32.0),
        "beta_slow": float(t.option("beta_slow", None) or 1.0),
        "truncate": bool(t.option("truncate", True)),
    }


@method("longrope", source="Ding 2024, arXiv 2402.13753")
def _longrope(t: Target) -> Rule:
    """1/(ext_m·b^(2m/D)), the long factors iff the row length exceeds L; attention factor √(1 + ln s/ln L)."""
    d, b, trained, config = t.rotary.dim, t.rotary.base, t.train_length, t.rotary.parameters
    if not config.get("long_factor") or not config.get("short_factor"):
        raise MethodError(
            "longrope needs long_factor and short_factor in the model config's rope_parameters, and this model has "
            "none; choose a method without trained factors, e.g. yarn or dynamic_leaky"
        )
    scale = float(config.get("factor") or t.rotary.max_length / trained)
    attention = float(config.get("attention_factor") or freq.longrope_attention_factor(scale, trained))
    short, long = (Reading(freq.longrope(d, b, config[key]), attention) for key in ("short_factor", "long_factor"))
    return Rule({"factor": scale, "attention_factor": attention}, lambda n: long if n > trained else short, "switch")


@method("llama3", source="Llama 3.1, Meta 2024", takes=("factor",))
def _llama3(t: Target) -> Rule:
    """θ for fast pairs, θ/s for slow ones, blended between by turns in L."""
    trained_so = t.rotary.rope_type == "llama3"
    config = t.rotary.parameters if trained_so else {}
    scale = float(t.option("factor", t.spec.factor or config.get("factor") or t.scale))
    low, high = float(config.get("low_freq_factor", 1.0)), float(config.get("high_freq_factor", 4.0))
    theta = freq.llama3(t.rotary.dim, t.rotary.base, scale, t.train_length, low_freq_factor=low, high_freq_factor=high)
    return _static({"factor": scale, "low_freq_factor": low, "high_freq_factor": high}, theta)


@method("proportional", source="Gemma 4, Google 2026")
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


@method("rerope", source="Su 2023, spaces.ac.cn 9708", takes=("window",))
def _rerope(t: Target) -> Rule:
    """min(d, w): far keys are read raw."""
    own, window = _own_reading(t), _window(t)
    reading = Reading(own.theta, own.attention_factor, window, torch.zeros_like(own.theta))
    return Rule({"window": window}, lambda _n: reading)


@method("leaky_rerope", source="Su 2023, spaces.ac.cn 9708", takes=("window", "leak"))
def _leaky_rerope(t: Target) -> Rule:
    """w + (d−w)/k past the window."""
    own, window = _own_reading(t), _window(t)
    leak = 16.0 if t.spec.leak is None else t.spec.leak
    if not leak >= 1:
        raise MethodError(f"leak (ROPE_LEAK) is {leak}: it must be at least 1, the tokens that share a far position")
    reading = Reading(own.theta, own.attention_factor, window, own.theta / leak)
    return Rule({"window": window, "leak": leak}, lambda _n: reading)


@method("self_extend", source="Jin 2024, arXiv 2401.01325", takes=("window", "group"))
def _self_extend(t: Target) -> Rule:
    """⌊i/G⌋ + w − ⌊w/G⌋ and ⌊j/G⌋ past the window: LongLM's grouped attention."""
    own, window = _own_reading(t), _window(t)
    group = t.spec.group
    if group is None:
        group = _fitting_group(window, t)
    if group < 1:
        raise MethodError(f"group (ROPE_GROUP) is {group}: it must be at least 1, the tokens that share a position")
    parameters = {"window": window, "group": group}
    if group == 1:
        return Rule(parameters, lambda _n: own)
    reading = Reading(own.theta, own.attention_factor, window, own.theta, group)
    return Rule(parameters, lambda _n: reading)


def _fitting_group(window: int, t: Target) -> int:
    """The smallest G that keeps every far distance of the target length inside L."""
    last, trained = int(t.scale * t.train_length) - 1, t.train_length
    for group in range(1, MAX_GROUP + 1):
        if last // group + window - window // group < trained:
            return group
    raise MethodError(
        f"self_extend: no group up to {MAX_GROUP} brings {last + 1} tokens inside the trained length {trained} past a "
        f"window (ROPE_WINDOW) of {window}; use a smaller window or factor (ROPE_FACTOR)"
    )


@method("dynamic_leaky", source="PreRoPE", takes=("window",))
def _dynamic_leaky(t: Target) -> Rule:
    """Leaky ReRoPE with k = max(1, (n−w)/(L−w)): each row's farthest key sits exactly at L."""
    own, window, trained = _own_reading(t), _window(t), t.train_length

    def reading(n: int) -> Reading:
        leak = max(1.0, (n - window) / (trained - window))
        if leak == 1.0:
            return own  # inside the trained length it is rope, and costs what rope costs
        return Reading(own.theta, own.attention_factor, window, own.theta / leak)

    return Rule({"window": window}, reading, "bucketed")


def _own_reading(t: Target) -> Reading:
    """The model's own frequencies, as its config has them, which windowed methods keep."""
    own = METHODS[CONFIG_METHODS[t.rotary.rope_type]].resolve(_config_target(t.rotary, t.train_length))
    if own.row_length != "static":
        raise MethodError(
            f"{t.spec.method} cannot be laid over the model's own {t.rotary.rope_type} frequencies, which depend on "
            "the length; use ROPE_METHOD=model, or a frequency method such as yarn"
        )
    return own.reading(t.train_length)


def _window(t: Target) -> int:
    window = t.train_length // 4 if t.spec.window is None else t.spec.window
    if not 0 < window < t.train_length:
        raise MethodError(
            f"window (ROPE_WINDOW) is {window}: it must be between 1 and {t.train_length - 1}, one less than the "
            f"trained length; {t.train_length // 4} to {t.train_length // 2} reads best"
        )
    return window


# --- from a spec and a model to a method ------------------------------------------------------------------------------

CONFIG_METHODS: dict[str, str] = {
    "default": "rope",
    "linear": "linear",
    "dynamic": "dynamic_ntk",
    "yarn": "yarn",
    "longrope": "longrope",
    "llama3": "llama3",
    "proportional": "proportional",
}
"""A config's rope_type → our name. A type that is not here is refused by name."""


def native_length(rotary: Rotary) -> int:
    """How far the model reads well with the method of its own config: windowed methods and `auto` start there."""
    return rotary.max_length if rotary.rope_type in ("llama3", "yarn", "linear", "longrope") else rotary.train_length


def _config_target(rotary: Rotary, train_length: int | None = None) -> Target:
    scale = float(rotary.parameters.get("factor") or rotary.max_length / rotary.train_length)
    own_length = rotary.train_length if rotary.rope_type != "default" else train_length or rotary.train_length
    return Target(rotary, RopeSpec(method="model"), own_length, scale, from_config=True)


def canonical_name(name: str) -> str:
    """`name` with aliases resolved; MethodError, with the names there are, where it is none."""
    resolved = ALIASES.get(name, name)
    if resolved not in METHOD_NAMES:
        raise MethodError(f"unknown position method {name!r}: choose one of {', '.join(METHOD_NAMES)}")
    return resolved


def resolve(spec: RopeSpec, rotary: Rotary, max_model_len: int | None = None) -> PositionMethod:
    """The method that `spec` means for a model with this `rotary`.

    max_model_len: the target length, for methods that take s = target ÷ L where no factor is given.
    Raises MethodError.
    """
    name = canonical_name(spec.method)
    if rotary.rope_type not in CONFIG_METHODS:
        raise MethodError(
            f"the model's config has rope_type {rotary.rope_type!r}, which is not one of {', '.join(CONFIG_METHODS)}"
        )
    _check_values(spec)
    if name == "auto":
        extendable = CONFIG_METHODS[rotary.rope_type] not in ("longrope", "dynamic_ntk")
        name = "dynamic_leaky" if extendable else "model"
    if name == "model":
        target = _config_target(rotary, spec.train_length)
        own = METHODS[CONFIG_METHODS[rotary.rope_type]]
        return PositionMethod(own.name, rotary, target.train_length, own.resolve(target), spec.logn)
    trained = spec.train_length or (native_length(rotary) if name in WINDOWED else rotary.train_length)
    target = Target(rotary, spec, trained, _scale(spec, trained, max_model_len), from_config=False)
    return PositionMethod(name, rotary, trained, METHODS[name].resolve(target), spec.logn)


def _scale(spec: RopeSpec, train_length: int, max_model_len: int | None) -> float:
    if spec.factor is not None:
        return spec.factor
    return DEFAULT_EXTENSION if max_model_len is None else max(1.0, max_model_len / train_length)


def _check_values(spec: RopeSpec) -> None:
    if spec.factor is not None and not 1 <= spec.factor <= 1e6:
        raise MethodError(f"factor (ROPE_FACTOR) is {spec.factor}: it must be between 1 and 1e6")
    if spec.train_length is not None and spec.train_length < 2:
        raise MethodError(f"train_length (ROPE_TRAIN_LENGTH) is {spec.train_length}: it must be at least 2 tokens")


def method_table() -> tuple[MethodEntry, ...]:
    """Every entry, in the order of `METHOD_NAMES`."""
    return tuple(METHODS[name] for name in METHOD_NAMES if name in METHODS)
