"""A position method for every rotary group of a model, and what the prefix cache must know of them.

Most models have one group. Gemma 3 has one a layer type: a method that the deployment chooses is laid over its
full-attention layers, and its sliding layers, which never look past what they were trained on, keep their own. Layers
for which `auto` is a method of its own are groups, too (`parted`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from prerope.rope.frequencies import Rotary
from prerope.rope.methods import native_length, resolve
from prerope.rope.reading import UNBOUNDED, MethodError, PositionMethod
from prerope.rope.spec import LayerMethods, RopeSpec, layer_numbers

FULL_ATTENTION = "full_attention"


@dataclass(frozen=True, eq=False)
class ModelPositions:
    """One resolved method a rotary group. Compare by `digest`.

    Attributes:
        methods: group → method. A model with one group calls it "".
        main: the group that the deployment's choice applies to.
        spec: what was asked for; None for what nobody asked for by a spec.
    """

    methods: Mapping[str, PositionMethod]
    main: str
    spec: RopeSpec | None = None

    @cached_property
    def digest(self) -> bytes:
        """Equal exactly for positions that give equal K and V in every layer."""
        return self._combined({group: method.digest() for group, method in self.methods.items()})

    @cached_property
    def plain_digest(self) -> bytes:
        """The digest of the plain reading that the first `plain_rows` rows share with other methods."""
        return self._combined({group: method.plain_digest() for group, method in self.methods.items()})

    def _combined(self, digests: Mapping[str, bytes]) -> bytes:
        """Groups that are read as the main one is are left out: which layers they are plays no part."""
        h = hashlib.blake2b(digest_size=16)
        for group, digest in sorted(digests.items()):
            if group == self.main or digest != digests.get(self.main):
                h.update(group.encode() + b"\0" + digest)
        return h.digest()

    @cached_property
    def plain_rows(self) -> int:
        """K and V of rows before this one are the same as under the plain reading: rope's, for the windowed methods."""
        return min((method.plain_rows for method in self.methods.values()), default=UNBOUNDED)

    @property
    def max_bytes(self) -> int:
        """What it takes once readings of all lengths have been asked for."""
        return sum(method.max_bytes for method in self.methods.values())

    @cached_property
    def select(self) -> int | None:
        """Far tokens that a row of a reply reads; None: all. Rows of prompts, and so `digest`, know nothing of it."""
        return None if self.spec is None else self.spec.select

    def block_seed(self, end: int) -> bytes:
        """What a block that ends before row `end` mixes into its hash beside tokens and parent."""
        return self.plain_digest if end <= self.plain_rows else self.digest

    @cached_property
    def described(self) -> Mapping[str, object]:
        """JSON-ready: the method's name, its resolved parameters and L."""
        method = self.methods[self.main]
        selected = {} if self.select is None else {"select": self.select}
        layers = {
            part.rotary.layers: {"method": part.name, **part.parameters}
            for part in self.methods.values()
            if part.rotary.layers and part.digest() != method.digest()
        }
        described = {"method": method.name, **method.parameters, **selected, "train_length": method.train_length}
        return described | ({"layers": layers} if layers else {})

    def warnings(self) -> list[str]:
        return [method.rule.warning for method in self.methods.values() if method.rule.warning]


def resolve_model(spec: RopeSpec, rotaries: Mapping[str, Rotary], max_model_len: int | None) -> ModelPositions:
    """`spec` for a model with these rotary groups. Raises MethodError."""
    main = main_group(rotaries)
    chosen = resolve(spec, rotaries[main], max_model_len)

    def method(group: str, rotary: Rotary) -> PositionMethod:
        if rotary.layers and spec.method == "auto":
            return resolve(spec, rotary, max_model_len)
        return chosen if group == main or rotary.layers else resolve(RopeSpec(method="model"), rotary, max_model_len)

    return ModelPositions({group: method(group, rotary) for group, rotary in rotaries.items()}, main, spec)


def parted(
    groups: Sequence[str | None], rotaries: Mapping[str, Rotary], layers: LayerMethods
) -> tuple[list[str | None], dict[str, Rotary]]:
    """The group of each attention layer, and all groups, once layers with methods of their own have been taken out of
    the main group. MethodError where one of them is not in it, or none is left."""
    main, taken, parts = main_group(rotaries), list(groups), dict(rotaries)
    for named, spec in layers.items():
        part = f"{main} {named}".strip()
        for number in layer_numbers(named):
            if number >= len(groups) or groups[number] != main:
                raise MethodError(f"ROPE_LAYERS: layer {number} {_not_in(main, groups, number)}; leave it out")
            taken[number] = part
        parts[part] = replace(rotaries[main], layers=named, auto=spec)
    if layers and main not in taken:
        raise MethodError("ROPE_LAYERS names all layers that rotate keys: leave some, or use ROPE_METHOD")
    return taken, parts


def _not_in(main: str, groups: Sequence[str | None], number: int) -> str:
    if number >= len(groups):
        return f"is none of this model's {len(groups)} attention layers, which are counted from 0"
    if groups[number] is None:
        return "does not rotate keys"
    return f"is of the group {groups[number]!r}, which keeps the model's own method, and not of {main!r}"


def main_group(rotaries: Mapping[str, Rotary]) -> str:
    """The group that a chosen method applies to: full attention, or the only one."""
    return FULL_ATTENTION if FULL_ATTENTION in rotaries else next(iter(rotaries))


def default_max_model_len(spec: RopeSpec, rotary: Rotary) -> int:
    """Where MAX_MODEL_LEN is unset: as far as the method is meant to reach."""
    method = resolve(spec, rotary)
    if spec.factor is not None:
        return int(method.train_length * spec.factor)
    own = spec.method == "auto" and method.name == resolve(RopeSpec(method="model"), rotary).name
    if spec.method == "model" or method.name == "rope" or own:
        return rotary.max_length
    if method.name in ("llama3", "longrope", "proportional"):
        return max(rotary.max_length, method.train_length)
    return 4 * max(method.train_length, native_length(rotary))
