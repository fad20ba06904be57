"""JSON schemas as clients write them: what a grammar lets through is valid by jsonschema, and for types by pydantic.

Replies are drawn at random from the grammar alone, byte by byte: a model of any mind could have written them.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import functools
import ipaddress
import json
import math
import os
import pathlib
import random
import re
import time
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest
from llguidance import LLTokenizer
from prerope.server.errors import InvalidRequest
from prerope.server.structured.compile import differing_parts, new_matcher
from prerope.server.structured.finite import check_finite
from prerope.server.structured.matcher import CompiledGrammar, TokenMatcher
from prerope.server.structured.rewrite import enforceable
from prerope.server.structured.rules import check_rules
from prerope.server.structured.text import GrammarText
from prerope.server.structured.unique.items import MARK
from prerope.server.structured.values import Unenforceable
from pydantic import Field, TypeAdapter

NUM_REPLIES = 6
DULL = b" \r\n\teE"
"""Whitespace, and exponents: 1e999 is a number of JSON that few can read."""

LONG = 160
"""Bytes after which a reply is led to its end."""


@functools.cache
def byte_tokens() -> LLTokenizer:
    return LLTokenizer("byte")


def compiled(schema: Any) -> CompiledGrammar:
    return compiled_text(json.dumps(enforceable(schema).schema))


def compiled_text(schema: str) -> CompiledGrammar:
    wanted = GrammarText("json", schema, "json_schema")
    return CompiledGrammar(
        new_matcher(wanted, byte_tokens()), byte_tokens(), parts=differing_parts(wanted, byte_tokens())
    )


def allowed(matcher: TokenMatcher) -> list[int]:
    """The bytes that may come next."""
    bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), count=256, bitorder="little")
    assert not matcher.failure, matcher.failure
    return [int(byte) for byte in np.flatnonzero(bits)]


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    matcher = grammar.matcher()
    for byte in text.encode():
        if matcher.finished or byte not in allowed(matcher):
            return False
        matcher.accept(byte)
    return matcher.accepting


def reply(grammar: CompiledGrammar, rng: random.Random) -> str | None:
    """One that the grammar allows; None for one that has not ended in time."""
    matcher, text = grammar.matcher(), bytearray()
    while len(text) < 4 * LONG:
        if matcher.finished or (matcher.accepting and (len(text) > LONG or rng.random() < 0.3)):
            return text.decode()
        following = allowed(matcher)
        assert following, f"the grammar is stuck after {text!r}"
        if len(text) > LONG:
            following = [byte for byte in following if byte in b'"}],0'] or following
        byte = rng.choice([byte for byte in following if byte not in DULL] or following)
        matcher.accept(byte)
        assert not matcher.failure, matcher.failure
        text.append(byte)
    return None


def replies(schema: Any) -> list[str]:
    matcher, rng = compiled(schema), random.Random(0)
    ended = [text for _ in range(NUM_REPLIES) if (text := reply(matcher, rng)) is not None]
    assert ended
    return ended


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Node(pydantic.BaseModel):
    value: Annotated[int, Field(ge=0, le=9)]
    children: list[Node] = []


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, Field(max_length=5)]


class Next(pydantic.BaseModel):
    """Always another, or none."""

    next: Next | None


TYPES: list[Any] = [
    set[Colour],
    set[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]],
    set[Annotated[int, Field(ge=1, lt=4)]],
    set[Literal["a", "b"] | None],
    Annotated[set[bool | None], Field(min_length=3)],
    set[bool],
    set[Literal["a", "b", "c", "d", "e", "f", "g", "h"]],
    set[int],
    set[str],
    frozenset[float],
    set[uuid.UUID],
    set[datetime.date],
    set[Annotated[int, Field(ge=-3, lt=40)]],
    set[Annotated[str, Field(min_length=1, max_length=2)]],
    set[int | str | None],
    dict[str, set[int]],
    Annotated[dict[str, int], Field(min_length=3)],
    Annotated[set[Literal[1, 2, 3]], Field(min_length=2)],
    dict[Literal["a", "b"], int],
    dict[Colour, int],
    dict[uuid.UUID, int],
    dict[datetime.date, int],
    dict[Annotated[str, Field(min_length=1, max_length=3)], int],
    dict[Annotated[str, Field(pattern="^x[0-9]$")], int],
    tuple[int, str],
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
    pydantic.UUID4,
    pathlib.Path,
    bytes,
    pydantic.SecretStr,
    pydantic.IPvAnyAddress,
    pydantic.Base64Bytes,
    pydantic.Base64UrlBytes,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv6Interface,
    pydantic.IPvAnyNetwork,
    pydantic.IPvAnyInterface,
    Annotated[float, Field(gt=0, lt=1)],
    Annotated[list[int], Field(min_length=1, max_length=3)],
    Annotated[Cat | Dog, Field(discriminator="kind")],
    int | str | None,
    Node,
    Next,
]


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_what_pydantic_asks_for(type_: Any) -> None:
    adapter = TypeAdapter(type_)
    schema = adapter.json_schema()
    assert not enforceable(schema).dropped
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for text in replies(schema):
        adapter.validate_json(text)
        validator.validate(json.loads(text))


def test_the_text_of_a_number_that_pydantic_takes() -> None:
    """Where pydantic's schema has its pattern: without one, as it writes a Decimal from 2.14 on, it is that of
    `float | str`."""
    pattern = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"  # pydantic 2.12 and 2.13
    decimal = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": pattern}]}
    for text in replies(decimal):
        TypeAdapter(Decimal).validate_json(text)
    for text in replies({"type": "array", "items": decimal, "uniqueItems": True}):
        assert isinstance(TypeAdapter(set[Decimal]).validate_json(text), set)


NOT_HELD = "leave 'uniqueItems' out"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"items": {"type": "string", "pattern": "^a"}}, f"strings with a 'pattern'.*{NOT_HELD}"),
        ({"items": {"type": "number", "minimum": 0}}, f"numbers with 'minimum'.*{NOT_HELD}"),
        ({"items": {"type": "integer", "multipleOf": 2}}, f"'multipleOf'.*{NOT_HELD}"),
        ({"items": {"type": "object"}}, f"lists or objects.*{NOT_HELD}"),
        ({"items": {"enum": [[1], [2]]}}, f"lists or objects.*{NOT_HELD}"),
        ({"items": True}, f"of any kind.*{NOT_HELD}"),
        ({}, f"of any kind.*{NOT_HELD}"),
        ({"items": {"type": "integer"}, "prefixItems": [True]}, "beside 'prefixItems'"),
        ({"items": {"type": "integer"}, "contains": {"const": 1}}, "beside 'contains'"),
        ({"items": {"enum": [1, 2]}, "minItems": 3}, "no more than 2 items"),
        ({"items": {"type": "string", "format": "date", "minLength": 1}}, "a 'format' and a length"),
        ({"items": {"type": "integer"}, "minItems": "2"}, "'minItems' and 'maxItems' must be whole numbers"),
        ({"items": {"type": "boolean"}, "maxItems": []}, "'minItems' and 'maxItems' must be whole numbers"),
        ({"items": {"type": "integer", "minimum": 10**15}}, f"at most 15 digits.*{NOT_HELD}"),
        ({"items": {"type": "integer", "minimum": 10**15 - 3}, "minItems": 4}, "no more than 3 items"),
        ({"items": {"type": "string", "maxLength": math.inf}}, f"lengths that no string has.*{NOT_HELD}"),
    ],
    ids=str,
)
def test_items_that_cannot_be_held_to_differ_are_told_of(schema: Any, words: str) -> None:
    dropped = enforceable({"type": "array", "uniqueItems": True, **schema}).dropped
    assert dropped.keys() == {"uniqueItems"}
    assert re.search(words, dropped["uniqueItems"])


UNIQUE: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
LIST: dict[str, Any] = {"type": "array", "items": {"enum": [1]}, "minItems": 2}


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [UNIQUE, LIST]},
        {"anyOf": [UNIQUE, True]},
        {"allOf": [UNIQUE, {"maxItems": 3}]},
        {"anyOf": [UNIQUE, {**UNIQUE, "items": {"type": "string"}}]},
        {"type": "object", "properties": {"a": UNIQUE}, "patternProperties": {"^a": LIST}},
        {"anyOf": [{"type": "object", "properties": {"a": UNIQUE}}, {"type": "object"}]},
        {"type": "object", "minProperties": 3, "patternProperties": {"^a$": True}},
        {"type": "object", "minProperties": 3, "propertyNames": {"maxLength": 1}},
    ],
    ids=str,
)
def test_where_it_is_not_known_whether_values_must_differ_is_told(schema: Any) -> None:
    assert enforceable(schema).dropped


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (UNIQUE, ["[]", "[1,12,123]", "[0,-1]", "[ 1 , 2 ]"], ["[1,1]", "[12, 1 ,12]", "[-0]", "[0,-0]", "[1,2,1 ]"]),
        (
            {**UNIQUE, "items": {"type": "number"}},
            ["[1,1.5,-0.5,0]", "[0.05,0.5]"],
            ["[1.0]", "[1,1]", "[1e2]", "[1.50]"],
        ),
        ({**UNIQUE, "items": {"enum": [-0.0, 1]}, "minItems": 2}, ["[0,1]", "[1,0]"], ["[-0,1]", "[1,0,1]"]),
        ({**UNIQUE, "items": {"type": "string"}}, ['["a","A","",","]'], ['["a","a"]', '["\\u0061"]', '["",""]']),
        ({"anyOf": [UNIQUE, {"type": "null"}]}, ["null", "[1]"], ["[1,1]"]),
        ({"allOf": [UNIQUE]}, ["[1,2]"], ["[1,1]"]),
        ({"type": "array", "items": UNIQUE}, ["[[1],[1]]"], ["[[1],[1,1]]"]),
        (
            {"type": "object", "properties": {"a": UNIQUE, "b": {"items": {"type": "integer"}}}},
            ['{"a":[1],"b":[1,1]}'],
            ['{"a":[1,1],"b":[1,1]}', '{"a":[1,1]}'],
        ),
        ({"$defs": {"s": UNIQUE}, "items": {"$ref": "#/$defs/s"}}, ["[[1],[1]]"], ["[[1,1]]"]),
        ({"type": "object", "minProperties": 2}, ['{"a":1,"b":[1,1]}'], ['{"a":1}', '{"a":1,"a":2}']),
        (
            {"type": "object", "minProperties": 3, "additionalProperties": UNIQUE},
            ['{"a":[],"b":[1],"c":[]}'],
            ['{"a":[1,1]}'],
        ),
    ],
    ids=str,
)
def test_values_that_must_differ(schema: Any, good: list[str], bad: list[str]) -> None:
    assert not enforceable(schema).dropped
    grammar = compiled(schema)
    assert [accepts(grammar, text) for text in good] == [True] * len(good)
    assert [accepts(grammar, text) for text in bad] == [False] * len(bad)


def test_patterns_of_names_that_are_none_are_left_for_the_compiler_to_refuse() -> None:
    with pytest.raises(InvalidRequest, match="patternProperties"):
        compiled({"type": "object", "minProperties": 3, "patternProperties": ["^a"]})


def by_many_ways(width: int) -> Any:
    """Each of six choices refers to the next so many times."""
    choices = {f"c{depth}": {"anyOf": [{"$ref": f"#/$defs/c{depth + 1}"}] * width} for depth in range(6)}
    last = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    return {**UNIQUE, "items": {"$ref": "#/$defs/c0"}, "$defs": {**choices, "c6": last}}


def by_many_names(width: int) -> Any:
    """Each branch has a name of its own."""
    return {"anyOf": [{"properties": {f"n{i}": {}, "u": UNIQUE}, "additionalProperties": False} for i in range(width)]}


@pytest.mark.parametrize(("ways", "most"), [(by_many_ways, 32), (by_many_names, 800)])
def test_what_must_differ_is_found_in_time_that_grows_as_the_schema_does(ways: Callable[[int], Any], most: int) -> None:
    def took(width: int) -> float:
        schema, began = json.loads(json.dumps(ways(width))), time.thread_time()
        assert not enforceable(schema).dropped
        return time.thread_time() - began

    few, many = (min(took(width) for _ in range(3)) for width in (most // 4, most))
    assert many < 10 * few + 0.002


def test_a_deep_reply_with_items_that_must_differ() -> None:
    """Nesting costs the reader no recursion."""
    nested = {"$defs": {"n": {"anyOf": [UNIQUE, {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}]}}}
    grammar = compiled({**nested, "$ref": "#/$defs/n"})
    text = '{"n":' * 5_000 + "[1,1"
    matcher = grammar.matcher()
    for byte in text.encode():
        matcher.accept(byte)
        assert not matcher.failure, matcher.failure
    assert ord("]") not in allowed(matcher)
    assert ord("2") in allowed(matcher)


NAMES = {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}}
CLOSED = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (NAMES, ["{}", '{"a":1}', '{"a":1,"b":2}'], ['{"c":1}', '{"a":"x"}']),
        ({**NAMES, "properties": {"a": {"type": "string"}}}, ['{"a":"x","b":2}'], ['{"a":1}', '{"c":1}']),
        ({**NAMES, "required": ["b"]}, ['{"b":2}'], ["{}", '{"a":1}']),
        ({"type": "object", "propertyNames": {"maxLength": 2}}, ['{"ab":null}'], ['{"abc":null}']),
        ({"type": "object", "propertyNames": {"format": "date"}}, ['{"2024-02-29":1}'], ['{"2023-02-29":1}']),
        ({"type": "object", "propertyNames": {"type": "string"}}, ['{"abc":null}'], ["[]"]),
        (
            {"properties": {"a": {"type": "integer", "enum": None, "pattern": None}}, "required": None, "items": None},
            ['{"a":1}'],
            ['{"a":null}'],
        ),
        ({"anyOf": [{"not": {}}, {"const": "a"}]}, ['"a"'], ['"b"', "1"]),
        ({"properties": {"a": {"not": {}}}, "additionalProperties": {"not": {}}}, ["{}"], ['{"a":1}', '{"b":1}']),
        (True, ["1", "{}"], []),
        ({"enum": ["a", "b"], "uniqueItems": False}, ['"a"'], ['"c"']),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}, ["[]", '["b","a"]'], ['["a","a"]']),
        (
            {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2, "maxItems": 2},
            ["[1,2]", "[3,1]"],
            ["[1]", "[1,1]", "[1,2,3]"],
        ),
        ({"type": "object", "patternProperties": {"^x": {"type": "null"}}}, ['{"xy":null}'], ['{"y":1}', '{"xy":1}']),
        ({**CLOSED, "unevaluatedProperties": False}, ['{"a":1}'], ['{"b":1}']),
        ({"type": "array", "unevaluatedItems": {"type": "null"}}, ["[null]"], ["[1]"]),
        ({"type": "integer", "then": {"const": 1}, "minContains": 2}, ["2"], ['"2"']),
        ({"type": "string", "minLength": 2.0}, ['"ab"'], ['"a"']),
        ({"format": "date"}, ['"2024-02-29"', "7"], ['"2023-02-29"', '"x"']),
        ({"type": "string", "format": "date", "pattern": "^2"}, ['"2000-02-29"'], ['"1999-01-01"', '"2100-02-29"']),
        ({"format": "time"}, ['"23:59:59Z"', '"00:00:00.5+02:00"'], ['"24:00:00Z"', '"00:00:00.1234567Z"']),
        ({"format": "duration"}, ['"P1Y2M3DT4H5M6S"', '"P2W"'], ['"P"', '"PT"', '"P1D2Y"', '"P1234567D"']),
        ({"format": "date-time"}, ['"2024-02-29T00:00:00Z"'], ['"2024-02-29"', '"2024-02-30T00:00:00Z"']),
        ({"format": "json-pointer"}, ['"/a~1b/0"', '""'], ['"a"', '"/~2"']),
        ({"format": "uuid4"}, ['"2eb8aa08-aa98-41ea-b4aa-73b441d16380"'], ['"2eb8aa08-aa98-11ea-b4aa-73b441d16380"']),
        ({"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^(?!x)"}]}, ["1.5"], ['"x"', "null"]),
        ({**CLOSED, "additionalProperties": True}, ['{"a":1,"b":2}'], ['{"\\u0061":"x"}', '{"a":1,"\\u0061":"x"}']),
        ({"patternProperties": {"^x": {"type": "null"}}, "required": ["y"]}, ['{"y":1,"xy":null}'], ['{"y":1,"xy":1}']),
        (
            {"type": "array", "items": {"enum": [1, True, 1.0]}, "uniqueItems": True},
            ["[1]", "[true,1]"],
            ["[1,1]", "[1,1.0]"],
        ),
        (
            {"items": {"type": "string", "enum": ["a", None]}, "uniqueItems": True},
            ['["a"]', "7"],
            ['["a","a"]', "[null]"],
        ),
        ({"prefixItems": [{"type": "null"}], "additionalItems": False, "items": {"const": 1}}, ["[null,1]"], ["[1]"]),
        ({"items": [{"type": "null"}], "minItems": 1, "additionalItems": False}, ["[null]"], ["[1]", "[null,1]"]),
        ({"$ref": "#/anyOf/1", "anyOf": [{"pattern": "(?=x)"}, {"type": "number"}, {}]}, ["1"], ["{}", '"x"']),
        ({"$ref": "#/components/A", "components": {"A": CLOSED}}, ['{"a":1,"b":2}'], ['{"a":1,"\\u0061":"x"}']),
        ({"$ref": "#/x/0/y", "x": [{"y": {"format": "date"}}]}, ['"2024-02-29"', "7"], ['"2023-02-29"']),
        ({"type": "integer", "minimum": 2**53 + 1}, [str(2**53 + 2)], [str(2**53)]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["1", "-1"], [str(2**63)]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5"], ["0", "0.0", "0.6"]),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, ["-1.1"], ["-1", "-1.0"]),
        ({"type": "number", "minimum": 1, "exclusiveMinimum": True, "maximum": 1.5}, ["1.5"], ["1"]),
        (
            {"properties": {"ab": {"const": "x"}}, "patternProperties": {"^a": {"maxLength": 3}}},
            ['{"ab":"x","ac":"y"}'],
            ['{"ac":"four"}', '{"ab":"y"}', '{"ab":"x","ab":"y"}'],
        ),
        (
            {
                "type": "object",
                "properties": {"a": {}, "b": {}},
                "patternProperties": {"^[ab]$": {"type": "integer"}, "^c": {"type": "integer"}},
            },
            ['{"a":1,"b":2}', '{"b":2,"c":3}'],
            ['{"a":"x"}', '{"b":"x"}', '{"c":"x"}'],
        ),
    ],
    ids=lambda value: re.sub(r"[^\w]+", "-", json.dumps(value))[:60],
)
def test_says_the_same_or_less(schema: Any, good: list[str], bad: list[str]) -> None:
    matcher = compiled(schema)
    assert [text for text in good if not accepts(matcher, text)] == []
    assert [text for text in bad if accepts(matcher, text)] == []


def listing(properties: dict[str, Any], **patterns: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {f"^({names.replace('_', '|')})$": one for names, one in patterns.items()},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("properties", "pattern"),
    [
        ({"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, {"minimum": 5}),
        ({"a": {}, "b": {"$ref": "#/patternProperties/%5E(a)$"}}, {"type": "integer"}),
        ({"a": {"type": "integer"}, "b": {}}, {"$ref": "#/properties/a"}),
    ],
)
def test_a_reference_to_what_a_pattern_says_more_of_is_refused(properties: Any, pattern: Any) -> None:
    """With the pattern's bound in it the property meant another thing to whoever names it."""
    with pytest.raises(Unenforceable, match=r"\$defs"):
        enforceable(listing(properties, a=pattern))


