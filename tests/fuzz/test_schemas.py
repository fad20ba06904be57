"""JSON schemas at random: each is refused at once, or every reply that its grammar lets through is valid by jsonschema.

Replies are drawn byte by byte from the grammar alone, out of few letters, so that names and values meet.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
from hypothesis import given
from hypothesis import strategies as st
from prerope.server.errors import InvalidRequest
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.structured.rewrite import enforceable
from prerope.server.structured.values import Unenforceable

from tests.fuzz.budget import budget
from tests.server.structured.test_rewrite import allowed, compiled_text

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
NAMES = ("a", "b", "ab", "k", "é", 'a"b', "x1")
PATTERNS = ("^a", "^x", "b$", "^a$", "^[ab]+$", "a|b$", "^(a|b){1,2}$", "x", "^\\d+$", "\\.", "^.$", "^$", "")
FORMATS = ("date", "time", "ipv4", "email", "uuid", "hostname", "uri", "unknown")
BOUNDS = (0, 1, -1, 5, 10, 1.5, -2.25, 0.1, 100, 1e-7, 1e20, 2**63, 2**53 + 1, -(2**63))
NUMBERS = (0, 1, -1, 2, 10, 1.0, 1.5, 0.1, -0.5, 100, 1e3)
TEXTS = ("", "a", "b", "ab", "é", "a\n", "1", '"', "\\")
LETTERS = b'ab\\u0061"{}[]:,1.-x50kntf'
DULL = b" \r\n\teE"
LONG = 500


class Writer:
    """Writes schemas. `now(share)` is true so often."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions = rng.choice([(), (), ("p", "q")])

    def now(self, share: float) -> bool:
        return self.rng.random() < share

    def document(self) -> Any:
        schema = self.schema(0)
        if isinstance(schema, dict) and self.definitions:
            schema["$defs"] = {name: self.schema(1) for name in self.definitions}
        return schema

    def schema(self, depth: int) -> Any:
        if self.now(0.06):
            return self.rng.choice([True, False, {}])
        simple = ("string", "integer", "number", "boolean", "null")
        types = self.rng.sample(simple if depth > 2 else TYPES, 2 if self.now(0.1) else 1)
        schema: dict[str, Any] = {} if self.now(0.1) else {"type": types if len(types) > 1 else types[0]}
        for type_ in types:
            getattr(self, f"_{type_}", self._anything)(schema, depth)
        self._anything(schema, depth)
        pairs = list(schema.items())
        self.rng.shuffle(pairs)
        return dict(pairs)

    def some(self, schema: dict[str, Any], depth: int, **makers: tuple[float, Callable[[int], Any]]) -> None:
        for name, (share, make) in makers.items():
            if self.now(share):
                schema[name] = make(depth + 1)

    def _object(self, schema: dict[str, Any], depth: int) -> None:
        rng = self.rng
        names: list[Any] = [True, {"enum": ["a", "k"]}, {"type": "string"}, {"pattern": "^a"}, {"maxLength": 2}]
        names += [{"const": "a"}, {"format": "date"}, {"type": "string", "enum": ["a", 1]}, {"type": "integer"}]
        self.some(
            schema,
            depth,
            properties=(0.7, lambda d: {name: self.schema(d) for name in rng.sample(NAMES, 2)}),
            patternProperties=(0.3, lambda d: {one: self.schema(d) for one in rng.sample(PATTERNS, 1)}),
            additionalProperties=(0.5, lambda d: rng.choice([False, True, self.schema(d)])),
            required=(0.4, lambda _: rng.sample(NAMES, rng.randrange(3))),
            minProperties=(0.2, lambda _: rng.randrange(4)),
            maxProperties=(0.2, lambda _: rng.randrange(4)),
            propertyNames=(0.25, lambda _: rng.choice(names)),
            unevaluatedProperties=(0.1, lambda d: rng.choice([False, self.schema(d)])),
        )

    def _array(self, schema: dict[str, Any], depth: int) -> None:
        rng = self.rng
        listed = lambda d: {"type": rng.choice(TYPES), "enum": [self.value(d) for _ in range(3)]}  # noqa: E731
        self.some(
            schema,
            depth,
            items=(0.7, lambda d: rng.choice([self.schema, listed, lambda _: {"type": "boolean"}])(d)),
            prefixItems=(0.3, lambda d: [self.schema(d)]),
            additionalItems=(0.15, lambda _: rng.choice([False, {"type": "string"}])),
            minItems=(0.3, lambda _: rng.randrange(3)),
            maxItems=(0.3, lambda _: rng.randrange(4)),
            uniqueItems=(0.4, lambda _: rng.choice([True, True, False])),
            unevaluatedItems=(0.1, lambda d: rng.choice([False, self.schema(d)])),
        )

    def _string(self, schema: dict[str, Any], depth: int) -> None:
        self.some(
            schema,
            depth,
            minLength=(0.3, lambda _: self.rng.choice([0, 1, 2.0])),
            maxLength=(0.3, lambda _: self.rng.choice([1, 2, 3])),
            pattern=(0.3, lambda _: self.rng.choice(PATTERNS)),
            format=(0.2, lambda _: self.rng.choice(FORMATS)),
        )

    def _number(self, schema: dict[str, Any], depth: int) -> None:
        bound = (0.25, lambda _: self.rng.choice(BOUNDS))
        bounds = dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), bound)
        self.some(schema, depth, **bounds, multipleOf=(0.2, lambda _: self.rng.choice([1, 2, 3, 0.5, 7, 1000])))

    _integer = _number

    def _anything(self, schema: dict[str, Any], depth: int) -> None:
        branches = (0.0 if depth > 2 else 0.06, lambda d: [self.schema(d) for _ in range(self.rng.randrange(1, 4))])
        self.some(
            schema,
            depth,
            enum=(0.06, lambda d: [self.value(d) for _ in range(2)]),
            const=(0.03, self.value),
            anyOf=branches,
            oneOf=branches,
            allOf=branches,
        )
        if self.definitions and self.now(0.08):
            schema["$ref"] = f"#/$defs/{self.rng.choice(self.definitions)}"

    def value(self, depth: int) -> Any:
        kind = self.rng.randrange(7 if depth < 2 else 5)
        if kind > 4:
            parts = [self.value(depth + 1) for _ in range(self.rng.randrange(3))]
            return parts if kind == 5 else dict(zip(NAMES, parts, strict=False))
        return self.rng.choice([NUMBERS, (True, False, 0, 1), TEXTS, ("a", "b"), (None,)][kind])


