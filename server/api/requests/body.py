"""What every JSON request body has in common: its fields are checked by name, and what is not taken is told.

    field ─┬─ known: its value is checked; null, or an empty value that it does not have, is its default
           ├─ asks for nothing (`foreign`): left out
           └─ would change the reply: refused, or with STRICT_FIELDS=false left out, logged and named in `HEADER`

Knows neither the engine nor the tokenizer: checks that need the model (vocabulary, length) live in
`server.api.running`. A check of our own raises InvalidRequest directly; pydantic lets it through, and the reply keeps
its words. The middleware opens a `Report` for each request; bodies, which know neither settings nor headers, write to
it.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, Union, get_args, get_origin

from prerope.server.api.requests.foreign import EMPTY, EMPTY_SCHEMAS, Foreign, empty_schemas, is_empty
from prerope.server.api.requests.wording import MAX_SHOWN, first_invalid, json_type
from prerope.server.errors import InvalidRequest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

HEADER = "x-ignored-fields"
"""The reply's header that names fields of the request which were not honoured, separated by commas."""

MAX_NAMED = 16
MAX_CHARS = 64


@dataclass(slots=True)
class Report:
    """Which fields of one request were left out. `strict`: a field that would change the reply is refused instead."""

    strict: bool = True
    names: list[str] = field(default_factory=list)

    def ignore(self, name: str) -> None:
        """Note that a field was left out; a client's own words are cut down to what a header can carry.

        That ends in no blank: a name of no letter at its end would make one, and the reply would be lost.
        """
        shown = re.sub(r"[^\w.\[\]-]", "_", name, flags=re.ASCII)[:MAX_CHARS] or "_"
        if shown not in self.names and len(self.names) < MAX_NAMED:
            self.names.append(shown)


_report: ContextVar[Report | None] = ContextVar("report", default=None)


def current_report() -> Report:
    """This request's; outside of one, a strict report that nobody reads."""
    return _report.get() or Report()


@contextmanager
def reporting(*, strict: bool) -> Iterator[Report]:
    """A context in which `current_report` returns the report that it yields."""
    report = Report(strict)
    token = _report.set(report)
    try:
        yield report
    finally:
        _report.reset(token)


INT32_MAX = 2**31 - 1

JSON, COMPRESSED = "json", "compressed"
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


class Other(NamedTuple):
    """A schema that a path takes beside its own: told by any of these fields, where none of `without` is there."""

    body: type[RequestBody]
    fields: frozenset[str]
    without: frozenset[str] = frozenset()


class RequestBody(BaseModel):
    """A JSON object whose unknown, unsupported and harmless fields are told apart by name.

    Attributes:
        path: where this object sits in the request, for the `param` of an error ("rope." or nothing).
        foreign: fields of others' schemas that are not honoured (`server.api.requests.foreign`).
        synonyms: names that others have for fields of ours.
        asked_in: the field that holds a conversation, in bodies that have one.
        others: schemas of other servers that are taken on the same path.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    path: ClassVar[str] = ""
    foreign: ClassVar[Mapping[str, Foreign]] = {}
    synonyms: ClassVar[Mapping[str, str]] = {}
    asked_in: ClassVar[str] = ""
    others: ClassVar[Sequence[Other]] = ()

    @classmethod
    def schema_of(cls, given: Mapping[str, Any]) -> type[RequestBody]:
        """The schema that these fields are of: this one, or one of the others."""
        names = {name for name, value in given.items() if value is not None}
        return next((one.body for one in cls.others if names & one.fields and not names & one.without), cls)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls._taken()
        given: dict[str, Any] = {}
        said_as: dict[str, str] = {}
        beside = data.get("extra_body")
        if isinstance(beside, dict) and not cls.path:  # what Python's clients write beside the rest, others write so
            data = {name: value for name, value in data.items() if name != "extra_body"} | beside
        for said, value in data.items():
            name = cls.synonyms.get(said, said)
            taken = known.get(name)
            if taken is None:
                cls._leave_out(said, value)
            elif value is not None and not taken.leaves_out(value):
                value = int(value) if taken.whole and type(value) is float and value.is_integer() else value
                before = said_as.setdefault(name, said)
                if given.setdefault(name, value) != value and before != said:  # NaN is not even what it is
                    raise InvalidRequest(
                        f"'{cls.path}{before}' and '{cls.path}{said}' mean the same: give one of them",
                        param=cls.path + (before if said == name else said),
                    )
        return given

    @classmethod
    @functools.cache
    def _taken(cls) -> Mapping[str, _Taken]:
        """The fields, as clients write them, and what each takes."""
        fields = cls.model_fields.items()
        return {field.alias or name: _Taken.of(field) for name, field in fields}

    @classmethod
    def _leave_out(cls, name: str, value: object) -> None:
        """A field that is none of ours: it asks for nothing, or it is refused, or with STRICT_FIELDS=false reported."""
        report, foreign = current_report(), cls.foreign.get(name)
        if foreign is None and is_empty(value):
            if value is False:
                report.ignore(cls.path + name)
            return
        if foreign is not None and foreign.asks_for_nothing(value) and (is_empty(value) or not foreign.hint):
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
        return list(cls._taken())

    @classmethod
    def _unknown(cls, name: object) -> InvalidRequest:
        shown, known = str(name)[:MAX_SHOWN], [name for name in cls._names() if not name.startswith("_")]
        near = difflib.get_close_matches(shown, known, n=1)
        hint = f"did you mean '{cls.path}{near[0]}'?" if near else f"known fields: {', '.join(sorted(known))}"
        return InvalidRequest(
            f"unknown field '{cls.path}{shown}'; {hint}", param=cls.path + shown, code="unknown_field"
        )

    def asks_for(self, group: type[RequestBody]) -> bool:
        """Whether the client gave any of the fields that `group` adds to a body."""
        return not self.model_fields_set.isdisjoint(group.model_fields)

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
        known = cls._taken()
        properties = {
            name: _nullable(field, known[name].left_out) if known[name].optional else field
            for name, field in body.get("properties", {}).items()
        }
        properties |= {said: properties[name] for said, name in cls.synonyms.items() if name in properties}
        rows = {name: row for name, row in cls.foreign.items() if name not in properties}
        for name, row in rows.items():
            if row.harmless:
                taken = [*empty_schemas(row), *({"const": one} for one in row.harmless)]
                properties[name] = {"anyOf": taken, "description": f"Not supported: {row.reason}."}
        told = [name for name, row in rows.items() if row.any_value or row.hint]
        refused = {name: row.reason for name, row in rows.items() if row.reason and not row.harmless}
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        body["patternProperties"] = {
            **_any_of(told, {"description": "Accepted and ignored."}),
            **_any_of(refused, {"anyOf": list(EMPTY_SCHEMAS), "description": f"Not supported. {why}."}),
        }
        body["properties"] = properties
        body["additionalProperties"] = {"anyOf": list(EMPTY_SCHEMAS)}
        return schema


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a field takes. whole: numbers without a fraction. left_out: empty values that are none of its own."""

    optional: bool
    whole: bool
    left_out: tuple[object, ...]

    @classmethod
    def of(cls, field: FieldInfo) -> _Taken:
        kinds = set(_kinds(field.annotation))
        optional = not field.is_required()
        left = tuple(one for one in EMPTY if one is not None and type(one) not in kinds) if optional else ()
        return cls(optional, int in kinds and float not in kinds, left)

    def leaves_out(self, value: object) -> bool:
        """Whether an empty value asks for nothing, as it is none that the field could take."""
        return bool(self.left_out) and any(value == one and type(value) is type(one) for one in self.left_out)