def test_what_references_name_within_a_listed_property_stays() -> None:
    inner = {"type": "object", "properties": {"c": {"type": "integer"}}, "additionalProperties": False}
    grammar = compiled(listing({"a": inner, "b": {"$ref": "#/properties/a/properties/c"}}, a={"minProperties": 1}))
    assert accepts(grammar, '{"a":{"c":1},"b":2}')
    assert not accepts(grammar, '{"a":{"c":1},"b":"x"}')


def test_many_patterns_say_more_of_one_property() -> None:
    """A list of them: each within the one before, they nested too deep to be compiled."""
    names = {"a": {"type": "integer"}} | {f"b{n}": {"type": "null"} for n in range(200)}
    grammar = compiled(listing(names, **{f"a_b{n}": {} for n in range(200)}))
    assert accepts(grammar, '{"a":1,"b7":null}')


LISTS = (
    "^a$",
    "^(a|b)$",
    "^(?:b)$",
    "^[ab]$",
    "^[a-b]$",
    "^a$|^b$",
    "^a{1}$",
    "^(a$|b$)",
    r"^\-$",
    r"^\x61$",
    r"^((b))$",
)


@pytest.mark.parametrize("pattern", [*LISTS, "^c$", "^a", "a$", "^a?$", "^[a-c]$"])
def test_a_name_may_follow_where_a_comma_may(pattern: str) -> None:
    """What a pattern lists had its property already, and then there was no name to go on with."""
    integer = {"type": "integer"}
    closed = {"type": "object", "properties": {"a": {}, "b": integer, "-": {}}, "additionalProperties": False}
    grammar = compiled(closed | {"patternProperties": {pattern: integer}})
    goes_on = 0
    for text in ('{"a":1,', '{"a":1,"b":1,', '{"a":1,"b":1,"-":1,', '{"b":1,', '{"-":1,'):
        matcher = grammar.matcher()
        for byte in text.encode():
            if byte not in allowed(matcher):
                break
            matcher.accept(byte)
        else:
            goes_on += 1
            assert set(allowed(matcher)) - set(b" \n\t\r"), text
    assert goes_on >= 2


