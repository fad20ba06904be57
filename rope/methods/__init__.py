"""From a `RopeSpec` and a model to a `PositionMethod`. The methods themselves are in the two modules imported here."""

from __future__ import annotations

from dataclasses import replace

from prerope.rope.frequencies import ALIBI, UNROTATED, Rotary, plain
from prerope.rope.methods import frequency, windowed  # noqa: F401  (they fill the registry)
from prerope.rope.reading import MethodError, PositionMethod, Rule, plain_reading
from prerope.rope.registry import CONFIG_METHODS, METHODS, MethodEntry, Target, own_target
from prerope.rope.spec import ALIASES, METHOD_NAMES, RopeSpec

DEFAULT_EXTENSION = 4.0
"""Target length ÷ trained length where neither ROPE_FACTOR nor MAX_MODEL_LEN says otherwise."""


def canonical_name(name: str) -> str:
    """`name` with aliases resolved; MethodError, with the names there are, where it is none."""
    resolved = ALIASES.get(name, name)
    if resolved not in METHOD_NAMES:
        raise MethodError(f"unknown position method {name!r}: choose one of {', '.join(METHOD_NAMES)}")
    return resolved


def native_length(rotary: Rotary) -> int:
    """How far the model reads well with the method of its own config: windowed methods and `auto` start there."""
    if rotary.dual_chunk:
        return int(rotary.dual_chunk.get("original_max_position_embeddings") or rotary.dual_chunk["chunk_size"])
    # Past its trained length a length-dependent method has other frequencies in every row: that length is not native.
    return rotary.train_length if rotary.rope_type in ("dynamic", "proportional") else rotary.max_length


def resolve(spec: RopeSpec, rotary: Rotary, max_model_len: int | None = None) -> PositionMethod:
    """The method that `spec` means for a model with this `rotary`.

    max_model_len: the target length, for methods that take s = target ÷ L where no factor is given.
    Raises MethodError.
    """
    name = canonical_name(spec.method)
    if rotary.rope_type in (UNROTATED, ALIBI):
        return _unrotated(spec, name, rotary, max_model_len)
    if rotary.rope_type not in CONFIG_METHODS:
        raise MethodError(
            f"the model's config has rope_type {rotary.rope_type!r}, which is not one of {', '.join(CONFIG_METHODS)}"
        )
    _check_values(spec)
    if name == "auto" and rotary.auto is not None:
        return _of_layers(rotary.auto, spec, rotary, max_model_len)
    if name == "auto":
        extendable = CONFIG_METHODS[rotary.rope_type] not in ("longrope", "dynamic_ntk") and not rotary.dual_chunk
        name = "dynamic_leaky" if extendable else "model"
    if name == "model" and rotary.dual_chunk:
        trained = native_length(rotary)
        target = replace(own_target(rotary), train_length=trained)
        return PositionMethod("dual_chunk", rotary, trained, windowed.tuned_dual_chunk(target), spec.logn)
    if name == "model":
        target = own_target(rotary, spec.train_length)
        own = METHODS[CONFIG_METHODS[rotary.rope_type]]
        return PositionMethod(own.name, rotary, target.train_length, own.resolve(target), spec.logn)
    entry = METHODS[name]
    trained = spec.train_length or (native_length(rotary) if entry.windowed else rotary.train_length)
    target = Target(rotary, spec, trained, _scale(spec, trained, max_model_len), from_config=False)
    return PositionMethod(name, rotary, trained, entry.resolve(target), spec.logn)


def _of_layers(own: RopeSpec, asked: RopeSpec, rotary: Rotary, max_model_len: int | None) -> PositionMethod:
    """What `auto` is in these layers: its parameters are its own, but for L, log-n and select, which are asked for."""
    trained = asked.train_length if own.train_length is None else own.train_length
    spec = replace(own, train_length=trained, logn=own.logn or asked.logn, select=asked.select)
    try:
        return resolve(spec, rotary, max_model_len)
    except MethodError as error:
        raise MethodError(f"layers {rotary.layers} (ROPE_LAYERS): {error}") from error


def _unrotated(spec: RopeSpec, name: str, rotary: Rotary, max_model_len: int | None) -> PositionMethod:
    """The only way to read keys that carry no rotation, as far as the model knows positions."""
    if spec.select is not None:
        raise MethodError("select (ROPE_SELECT) is for models with rotary embeddings, and this model has none")
    if name not in ("auto", "model") or spec.logn:
        raise MethodError(
            f"method {name!r}{' with logn' if spec.logn else ''} (ROPE_METHOD) needs keys that rotate, and this model "
            "has no rotary embedding: use auto or model"
        )
    if rotary.rope_type == UNROTATED and max_model_len is not None and max_model_len > rotary.max_length:
        raise MethodError(
            f"MAX_MODEL_LEN is {max_model_len}, but this model has no rotary embedding, and its own positions end at "
            f"{rotary.max_length}: lower it to that"
        )
    unrotated = plain_reading(plain(0, 1.0))
    return PositionMethod(rotary.rope_type, rotary, rotary.train_length, Rule({}, lambda _end: unrotated))


def _scale(spec: RopeSpec, train_length: int, max_model_len: int | None) -> float:
    if spec.factor is not None:
        return spec.factor
    return DEFAULT_EXTENSION if max_model_len is None else max(1.0, max_model_len / train_length)


def _check_values(spec: RopeSpec) -> None:
    if spec.factor is not None and not 1 <= spec.factor <= 1e6:
        raise MethodError(f"factor (ROPE_FACTOR) is {spec.factor}: it must be between 1 and 1e6")
    if spec.select is not None and spec.select < 1:
        raise MethodError(f"select (ROPE_SELECT) is {spec.select}: it must be at least 1, the far tokens to be read")
    if spec.train_length is not None and spec.train_length < 2:
        raise MethodError(f"train_length (ROPE_TRAIN_LENGTH) is {spec.train_length}: it must be at least 2 tokens")


def method_table() -> tuple[MethodEntry, ...]:
    """Every entry, in the order of `METHOD_NAMES`."""
    return tuple(METHODS[name] for name in METHOD_NAMES if name in METHODS)
