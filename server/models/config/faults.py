"""What is wrong with a config that transformers fails on, in a newcomer's words: which value, and what to do about it.

transformers says it of its own code ("KeyError: 'x'"). So the values are left out one after the other: that without
which it works is at fault. What is tried has no weights, and takes a moment. An error that does not come again without
weights is none of the config's: nothing is said of it here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

from prerope.server.errors import words_of
from prerope.server.models.config.values import REMEDY, ROPE, shown, wrong_in

NESTED = (*ROPE, "text_config")
"""Dictionaries whose values are tried, too, one by one."""

KIND_OF_ALL = ("model_type", "rope_type", "type")
"""Without these, what stands beside them means nothing, and may be at fault itself."""

MOST_SECONDS = 20
KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number with a decimal point",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "NoneType": "null",
}
Path = tuple[str, ...]


class Unknown(Exception):
    """Whether a config works was not found out: in the time there is, or for want of memory."""


def config_fault(config: Mapping[str, Any], error: Exception, make: Callable[[dict[str, Any]], Any]) -> str | None:
    """What of the config led to this error, as a clause with the remedy; None where nothing shows that it did.

    config: what config.json holds. make: what a model begins with, from such a dictionary, without weights; it raises
    `Unknown` rather than take long.
    """
    if wrong := wrong_in(config):  # sizes, above all, with which no try would end
        return wrong
    if unknown := re.search(r"has model type `(.*?)` but", str(error), re.DOTALL):
        return (
            f"'model_type' is the text '{unknown[1][:32]}', and transformers {metadata.version('transformers')} knows "
            "no such model: correct it, or wait for a version of this server with a transformers that does"
        )
    if "contains custom code" in str(error):
        return (
            f"'model_type' is {shown(config.get('model_type'))}, a model whose code comes with its files ('auto_map'), "
            "and such code is not run here: take a version of it in a format that transformers itself knows"
        )
    if kind := _wrong_kind(config, error):
        return kind
    try:
        again = _failure(make, dict(config))
    except Unknown:
        return None
    if again is None:
        return None
    path = _looked_up(config, error) or _looked_up(config, again) or value_at_fault(config, make)
    if path is None and isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"it has no '{error.args[0][:32]}', which this model type needs: {REMEDY}"
    words = own_words(error) or own_words(again)
    if path is None:
        return f"{words or 'its values do not fit each other'}: {REMEDY}"
    why = f" ({words})" if words else ""
    return f"'{'.'.join(path)}' is {shown(_at(config, path))}, {_usual(config, path)}{why}: {REMEDY}"


def value_at_fault(config: Mapping[str, Any], make: Callable[[dict[str, Any]], Any]) -> Path | None:
    """The first value, inner ones first, without which a config that fails works; None where there is none."""
    ends = time.monotonic() + MOST_SECONDS
    for path in _paths(config):
        if time.monotonic() > ends:
            return None
        if path[-1] not in KIND_OF_ALL and _works(make, _without(config, path)):
            return path
    return None


def _works(make: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> bool:
    try:
        return _failure(make, config) is None
    except Unknown:
        return False


def _failure(make: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> Exception | None:
    """What making it raises. Raises Unknown where that is nothing about the config."""
    try:
        make(config)
    except MemoryError as error:
        raise Unknown from error
    except Unknown:
        raise
    except Exception as error:  # of any kind: that is what is asked
        return error
    return None


def _paths(config: Mapping[str, Any], *, everything: bool = False) -> Iterator[Path]:
    for name, value in config.items():
        if isinstance(value, Mapping) and (everything or name in NESTED):
            yield from ((name, *rest) for rest in _paths(value, everything=True))
    yield from ((name,) for name in config)


def _without(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    name, *rest = path
    left = {key: value for key, value in config.items() if key != name}
    return left | {name: _without(config[name], tuple(rest))} if rest else left


def _at(config: Any, path: Path) -> Any:
    for name in path:
        config = config[name]
    return config


def _looked_up(config: Mapping[str, Any], error: Exception) -> Path | None:
    """Where the config has what was looked up in vain, such as an activation's name."""
    if not isinstance(error, KeyError) or not error.args:
        return None
    return next((path for path in _paths(config) if _at(config, path) == error.args[0]), None)


def _usual(config: Mapping[str, Any], path: Path) -> str:
    """What models of the type have there, where their class says."""
    from transformers import AutoConfig

    try:
        usual = _at(AutoConfig.for_model(config["model_type"]).to_dict(), path)
    except Exception:  # a type may have no defaults, or not this one
        usual = None
    if isinstance(usual, str | int | float) and usual != _at(config, path):
        return f"which transformers cannot use; it would be {shown(usual)} where it is not said"
    return "which transformers cannot use"


def own_words(error: Exception) -> str:
    """What transformers says where it is a sentence about the config; of its own code, nothing."""
    if lacking := re.search(r"Missing required keys in .*'rope_type'='(\w+)': \{(.*?)\}", str(error)):
        return f"a rotation of type '{lacking[1]}' needs {lacking[2]} too"
    inner = re.search(r"validator '\w+':\s+(\w+): (.*)", str(error))
    if inner:
        return inner[2].rstrip(".:")[:200] if inner[1] == "ValueError" else ""
    return words_of(error, 200) if type(error) in (ValueError, AssertionError) else ""


def _wrong_kind(config: Mapping[str, Any], error: Exception) -> str | None:
    if item := re.search(r"Invalid item at index (\d+) in list '(\w+)'", str(error)):
        place, name = int(item[1]), item[2]
        one = _at(config, (name,))[place] if name in config else None
        return f"'{name}' has {shown(one)} at its place {place}, which none of its values may be: {REMEDY}"
    kinds = re.findall(r"Field '(\w+)' expected (\w+).*?, got \w+", str(error))
    if not kinds:
        return None
    name = kinds[0][0]
    wanted = " or ".join(dict.fromkeys(KINDS[kind] for _, kind in kinds if kind in KINDS))
    inner = config.get("text_config")
    values = inner if name not in config and isinstance(inner, Mapping) else config
    return f"'{name}' is {shown(values.get(name))}, and it is {wanted}: {REMEDY}"