@pytest.mark.parametrize("others", [{}, {"a": {"type": "integer"}}])
def test_no_comma_follows_where_a_pattern_lists_what_is_required(others: dict[str, Any]) -> None:
    """Required names are properties to llguidance, and then the pattern had none left."""
    pattern = {"patternProperties": {"^[ab]$" if others else "^b$": {"type": "integer"}}, "required": ["b"]}
    matcher = compiled({"type": "object", "properties": others, **pattern, "additionalProperties": False}).matcher()
    for byte in b'{"a":1,"b":1' if others else b'{"b":1':
        matcher.accept(byte)
    assert b","[0] not in allowed(matcher)
    assert not matcher.failure


PATTERNED = {"type": "object", "patternProperties": {"^x": {"type": "integer"}}}
NAMED = {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"const": 2**53 + 1}, "digits"),
        ({"enum": [[{"a": 2**63}]]}, "digits"),
        ({"type": "integer", "multipleOf": 99_991}, "multipleOf"),
        ({"multipleOf": 10**400}, "multipleOf"),
        ({"minimum": 10**400, "exclusiveMaximum": 0.0}, "bound"),
        ({"minimum": math.nan, "exclusiveMinimum": math.nan, "multipleOf": math.nan}, "JSON"),
        ({"allOf": [{"multipleOf": 9_973}, {"multipleOf": 0.0997}]}, "multiple"),
        ({**CLOSED, "minProperties": 1, "required": ["b"], "const": {"b": "\x01"}}, "control"),
        ({"items": [True], "prefixItems": [True]}, "prefixItems"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "back to itself"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "back to itself"),
        ({"$ref": "#/components/A", "components": {"A": {"multipleOf": 99_991}}}, "multipleOf"),
        ({"anyOf": [{"$ref": "#/const"}], "const": {"exclusiveMinimum": 0, "maximum": 0.5}}, "no schema"),
        ({"$id": "http://x/y", "$ref": "y#/components/A", "components": {"A": {"format": "date"}}}, "no schema"),
        ({"$ref": "#/allOf/" + "9" * 5000, "allOf": [True]}, "JSON"),
        ({"propertyNames": {"allOf": [True]}}, "propertyNames"),
        ({"propertyNames": {"allOf": {"a": 1}}}, "propertyNames"),
        ({"type": "string", "pattern": "^(?!x)", "x-guidance": {"lenient": True}}, "look-around"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 0}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
        ({"oneOf": [PATTERNED, NAMED]}, "oneOf"),  # {"k": 1} is both; were other keys left out of the first, only one
        ({"oneOf": [{"items": {"type": "boolean"}, "uniqueItems": True}, {"type": "number"}]}, "oneOf"),
    ],
    ids=str,
)
def test_what_could_not_be_held_is_refused_at_once(schema: Any, words: str) -> None:
    with pytest.raises((Unenforceable, InvalidRequest), match=words):
        compiled(schema)


