"""Settings from the command line, and how settings are explained: `--help`, errors, docs/settings.md's table.

Everything here is generated from the fields of `Settings`, so none of it can differ from what is accepted. A flag wins
over its variable. A wrong value, or a flag that does not exist, becomes a `ConfigurationError` of one line.
"""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import annotated_types
from prerope.server.errors import ConfigurationError
from prerope.server.settings import Settings
from pydantic import ByteSize, SecretStr, ValidationError
from pydantic.fields import FieldInfo

TABLE_BEGIN = "<!-- environment: begin -->"
TABLE_END = "<!-- environment: end -->"


MODULE = "python -m prerope.server"


def load_settings(argv: Sequence[str], command: str = MODULE) -> Settings:
    """Flags over environment over defaults. Raises ConfigurationError; SystemExit(0) after `--help` or `--markdown`.

    command: how the process was called, for what it says of itself.
    """
    given = {name: value for name, value in vars(_parser(command).parse_args(argv)).items() if value != ""}
    if given.pop("markdown", False):
        print(environment_table())
        raise SystemExit(0)
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_explain(dict(entry)) for entry in error.errors())) from None


def completions(before: Sequence[str], begun: str) -> list[str]:
    """What a shell may offer: values of the flag before, where they are a few words, else flags."""
    flags = _parser(MODULE)._option_string_actions
    last = flags.get(before[-1]) if before else None
    field = Settings.model_fields.get(last.dest) if last else None
    if field is None or begun.startswith("-"):
        offered: Sequence[str] = [flag for flag in flags if flag.startswith("--")]
    else:
        offered = _choices(field)
    return [one for one in offered if one.startswith(begun)]


def environment_table() -> str:
    """docs/settings.md's table of variables, in markdown."""
    rows = ["| Variable | Default | Allowed | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = default_text(field)
        shown = default if default == "unset" else f"`{default}`"
        rows.append(f"| `{name.upper()}` | {shown} | {allowed_text(field)} | {field.description} |")
    return "\n".join(rows)


def default_text(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default" in extra:
        return str(extra["default"])
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, ByteSize):
        unit = next((unit for unit in ("GiB", "MiB") if value and value % ByteSize.byte_sizes[unit.lower()] == 0), "B")
        return f"{value.to(unit):g}{unit}" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def allowed_text(field: FieldInfo) -> str:
    """What a field accepts, in words."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    kind = _plain_type(field)
    if get_origin(kind) is Literal:
        *most, last = _choices(field)
        return f"{', '.join(most)} or {last}"
    if kind is bool:
        return "true or false"
    noun = {int: "integer", float: "number", ByteSize: "bytes, or a size such as 4GiB"}[kind]
    return ", ".join(filter(None, (noun, _range_text(field, kind))))


def _choices(field: FieldInfo) -> list[str]:
    kind = _plain_type(field)
    if kind is bool:
        return ["true", "false"]
    return [str(choice) for choice in (get_args(kind) if get_origin(kind) is Literal else field.examples or ())]


def _plain_type(field: FieldInfo) -> Any:
    """The annotation without `| None` and without the validators around it."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    return get_args(kind)[0] if get_origin(kind) not in (None, Literal) else kind


def _range_text(field: FieldInfo, kind: type) -> str:
    low = high = None
    above = ""
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            low = bound.ge
        elif isinstance(bound, annotated_types.Le):
            high = bound.le
        elif isinstance(bound, annotated_types.Gt):
            above = f"above {bound.gt}"
    if kind is ByteSize and isinstance(low, int):
        return f"at least {low // 1024}KiB" if low < 2**20 else f"at least {low // 2**20}MiB"
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else above


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, with the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See {self.prog} --help.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            self.error(f"there is no flag {flag}{hint}" if flag.startswith("-") else f"unexpected argument {flag!r}")
        return parsed


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog=command,
        usage="%(prog)s [--flag value ...]",
        description="Serve a model over HTTP. Every flag is also an environment variable of the same name "
        "(--max-model-len is MAX_MODEL_LEN); the flag wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in Settings.model_fields.items():
        explained = f"{field.description} (default: {default_text(field)}; {allowed_text(field)})"
        flag, explained = "--" + name.replace("_", "-"), explained.replace("%", "%%")
        if _plain_type(field) is bool:
            parser.add_argument(flag, metavar="BOOL", nargs="?", const="true", help=explained)
        else:
            parser.add_argument(flag, metavar=name.rsplit("_", 1)[-1].upper(), help=explained)
    parser.add_argument("--markdown", action="store_true", help="print the environment as a markdown table, and exit")
    return parser


def _explain(error: dict[str, Any]) -> str:
    """One pydantic error as name, value, what is allowed. A secret's value is not shown."""
    name = str(error["loc"][0])
    field = Settings.model_fields.get(name)
    if field is None:
        return f"there is no setting {name.upper()}"
    value = "" if _plain_type(field) is SecretStr else f"={error['input']}"
    flag = "--" + name.replace("_", "-")
    return (
        f"{name.upper()}{value} is not allowed (flag {flag}). "
        f"Allowed: {allowed_text(field)}; default: {default_text(field)}"
    )
