"""Items and names that must differ, over a real vocabulary: whatever a model draws that likes to repeat itself, no
reply comes to where nothing may follow, and each that ends is valid by jsonschema."""

from __future__ import annotations

import functools
import json
import os
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st
from llguidance import LLTokenizer
from prerope.server.errors import InvalidRequest
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.structured.compile import differing_parts, new_matcher
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.structured.rewrite import enforceable
from prerope.server.structured.text import GrammarText
from prerope.server.structured.unique.mask import SPECIAL, vocabulary
from prerope.server.structured.values import Unenforceable
from prerope.server.tokenizer import Tokenizer

from tests.fuzz.budget import budget

TOKENIZER = os.environ.get("UNIQUE_TOKENIZER", "")
"""A tokenizer.json in place of the embedded model's."""

SMALL = b'",[]{}:0123456789-.ab\\ \n'
STEPS = 400


@functools.cache
def tables(smollm2: Checkpoint) -> LLTokenizer:
    return LLTokenizer(TOKENIZER or Tokenizer.load(smollm2).backend_json)


def grammar(schema: Any, tokenizer: LLTokenizer, *, compact: bool = False) -> CompiledGrammar:
    said = enforceable(schema)
    if said.dropped:
        raise Unenforceable(str(said.dropped))
    wanted = GrammarText("json", json.dumps(said.schema), "json_schema", compact=compact)
    return CompiledGrammar(new_matcher(wanted, tokenizer), tokenizer, parts=differing_parts(wanted, tokenizer))


def written(grammar: CompiledGrammar, tokenizer: LLTokenizer, rng: random.Random) -> str | None:
    """A reply; None for one that has not ended in time. What was drawn behind a token comes again behind it, where it
    may."""
    texts, matcher, ids = vocabulary(tokenizer).texts, grammar.matcher(), list[int]()
    again, small, steps = rng.random(), rng.random(), rng.choice([30, 100, STEPS // 2])
    behind: dict[int, list[int]] = {}
    while len(ids) < STEPS:
        bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), count=len(texts), bitorder="little")
        allowed = np.flatnonzero(bits & plain(tokenizer))
        assert not matcher.failure, matcher.failure
        if matcher.finished or (matcher.accepting and (len(ids) > steps or not len(allowed) or rng.random() < 0.1)):
            return b"".join(texts[token] for token in ids).decode()
        assert len(allowed), f"nothing may follow {b''.join(texts[token] for token in ids)!r}"
        last = ids[-1] if ids else -1
        liked = [token for token in behind.get(last, ()) if bits[token] and rng.random() < again]
        if len(ids) > steps:
            liked = [token for token in vocabulary(tokenizer).bytes.values() if bits[token] and texts[token] in b']}"']
        elif not liked and rng.random() < small:
            liked = [token for token in vocabulary(tokenizer).bytes.values() if bits[token] and texts[token] in SMALL]
        token = rng.choice(liked) if liked else int(allowed[rng.randrange(len(allowed))])
        behind.setdefault(last, []).append(token)
        matcher.accept(token)
        assert not matcher.failure, matcher.failure
        ids.append(token)
    return None


@functools.cache
def plain(tokenizer: LLTokenizer) -> Any:
    """Which tokens are text."""
    texts = vocabulary(tokenizer).texts
    return np.array([bool(text) and not text.startswith(SPECIAL) for text in texts], np.uint8)


class Writer:
    """Writes schemas with something that must differ."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def scalar(self) -> dict[str, Any]:
        rng = self.rng
        low = rng.choice([-12, -1, 0, 1, 5, 98])
        return rng.choice(
            [
                {"type": "integer"},
                {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 1, 9, 30, 1000])},
                {"type": "integer", "exclusiveMinimum": low},
                {"type": "number"},
                {"type": "string"},
                {"type": "string", "minLength": rng.randrange(3)},
                {"type": "string", "maxLength": rng.choice([1, 1, 2, 5]), "minLength": rng.randrange(2)},
                {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "email", "time", "unknown"])},
                {
                    "enum": rng.sample(
                        ["a", "ab", "", '"', "é", "\\", 1, 12, -1, 0, 1.5, None, True], rng.randrange(1, 7)
                    )
                },
                {"type": ["boolean", "null"]},
                {"const": rng.choice([1, "a"])},
                {
                    "enum": rng.sample(
                        ["north", "northern", "nor", "south east", "it is", "it was"], rng.randrange(2, 6)
                    )
                },
            ]
        )

    def unique(self) -> dict[str, Any]:
        rng = self.rng
        items = self.scalar() if rng.random() < 0.7 else {"anyOf": [self.scalar(), self.scalar()]}
        schema: dict[str, Any] = {"type": "array", "items": items, "uniqueItems": True}
        if rng.random() < 0.5:
            schema["minItems"] = rng.choice([1, 2, 3, 8])
        if rng.random() < 0.3:
            schema["maxItems"] = rng.choice([3, 9, 20])
        return schema

    def names(self) -> dict[str, Any]:
        rng, least = self.rng, self.rng.randrange(2, 5)
        schema: dict[str, Any] = {"type": "object", "minProperties": least}
        schema["additionalProperties"] = self.schema(3) if rng.random() < 0.7 else True
        if rng.random() < 0.5:
            schema["properties"] = {name: self.scalar() for name in rng.sample(["a", "b", "ab", '"'], 2)}
        return schema

    def schema(self, depth: int = 0) -> dict[str, Any]:
        rng = self.rng
        kind = rng.random()
        if depth > 2 or kind < 0.5:
            return self.unique() if rng.random() < 0.75 or depth > 2 else self.names()
        inner = self.schema(depth + 1)
        if kind < 0.6:
            return {"anyOf": [inner, {"type": "null"}]}
        if kind < 0.75:
            return {"type": "array", "items": inner, "maxItems": 4}
        if kind < 0.85:
            return {"type": "object", "additionalProperties": inner, "maxProperties": 4}
        properties = {"a": inner, "b": self.scalar(), "c": self.schema(depth + 1)}
        return {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> LLTokenizer:
    return tables(smollm2)


@given(seed=st.integers(0, 2**32 - 1))
@budget(30, phases=[Phase.generate])  # a smaller seed is no smaller schema
def test_what_must_differ_does(seed: int, tokenizer: LLTokenizer) -> None:
    rng = random.Random(seed)
    schema = Writer(rng).schema()
    try:
        compiled = grammar(schema, tokenizer, compact=rng.random() < 0.5)
    except (Unenforceable, InvalidRequest):
        return
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for _ in range(3):
        text = written(compiled, tokenizer, rng)
        if text is not None:
            broken = [*validator.iter_errors(json.loads(text))]
            assert not broken, f"{json.dumps(schema)} let {text} through: {broken[0].message}"


def test_a_quote_that_is_escaped_ends_nothing(tokenizer: LLTokenizer) -> None:
    """Behind a backslash the first quote of the token `""` is within a string, and its second ends it."""
    words = vocabulary(tokenizer)
    token = words.texts.index(b'""')

    def allowed(begun: bytes) -> bool:
        matcher = grammar({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, tokenizer).matcher()
        for byte in begun:
            matcher.accept(words.bytes[byte])
        assert not matcher.failure
        return bool(matcher.mask()[token >> 3] >> (token & 7) & 1)

    assert allowed(b'["b","a\\')
    assert not allowed(b'["a\\"","a\\')
    assert allowed(b'["b",')
    assert not allowed(b'["",')