OBJECT: dict[str, Any] = {"type": "object"}


def tagged(tag: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": tag, **more}, "required": ["k"], "additionalProperties": False}


A, B, INT, DIGIT = {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"type": "integer"}, {"enum": [*range(10)]}
DEFINITIONS: dict[str, Any] = {"$defs": {"a": tagged({"const": "a"}), "b": tagged({"const": "b"}, n=DIGIT)}}
LINKS = {
    "$defs": {
        "link": tagged({"const": 1}, next={"oneOf": [{"$ref": "#/$defs/link"}, {"$ref": "#/$defs/end"}]}),
        "end": tagged({"const": 2}),
        "list": {"type": "array", "items": {"oneOf": [{"$ref": "#/$defs/list"}, DIGIT]}},
        "alias": {"$ref": "#/$defs/end"},
    }
}
TOLD_APART: list[Any] = [
    {
        "definitions": {"a": tagged({"const": "a"})},
        "type": "object",
        "properties": {"x": {"oneOf": [{"$ref": "#/definitions/a"}, {"type": "null"}]}},
        "additionalProperties": False,
    },
    {"oneOf": [A, B, {"type": "null"}], **DEFINITIONS},
    {"oneOf": [{"$ref": "#/$defs/link"}, {"$ref": "#/$defs/alias"}], **LINKS},
    {"$ref": "#/$defs/list", **LINKS},
    {"oneOf": [{"$ref": "#/$defs/list"}, {"type": ["null", "boolean"]}], **LINKS},
    {"oneOf": [{"anyOf": [A, {"type": "null"}]}, {"allOf": [B]}], **DEFINITIONS},
    {"oneOf": [A, {"type": "null"}], "anyOf": [B, {"type": "null"}, {"const": {"k": "a"}}], **DEFINITIONS},
    {
        "type": "object",
        "oneOf": [A, B],
        "$defs": {"a": NAMED | {"type": ["object", "null"]}, "b": tagged({"const": 2})},
    },
    {"oneOf": [A, B], "$defs": {"a": tagged(tagged({"const": 0})), "b": tagged(tagged({"const": False}))}},
    {"oneOf": [A, B], "$defs": {"a": {"enum": [1, "x", None]}, "b": {"enum": [2, "y", True]}}},
    {
        "oneOf": [A, B],
        "$defs": {"a": tagged(DIGIT), "b": {**OBJECT, "properties": {"k": True, "n": DIGIT}, "required": ["n"]}},
    },
]
MAY_BOTH: list[Any] = [
    {"oneOf": [A, B], "$defs": {"a": tagged({"const": 1}), "b": tagged({"const": 1.0}, n=INT)}},
    {"oneOf": [A, B], "$defs": {"a": {**NAMED, "required": []}, "b": {**tagged({"const": 2}), "required": []}}},
    {"oneOf": [A, B], "$defs": {one: {"properties": {"k": {"const": one}}, "required": ["k"]} for one in "ab"}},
    {"oneOf": [A, B], "$defs": {"a": {"type": "number"}, "b": INT}},
    {"oneOf": [A, {"type": "null"}, A], **DEFINITIONS},
    {"oneOf": [{"anyOf": [A, {"type": "null"}]}, {"anyOf": [B, {"type": "null"}]}], **DEFINITIONS},
    {"oneOf": [A, B], "$defs": {"a": tagged({"const": 1}), "b": {**OBJECT, "patternProperties": {"^k": INT}}}},
    {"oneOf": [A, {"$ref": "#/oneOf/0"}], **DEFINITIONS},
    {"oneOf": [{"$ref": "#/$defs/list"}, {"type": "array", "items": {"$ref": "#/$defs/end"}}], **LINKS},
    {"oneOf": [{"$ref": f"#/$defs/{i}"} for i in range(150)], "$defs": {str(i): tagged(DIGIT) for i in range(150)}},
]


@pytest.mark.parametrize("schema", TOLD_APART, ids=range(len(TOLD_APART)))
def test_one_of_with_references_to_branches_that_are_told_apart(schema: Any) -> None:
    for text in replies(schema):
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    matcher, draft = compiled(schema), jsonschema.Draft202012Validator(schema)
    values = [None, True, 1, 2, "x", "y", [], [[3], 4], {}, {"x": None}, {"x": {"k": "a"}}, {"k": {"k": 0}}]
    values += [{"k": tag, **more} for tag in ("a", "b", 1, 2, 7, 8, False, {"k": False}) for more in ({}, {"n": 3})]
    values += [{"k": 1, "next": {"k": 1, "next": {"k": 2}}}, {"k": 2, "next": {"k": 2}}]
    assert [accepts(matcher, json.dumps(one)) for one in values] == [draft.is_valid(one) for one in values]


@pytest.mark.parametrize("schema", MAY_BOTH, ids=range(len(MAY_BOTH)))
def test_one_of_with_references_to_branches_that_may_both_match_is_refused_in_our_words(schema: Any) -> None:
    words = r"'oneOf' has branches that may both match.*'anyOf' instead.*'const'"
    with pytest.raises(InvalidRequest, match=words) as refused:
        compiled(schema)
    assert "coerce" not in str(refused.value)


ENDLESS: list[tuple[Any, str]] = [
    ({**OBJECT, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#"),
    ({"type": "array", "prefixItems": [True, {"$ref": "#"}], "minItems": 2}, "#"),
    ({"type": "array", "contains": {"$ref": "#"}}, "#"),
    ({**OBJECT, "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "#"),
    ({**OBJECT, "patternProperties": {"^a": {"$ref": "#"}}, "additionalProperties": False, "required": ["ab"]}, "#"),
    (
        {  # a trap: the whole may end without it
            **OBJECT,
            "properties": {"a": {"$ref": "#/$defs/i"}},
            "$defs": {
                "i": {
                    "allOf": [{**OBJECT, "properties": {"a": {"anyOf": [{"$ref": "#/$defs/j"}]}}, "required": ["a"]}]
                },
                "j": {"type": "array", "items": {"$ref": "#/$defs/i"}, "minItems": 1},
            },
        },
        "#/$defs/",
    ),
]
DEFINED: dict[str, Any] = {"$defs": {"x": {**OBJECT, "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"]}}}
ENDING: list[Any] = [
    {**OBJECT, "properties": {"a": {"$ref": "#"}}},
    {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}},
    {"anyOf": [{**OBJECT, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"const": 1}]},
    {**OBJECT, "properties": {"a": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}, "required": ["a"]},
    {"type": "null", "$defs": {"unused": ENDLESS[0][0]}},
    {"type": "string", "maxLength": 3, "properties": {"a": {"$ref": "#/$defs/x"}}, **DEFINED},
    {"type": ["string", "array"], "maxItems": 0, "items": {"$ref": "#/$defs/x"}, **DEFINED},
    {**OBJECT, "maxProperties": 0, "additionalProperties": {"$ref": "#/$defs/x"}, **DEFINED},
]
NEVER: list[Any] = [{"not": {}}, False, {"anyOf": []}, {"allOf": [{"oneOf": []}]}]


@pytest.mark.parametrize(("schema", "named"), ENDLESS, ids=str)
def test_a_schema_that_no_finite_value_fits_is_refused(schema: Any, named: str) -> None:
    with pytest.raises(Unenforceable, match=f"no finite value fits '{re.escape(named)}"):
        compiled(schema)


@pytest.mark.parametrize("never", NEVER, ids=str)
def test_what_no_value_fits_is_not_called_endless(never: Any) -> None:
    """It is llguidance that refuses it, or leaves out what may be left out."""
    inner = {**OBJECT, "properties": {"a": never}, "required": ["a"]}
    for required in ([], ["b"]):
        schema = {**OBJECT, "properties": {"b": {"$ref": "#/$defs/x"}}, "required": required, "$defs": {"x": inner}}
        try:
            compiled(schema)
        except (InvalidRequest, Unenforceable) as refused:
            assert "finite" not in str(refused)  # noqa: PT017 it may also be taken
    with pytest.raises(Unenforceable, match="no finite value"):
        check_finite({**ENDLESS[0][0], "not": {"const": 1}}, lambda _: ENDLESS[0][0])


def test_a_rule_that_comes_no_times_is_not_in_use() -> None:
    check_rules('start: "a" x{0} (x "b"){0,0} x~0..0 x{1}{0}\nx: x "a"')


def test_names_of_neighbours_count_as_evaluated() -> None:
    schema = {
        **OBJECT,
        "allOf": [{"properties": {"a": True}}],
        "required": ["a"],
        "unevaluatedProperties": False,
        "properties": {"b": {"$ref": "#"}},
    }
    check_finite(schema, lambda _: schema)


@pytest.mark.parametrize("schema", ENDING, ids=str)
def test_a_schema_that_holds_itself_has_replies_that_end(schema: Any) -> None:
    for text in replies(schema):
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize(
    ("grammar", "endless"),
    [
        ('start: "a" start', "start"),
        ('start: "b" | a\na: "(" b ")"\nb: a "c" | a{2,3}', "a"),
        ('root ::= "x" | list\nlist ::= [a-z]+ "," list', "list"),
        ('start: "b" | %json {"items": {"$ref": "#"}, "minItems": 1, "type": "array"}', "#"),
        ('start: x*\nx[capture="y"]: x "a" // and so on', "x"),
        ('start: "(" start? ")"', ""),
        ('start: "a" [ start ] | WORD{2}\nWORD: /[a-z"]+/', ""),
        ('root ::= "(" list ")"\nlist ::= item ("," list)?\nitem ::= [a-z]+ | root', ""),
        ('start: "a" (start){0,2}\nunused: unused "a"', ""),
        ('start: "a" x{0,}\nx: x "a"', "x"),
        ('start: "a" x{0} x?\nx: x "a"', "x"),
        ('start: %json {"enum": ["}: start"]} "b" -> done\n  | start start', ""),
    ],
)
def test_a_rule_without_an_end_is_refused(grammar: str, endless: str) -> None:
    refused = pytest.raises(InvalidRequest, match=f"no finite .* '{endless}'") if endless else contextlib.nullcontext()
    with refused:
        new_matcher(GrammarText("lark", grammar, "grammar"), byte_tokens())


@pytest.mark.parametrize(
    "repeated",
    [
        lambda many: 'start: "a"\n%llguidance\n{' + " " * many + '"no_forcing": false}',
        lambda many: 'start: "a"\n{' + "1" * many + " " * many,
        lambda many: "start: " + "[" * many,
        lambda many: "start: " + "[a " * many,
        lambda many: "start: " + "[]" + " " * many + "[",
        lambda many: 'start: "' + "\\a" * many,
        lambda many: "start: /" + "\\a" * many,
        lambda many: "start: a" + " ~1" * many,
        lambda many: "start: a ~1" + "\n" * many + "%regex" + "\n" * many + "%json" + "\n" * many,
        lambda many: 'start: a -> b\n%json {"a":' * many,
    ],
    ids=range(10),
)
def test_rules_are_read_in_time_that_grows_as_their_text_does(repeated: Callable[[int], str]) -> None:
    """What is four times as long takes less than ten times as long: it would be sixteen if each looked at each."""

    def took(text: str) -> float:
        began = time.thread_time()
        check_rules(text)
        return time.thread_time() - began

    before = math.inf
    for size in (64, 256, 1024, 4096, 16384):
        now = min(took(repeated(size)) for _ in range(3))
        assert now < 10 * before + 0.002, f"{size}: {now} s after {before}"
        before = now


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "-Infinity"])
@pytest.mark.parametrize("key", ["minItems", "minProperties"])
def test_a_count_that_is_no_number_is_refused_by_name(key: str, text: str) -> None:
    inner = f'{{"anyOf": [{{"type": ["array", "object"], "items": {{}}, "{key}": {text}}}]}}'
    said = f"'{key}' is {json.loads(text)}"
    with pytest.raises(Unenforceable, match=said):
        enforceable(json.loads(inner))
    with pytest.raises(InvalidRequest, match=said):
        new_matcher(GrammarText("lark", f'start: "a" | %json {inner}', "grammar"), byte_tokens())


COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties", "maxContains")
NUMBERS = (*COUNTS, "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const")


@pytest.mark.parametrize(
    "number", [math.inf, -math.inf, math.nan, 10**4000, -(10**4000), 1e308, 5e-324, 0.5], ids=range(8)
)
@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_fails_in_another_way_than_by_a_refusal(key: str, number: float) -> None:
    base = {"maximum": 7, "minimum": 0.0, "type": "integer", "prefixItems": [True], "items": {"enum": [1]}}
    item = {"type": "integer", "minimum": 0, key: number}
    for schema in (base | {key: number}, {"uniqueItems": True, "items": {"$ref": "#/$defs/i"}, "$defs": {"i": item}}):
        with contextlib.suppress(Unenforceable, InvalidRequest):
            compiled(schema)


def test_only_what_may_repeat_is_marked() -> None:
    marked = [{"type": "object", "minProperties": 2}, UNIQUE, {"items": UNIQUE}]
    plain = [{**CLOSED, "additionalProperties": False, "minProperties": 2}, {**UNIQUE, "uniqueItems": False}]
    plain += [{"type": "object", "minProperties": 1}, {**UNIQUE, "maxItems": 1}, {"x-differ": ["items"]}]
    assert [MARK in json.dumps(enforceable(one).schema) for one in marked] == [True] * len(marked)
    assert [MARK in json.dumps(enforceable(one).schema) for one in plain] == [False] * len(plain)


@pytest.mark.parametrize("format_", ["uuid4", "password", "binary", "file-path", "url", "int32", "ipv4network", "x y"])
def test_a_format_asks_for_nothing_that_refuses(format_: str) -> None:
    assert replies({"type": "string", "format": format_, "maxLength": 40})


SEVEN, NEWEST = "http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"
BESIDE_REFERENCES: list[Any] = [
    {"$ref": "#/definitions/n", "maximum": 3, "definitions": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}},
    {
        "properties": {"$ref": {"$ref": "#/$defs/n", "const": 12}},
        "$defs": {"n": {"enum": [7, 12]}},
        "required": ["$ref"],
    },
    {"$ref": "#/definitions/n", "not": {"const": 1}, "unknown": 1, "definitions": {"n": {"enum": [1, 2]}}},
    {"enum": [{"$ref": "#", "maximum": 1}]},
]