def drawn(grammar: CompiledGrammar, rng: random.Random) -> str | None:
    """A reply; None for one that has not ended in time."""
    matcher, text, length = grammar.matcher(), bytearray(), rng.choice([20, 60, 120])
    while len(text) < LONG:
        if matcher.finished or (matcher.accepting and (len(text) > length or rng.random() < 0.15)):
            return text.decode()
        following = allowed(matcher)
        if not following:
            assert matcher.accepting, f"stuck after {text!r}"
            return text.decode()
        liked = b'"}],0' if len(text) > length else LETTERS if rng.random() < 0.85 else bytes(range(256))
        dull = [byte for byte in following if byte not in DULL] or following
        byte = rng.choice([byte for byte in dull if byte in liked] or dull)
        matcher.accept(byte)
        assert not matcher.failure, matcher.failure
        text.append(byte)
    return None


@given(st.integers(0, 2**32 - 1))
@budget(120)
def test_a_schema_is_held_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    schema = Writer(rng).document()
    try:
        said = enforceable(schema)
        grammar = compiled_text(json.dumps(said.schema))
    except (Unenforceable, InvalidRequest):
        return
    # jsonschema takes an empty pattern of names for none.
    judged = json.loads(json.dumps(schema).replace('"patternProperties": {"":', '"patternProperties": {"(?:)":'))
    validator = jsonschema.Draft202012Validator(judged, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for _ in range(6):
        text = drawn(grammar, rng)
        if text is None:
            continue
        broken = [error for error in validator.iter_errors(json.loads(text)) if error.validator not in said.dropped]
        assert not broken, f"{json.dumps(schema)} let {text} through: {broken[0].message}"