def _kinds(annotation: Any) -> Iterator[type]:
    """The types of JSON that an annotation is made of. A model's own is no object here: an empty one asks nothing."""
    if annotation is Any:
        yield from (bool, str, list, dict)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(inner[0])
    elif origin in (list, dict):
        yield origin
    elif origin in (Union, UnionType):
        for one in inner:
            yield from _kinds(one)
    elif isinstance(annotation, type):
        yield annotation


def _any_of(names: Iterable[str], schema: JsonSchemaValue) -> JsonSchemaValue:
    """What all of these names have in common. (As a property each, they would fill the document.)"""
    return {f"^({'|'.join(map(re.escape, names))})$": schema} if names else {}


def _nullable(field: JsonSchemaValue, left_out: tuple[object, ...]) -> JsonSchemaValue:
    """The schema of a field that may also be null or empty; what is said about the field stays outside."""
    said: JsonSchemaValue = {name: field[name] for name in ("title", "description", "default") if name in field}
    return {"anyOf": [{k: v for k, v in field.items() if k not in said}, {"enum": [None, *left_out]}], **said}


def kind_of_body(headers: Mapping[str, str]) -> str:
    """JSON, COMPRESSED, or what else a body is said to be; empty where nothing is said."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        return COMPRESSED
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return JSON if kind.startswith("application/") and kind.endswith(("/json", "+json")) else kind


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
    if not {*map(type, value)} <= {int}:  # bool is an int to isinstance; a loop takes milliseconds for long prompts
        index, wrong = next((index, one) for index, one in enumerate(value) if type(one) is not int)
        raise InvalidRequest(f"'{param}[{index}]' must be a token id (an integer), not {json_type(wrong)}", param=param)
    return value


@contextmanager
def in_words_of(body: RequestBody) -> Iterator[None]:
    """Refusals of a conversation name the field in which this body has it."""
    try:
        yield
    except ValidationError as error:  # adapters make messages and tools of what is theirs
        raise _of_field(first_invalid(error.errors()), body.asked_in) from None
    except InvalidRequest as refusal:
        if not body.asked_in:
            raise
        raise _of_field(refusal, body.asked_in) from None


_CONVERSATION = re.compile(r"(?<![^'])(?:messages|prompt)(?=$|['.\[])")


def _of_field(refusal: InvalidRequest, field: str) -> InvalidRequest:
    if not field or _CONVERSATION.match(refusal.param or "") is None:
        return refusal
    message, param = (_CONVERSATION.sub(field, text) for text in (refusal.message, refusal.param or ""))
    return InvalidRequest(message, param=param, code=refusal.code)
