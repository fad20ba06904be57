"""The registry of position methods: what a method's function is given, and how it enters.

A new method is one function with `@method(...)` in `frequency_methods` or `windowed_methods`, its name in `spec`, and a
test. It touches no scheduler and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prerope.rope.frequencies import Rotary
from prerope.rope.reading import Rule
from prerope.rope.spec import RopeSpec


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
    """One line of the registry: what a method is, where it is from, who it is for, which `RopeSpec` fields it reads."""

    name: str
    resolve: MethodFunction
    summary: str
    source: str
    use: str
    takes: tuple[str, ...] = ()

    @property
    def windowed(self) -> bool:
        """Keeps the model's own frequencies and changes positions past a window."""
        return "window" in self.takes


METHODS: dict[str, MethodEntry] = {}


def method(
    name: str, *, source: str, use: str, takes: tuple[str, ...] = ()
) -> Callable[[MethodFunction], MethodFunction]:
    """Enter a method under `name`; its docstring is its summary."""

    def enter(function: MethodFunction) -> MethodFunction:
        METHODS[name] = MethodEntry(name, function, (function.__doc__ or "").strip(), source, use, takes)
        return function

    return enter


# --- the model's own method -------------------------------------------------------------------------------------------

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


def own_target(rotary: Rotary, train_length: int | None = None) -> Target:
    """What the model's config says. train_length: L of a plain RoPE model, which its config cannot be relied on for."""
    scale = float(rotary.parameters.get("factor") or rotary.max_length / rotary.train_length)
    own_length = rotary.train_length if rotary.rope_type != "default" else train_length or rotary.train_length
    return Target(rotary, RopeSpec(method="model"), own_length, scale, from_config=True)


def own_rule(rotary: Rotary, train_length: int | None = None) -> Rule:
    """The rule of the model's own method."""
    return METHODS[CONFIG_METHODS[rotary.rope_type]].resolve(own_target(rotary, train_length))
