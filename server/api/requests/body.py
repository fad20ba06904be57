"""What every JSON request body has in common: names are checked, nulls mean the default, refusals say what to do.

Knows neither the engine nor the tokenizer: checks that need the model (vocabulary, length) live in
`server.api.limits`.
A check of our own raises InvalidRequest directly; pydantic lets it through, and the reply keeps its words.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from prerope.server.api.requests.foreign import EMPTY, Foreign, is_empty
from prerope.server.api.requests.leniency import current_report
from prerope.server.errors import InvalidRequest
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MAX_SHOWN = 64
"""Characters of a client's own text that an error message repeats at most."""

INT32_MAX = 2**31 - 1

MAX_DEPTH = 128
"""Lists and objects within each other, in a body and in JSON that a text of it holds. What is done with them follows
them by recursion, a few calls a level, and Python takes a thousand of those."""


@dataclass(frozen=True, slots=True)
class Verbatim:
    """JSON that is to be printed as it is."""

    text: str

    @classmethod
    def of(cls, value: object) -> Verbatim:
        return cls(json.dumps(value, separators=(",", ":")))


class RequestBody(BaseModel):
    """A JSON object whose unknown, unsupported and harmless fields are told apart by name.

    Attributes:
        path: where this object sits in the request, for the `param` of an error ("rope." or nothing).
        foreign: fields of others' schemas that are not honoured (`server.api.requests.foreign`).
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    path: ClassVar[str] = ""
    foreign: ClassVar[Mapping[str, Foreign]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls._names()
        given: dict[str, Any] = {}
        for name, value in data.items():
            if name not in known:
                cls._leave_out(name, value)
            elif value is not None:
                given[name] = value
        return given

    @classmethod
    def _leave_out(cls, name: str, value: object) -> None:
        """A field that is none of ours: it asks for nothing, or it is refused, or with STRICT_FIELDS=false reported."""
        report, foreign = current_report(), cls.foreign.get(name)
        if is_empty(value) or (foreign is not None and foreign.asks_for_nothing(value) and not foreign.hint):
            return
        if report.strict and (foreign is None or not foreign.hint):
            raise (
                cls._unknown(name)
                if foreign is None
                else InvalidRequest(
                    f"'{cls.path}{name}' is not supported: {foreign.reason}",
                    param=cls.path + name,
                    code="unsupported_field",
                )
            )
        report.ignore(cls.path + name)

    @classmethod
    def _names(cls) -> list[str]:
        """The fields, as clients write them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def _unknown(cls, name: object) -> InvalidRequest:
        shown, known = str(name)[:MAX_SHOWN], cls._names()
        near = difflib.get_close_matches(shown, known, n=1)
        hint = f"did you mean '{cls.path}{near[0]}'?" if near else f"known fields: {', '.join(sorted(known))}"
        return InvalidRequest(
            f"unknown field '{cls.path}{shown}'; {hint}", param=cls.path + shown, code="unknown_field"
        )

    def slim(self) -> None:
        """Leave out what nobody reads any more: lists and objects, which take long to hand over to another process."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, list | dict):
                setattr(self, name, type(value)())
            elif isinstance(value, RequestBody):
                value.slim()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The document says what `_check_names` does: null is the default, and other names may ask for nothing."""
        schema = handler(core_schema)
        body = handler.resolve_ref_schema(schema)
        required = body.get("required", [])
        properties = {
            name: field if name in required else _nullable(field) for name, field in body.get("properties", {}).items()
        }
        for name, foreign in cls.foreign.items():
            if foreign.any_value or foreign.hint:
                properties.setdefault(name, {"description": "Accepted and ignored."})
            else:
                said = f"Not supported: {foreign.reason}."
                properties.setdefault(name, {"enum": [*EMPTY, *foreign.harmless], "description": said})
        body["properties"] = properties
        body["additionalProperties"] = {"enum": list(EMPTY)}
        return schema


def _nullable(field: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a field that may also be null; what is said about the field stays outside."""
    if {"type": "null"} in field.get("anyOf", []):
        return field
    said: JsonSchemaValue = {name: field[name] for name in ("title", "description", "default") if name in field}
    return {"anyOf": [{k: v for k, v in field.items() if k not in said}, {"type": "null"}], **said}


def unicode_text(value: Any, param: str) -> str:
    """`value` as text that UTF-8 can carry. JSON may escape half a surrogate pair; no tokenizer takes it."""
    if not isinstance(value, str):
        raise InvalidRequest(f"'{param}' must be a string, not {json_type(value)}", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"'{param}' holds half a surrogate pair at character {error.start}: it is not valid Unicode", param=param
        ) from None
    return value


def _text(value: Any, info: ValidationInfo) -> str:
    return unicode_text(value, str(info.field_name))


Text = Annotated[str, BeforeValidator(_text)]


def token_ids(value: Any, param: str) -> list[int]:
    """`value` as a list of non-negative integers; the vocabulary is checked once the model is known."""
    if not isinstance(value, list):
        raise InvalidRequest(f"'{param}' must be a list of token ids, not {json_type(value)}", param=param)
    if not {*map(type, value)} <= {
        int
    }:  # bool is an int to isinstance; a loop would take milliseconds for long prompts
        index, wrong = next((index, one) for index, one in enumerate(value) if type(one) is not int)
        raise InvalidRequest(f"'{param}[{index}]' must be a token id (an integer), not {json_type(wrong)}", param=param)
    return value


def nests_deeper(value: Any) -> bool:
    """Whether lists and objects stand deeper within each other than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        held = (one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer))
        level = [one for one in held if isinstance(one, list | dict)]
        if not level:
            return False
    return True


def shown_number(number: float) -> str:
    """A number of any size, short enough for an error message."""
    return str(number) if isinstance(number, float) or abs(number) < 10**20 else "beyond 20 digits"


def json_type(value: object) -> str:
    """What JSON calls the type of `value`, with the article that a sentence needs."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


MAX_PROMPTS = 1024
"""Of one request."""


def prompts_of(value: Any, param: str) -> list[str | list[int]]:
    """A string, a list of strings, token ids, or a list of lists of them, as a list of prompts."""
    if isinstance(value, str):
        return [unicode_text(value, param)]
    if not isinstance(value, list):
        raise InvalidRequest(
            f"'{param}' must be text, token ids, or a list of them, not {json_type(value)}", param=param
        )
    if not value:
        raise InvalidRequest(f"'{param}' is an empty list: give at least one prompt", param=param)
    if not isinstance(value[0], str | list):
        return [token_ids(value, param)]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"'{param}' takes at most {MAX_PROMPTS} prompts, not {len(value)}", param=param)
    read = unicode_text if isinstance(value[0], str) else token_ids
    return [read(prompt, f"{param}[{index}]") for index, prompt in enumerate(value)]