@pytest.mark.parametrize("draft", [SEVEN, "http://json-schema.org/draft-04/schema#", NEWEST, None])
@pytest.mark.parametrize("schema", BESIDE_REFERENCES, ids=json.dumps)
def test_what_stands_beside_a_reference_is_read_as_its_draft_does(schema: Any, draft: str | None) -> None:
    """By jsonschema, which knows the drafts."""
    named = {"$schema": draft, **schema} if draft else schema
    validator = jsonschema.validators.validator_for(named, default=jsonschema.Draft202012Validator)(named)
    try:
        matcher = compiled(named)
    except (InvalidRequest, Unenforceable):  # of `not`, which llguidance knows none of
        assert "not" in schema
        assert draft in (NEWEST, None)
        return
    values = [1, 2, 3, 7, 9, 12, {"$ref": 7}, {"$ref": 12}, {"$ref": "#", "maximum": 1}]
    assert [accepts(matcher, json.dumps(one)) for one in values] == [validator.is_valid(one) for one in values]


SUITE = os.environ.get("JSON_SCHEMA_SUITE", "")
"""The folder `tests` of JSON Schema's official suite, which jsonschema's source distribution holds as json/tests."""


@pytest.mark.slow
@pytest.mark.skipif(not SUITE, reason="JSON_SCHEMA_SUITE names no folder")
@pytest.mark.parametrize("draft", ["draft2020-12", "draft2019-09", "draft7", "draft6", "draft4"])
def test_the_official_suite(draft: str) -> None:
    """Of each schema that is not refused at once: nothing invalid is let through."""
    let_through, valid = [], []
    for path in sorted((pathlib.Path(SUITE) / draft).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            schema = group["schema"]
            if isinstance(schema, dict) and draft not in ("draft2020-12", "draft2019-09"):
                schema = {"$schema": f"http://json-schema.org/{draft.replace('draft', 'draft-0')}/schema#", **schema}
            try:
                dropped, matcher = enforceable(schema).dropped, compiled(schema)
            except (Unenforceable, InvalidRequest):
                continue
            for test in group["tests"]:
                taken = accepts(matcher, json.dumps(test["data"], ensure_ascii=False))
                if test["valid"]:
                    valid.append(taken)
                elif taken and not dropped:
                    let_through.append((path.name, group["description"], test["description"]))
    assert not let_through
    assert sum(valid) > 0.85 * len(valid) > 200
