"""Types of settings that pydantic does not have: each checks one value, or brings it into its one form. A leaf."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from prerope.rope.spec import ALIASES, METHOD_NAMES, LayerMethods, parse_groups, parse_layers
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("no such device")
    return value


def _method(value: str) -> str:
    if value not in METHOD_NAMES and value not in ALIASES:
        raise ValueError("no such method")
    return value


def listed(value: str | None) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(one.strip() for one in (value or "").split(",") if one.strip())


def _keys(value: SecretStr) -> SecretStr:
    if not listed(value.get_secret_value()):
        raise ValueError("no key")
    return value


def read_key_file(path: Path) -> tuple[str, ...]:
    """The keys of a file: one a line, blank lines and lines that begin with # left out. OSError or ValueError."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())  # editors may write a BOM
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError("no key")
    return keys


def _expanded(value: Path) -> Path:
    """With ~ for the home folder, where no shell has put it in."""
    try:
        return value.expanduser()
    except RuntimeError as error:
        raise ValueError("no home folder") from error


def _key_file(value: Path) -> Path:
    try:
        read_key_file(value)
    except OSError as error:  # pydantic reports ValueError only
        raise ValueError("unreadable") from error
    return value


def _groups(value: object) -> object:
    return parse_groups(value) if isinstance(value, str) else value


def _layers(value: object) -> object:
    return parse_layers(value.strip().lower()) if isinstance(value, str) else value


Device = Annotated[str, BeforeValidator(_lower), AfterValidator(_device)]
Method = Annotated[str, BeforeValidator(_lower), AfterValidator(_method), Field(examples=[*METHOD_NAMES, *ALIASES])]
Groups = Annotated[tuple[int, ...] | None, NoDecode, BeforeValidator(_groups)]
Layers = Annotated[LayerMethods, NoDecode, BeforeValidator(_layers)]
ApiKeys = Annotated[SecretStr, AfterValidator(_keys)]
Folder = Annotated[Path, AfterValidator(_expanded)]
KeyFile = Annotated[Path, AfterValidator(_expanded), AfterValidator(_key_file)]
Dtype = Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(_lower)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]
GenerationConfig = Annotated[Literal["auto", "none"], BeforeValidator(_lower)]
PrefixSharing = Annotated[Literal["key", "all"], BeforeValidator(_lower)]
WeightQuantization = Annotated[Literal["none", "int8"], BeforeValidator(_lower)]
Speculation = Annotated[Literal["auto", "off"], BeforeValidator(_lower)]
LogFormat = Annotated[Literal["text", "json"], BeforeValidator(_lower)]
