"""Constrained replies through the official client, of a model with random weights: the hard case, it wants nothing.

What a reply must match is checked with what the server does not use for it: jsonschema and Python's own expressions.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from prerope.server.api.openai.schemas import ChatRequest
from prerope.server.api.requests.reading import ModelText, read_body
from prerope.server.api.requests.task import ReadTask
from prerope.server.errors import InvalidRequest
from prerope.server.machine.threads import ASIDE
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.structured import compile as compiling
from prerope.server.structured.grammars import Grammars
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.structured.rewrite import enforceable
from prerope.server.structured.text import MAX_GRAMMAR_CHARS, GrammarText
from prerope.server.tokenizer import TextStream, Tokenizer
from prerope.server.workers.lanes import LANES
from prerope.server.workers.pool import Workers
from prerope.server.workers.world import World
from pydantic import BaseModel, Field, TypeAdapter

MODEL = "tiny-llama"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me of a city."}]
PROMPT = "The quick brown fox jumps over the lazy dog, and then"

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["town", "city", "Örtchen 🙂"]},
        "founded": {"type": "integer", "minimum": 0, "maximum": 2100},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        "mayor": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
    },
    "required": ["name", "kind", "founded", "tags", "mayor"],
    "additionalProperties": False,
    "$defs": {
        "tag": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "person": {
            "type": "object",
            "properties": {"age": {"type": "integer", "minimum": 18, "maximum": 99}},
            "required": ["age"],
            "additionalProperties": False,
        },
    },
}
CITY_FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
ROOM = 300
"""Tokens in which any city can be written."""


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), rope_method="rope", max_model_len=1024))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(Checkpoint(str(tiny_checkpoint), MODEL))


class Street(BaseModel):
    number: int = Field(ge=1, le=99)


class Town(BaseModel):
    kind: Literal["port", "spa"]
    streets: list[Street] = Field(min_length=2, max_length=2)


def city(text: str | None) -> Any:
    value = json.loads(text or "")
    jsonschema.Draft202012Validator(CITY).validate(value)
    return value


# --- output matches ---


@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
def test_json_schema(client: OpenAI, temperature: float) -> None:
    cities = []
    for seed in range(2):
        reply = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            response_format=CITY_FORMAT,
            temperature=temperature,
            seed=10 * seed,
            n=2,
            max_tokens=ROOM,
        )
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            cities.append(json.dumps(city(choice.message.content)))
    assert len(set(cities)) == (1 if temperature == 0 else len(cities))


def test_json_object(client: OpenAI) -> None:
    """It has no bound, so a reply may be cut: then it is the beginning of an object."""
    whole = 0
    for seed in range(2):
        reply = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, seed=seed, max_tokens=80
        )
        choice = reply.choices[0]
        assert (choice.message.content or "").startswith("{")
        if choice.finish_reason == "stop":
            whole += 1
            assert isinstance(json.loads(choice.message.content or ""), dict)
    empty = {"type": "object", "maxProperties": 0}
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=40, extra_body={"structured_outputs": {"json": empty}}
    )
    assert json.loads(reply.choices[0].message.content or "") == {}


CHOICES = ["yes", "no", "no way", 'say "no"', "é 🙂\n"]
LARK = 'start: "<" WORD ("," WORD){0,3} ">"\nWORD: /[a-z]{1,5}/'
GBNF = 'root ::= "<" word ">"\nword ::= [a-z] [a-z] [a-z]?'
CONSTRAINTS: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"[A-Z][a-z]{1,8} \d{4}-\d{2}"}, r"[A-Z][a-z]{1,8} [0-9]{4}-[0-9]{2}"),
    ({"choice": CHOICES}, "|".join(map(re.escape, CHOICES))),
    ({"grammar": LARK}, r"<[a-z]{1,5}(,[a-z]{1,5}){0,3}>"),
    ({"grammar": GBNF}, r"<[a-z]{2,3}>"),
]


@pytest.mark.parametrize(("constraint", "pattern"), CONSTRAINTS, ids=["regex", "choice", "lark", "gbnf"])
def test_what_vllm_and_generate_take(
    client: OpenAI, http: httpx.Client, constraint: dict[str, Any], pattern: str
) -> None:
    """Under every name, in chat, completions and /generate, with seeds and greedy."""
    ((name, value),) = constraint.items()
    names: list[dict[str, Any]] = [{"structured_outputs": constraint}, {f"guided_{name}": value}]
    texts = []
    for seed, extra in enumerate(names):
        chat = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=60, seed=seed, extra_body=extra
        )
        plain = client.completions.create(
            model=MODEL, prompt=[PROMPT, "Hi"], n=2, max_tokens=60, temperature=1.5, seed=seed, extra_body=extra
        )
        texts += [chat.choices[0].message.content or "", *(choice.text for choice in plain.choices)]
        assert {chat.choices[0].finish_reason, *(choice.finish_reason for choice in plain.choices)} == {"stop"}
    for sampling in ({"temperature": 0}, {"temperature": 2, "seed": 1, "top_p": 0.9}, {"ignore_eos": True}):
        reply = http.post("/generate", json={"prompt": PROMPT, "max_tokens": 60, **constraint, **sampling}).json()
        assert reply["finish_reason"] == "stop"
        texts.append(reply["text"])
    for text in texts:
        assert re.fullmatch(pattern, text), text
    assert len(set(texts)) > 1


def test_a_schema_for_generate(http: httpx.Client) -> None:
    reply = http.post("/generate", json={"prompt": PROMPT, "max_tokens": ROOM, "json_schema": CITY}).json()
    city(reply["text"])


def test_a_set_has_each_item_once(http: httpx.Client) -> None:
    """Six of eight numbers: a model of no mind would soon write one again. Several choices are held, too, and a reply
    that a stop string may end."""
    schema = TypeAdapter(Annotated[set[Annotated[int, Field(ge=0, le=7)]], Field(min_length=6, max_length=7)])
    body = {"prompt": "1, 1, 2, 2,", "max_tokens": 200, "json_schema": schema.json_schema(), "stream": False}
    texts = []
    for sampling in ({"temperature": 0}, {"stop": ["]"]}, *({"temperature": 1.5, "seed": seed} for seed in range(2))):
        answer = http.post("/generate", json={**body, **sampling})
        assert answer.status_code == 200, answer.text
        assert "x-ignored-fields" not in answer.headers
        texts.append(answer.json()["text"])
    chat = {"messages": MESSAGES, "n": 3, "max_tokens": 200, "seed": 1, "guided_json": schema.json_schema()}
    texts += [one["message"]["content"] for one in http.post("/v1/chat/completions", json=chat).json()["choices"]]
    for text in texts:
        assert len(json.loads(text)) == len(schema.validate_json(text)) >= 6, text


def test_a_set_that_cannot_be_held_is_refused(http: httpx.Client) -> None:
    schema = {"type": "array", "items": {"type": "string", "pattern": "^a+$"}, "uniqueItems": True}
    error = http.post("/generate", json={"prompt": "Hi", "json_schema": schema}).json()["error"]
    assert (error["code"], error["param"]) == ("bad_grammar", "json_schema")
    assert "'uniqueItems' is not held for items that are strings with a 'pattern'" in error["message"]
    assert "leave 'uniqueItems' out, or list the items" in error["message"]


def test_whitespace_is_bounded_and_can_be_forbidden(client: OpenAI, tokenizer: Tokenizer) -> None:
    """A model that likes blanks cannot fill its reply with them."""
    blanks = {str(token): 100 for text in (" ", "\n", "    ", "\n    ") for token in tokenizer.encode(text)}
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": ROOM, "logit_bias": blanks}
    options |= {"temperature": 0}
    spaced = client.chat.completions.create(**options, response_format=CITY_FORMAT).choices[0]
    assert spaced.finish_reason == "stop"
    city(spaced.message.content)
    extra = {"structured_outputs": {"json": json.dumps(CITY), "disable_any_whitespace": True}}
    compact = client.chat.completions.create(**options, extra_body=extra).choices[0].message.content or ""
    city(compact)
    assert not re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', '""', compact))
    assert re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', '""', spaced.message.content or ""))


# --- beside the rest ---


def test_in_one_batch_with_free_text(url: str) -> None:
    """Greedy free text is what it is alone, and every constrained neighbour matches."""

    async def main() -> tuple[list[str], list[str], list[Any]]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:

            def free(index: int) -> Any:
                return many.completions.create(model=MODEL, prompt=f"{PROMPT} {index}", temperature=0, max_tokens=60)

            def bound(seed: int) -> Any:
                return many.chat.completions.create(
                    model=MODEL, messages=MESSAGES, response_format=CITY_FORMAT, seed=seed, max_tokens=ROOM
                )

            alone = [(await free(index)).choices[0].text for index in range(3)]
            both = await asyncio.gather(*(call(index) for index in range(3) for call in (free, bound)))
            return alone, [one.choices[0].text for one in both[::2]], both[1::2]

    alone, together, bound = asyncio.run(main())
    assert together == alone
    for one in bound:
        city(one.choices[0].message.content)


def test_streams_say_the_same(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "response_format": CITY_FORMAT,
        "seed": 5,
        "max_tokens": ROOM,
    }
    whole = client.chat.completions.create(**options).choices[0]
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_does_not_break_a_reply(client: OpenAI, stream: bool) -> None:
    """It ends the reply only where the text before it is complete."""
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "stream": stream, "stop": [",", '"', "c", "0"]}

    def text(**more: Any) -> str:
        reply = client.chat.completions.create(**options, **more)
        if not stream:
            return reply.choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply)

    city(text(response_format=CITY_FORMAT, seed=3, max_tokens=ROOM))
    incomplete = text(seed=3, max_tokens=60, extra_body={"guided_regex": "x[ab]{2}(cd){20}"})
    assert re.fullmatch("x[ab]{2}(cd){20}", incomplete), "no text before a c is complete"
    complete = text(seed=3, max_tokens=60, extra_body={"guided_regex": "x[ab]{2}((cd){20})?", "ignore_eos": True})
    assert re.fullmatch("x[ab]{2}", complete), "the text before the first c is"


def test_the_clients_own_parser(client: OpenAI) -> None:
    """A pydantic model as the format, as the client writes it."""
    reply = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Town, max_tokens=ROOM, seed=1)
    town = reply.choices[0].message.parsed
    assert town is not None
    assert town.kind in ("port", "spa")
    assert len(town.streets) == 2


def test_max_tokens_cuts(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=CITY_FORMAT, max_tokens=3, temperature=0
    )
    assert reply.choices[0].finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(reply.choices[0].message.content or "")


def test_logprobs_are_those_of_free_text(client: OpenAI) -> None:
    """Of the first token, where both have read the same: the raw distribution, not the masked one."""
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1, "logprobs": 5, "temperature": 0}
    free = client.completions.create(**options).choices[0].logprobs
    bound = client.completions.create(**options, extra_body={"guided_regex": "[0-9]{5}"}).choices[0].logprobs
    assert free is not None
    assert bound is not None
    (expected,), (actual,) = free.top_logprobs or [], bound.top_logprobs or []
    assert {key: actual[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert (bound.tokens or [""])[0].isdigit()


# --- refusals ---

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
TEXT = {"prompt": "a"}
USER = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = "response_format.json_schema.schema"


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


BAD: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (CHAT, {**USER, **schema_format({"type": "wizard"})}, SCHEMA, ["JSON schema", "wizard"]),
    (CHAT, {**USER, **schema_format({"$ref": "https://example.com/x.json"})}, SCHEMA, ["JSON schema"]),
    (CHAT, {**USER, **schema_format({"$ref": "file:///etc/passwd"})}, SCHEMA, ["JSON schema"]),
    (CHAT, {**USER, **schema_format({"$ref": "#/$defs/none"})}, SCHEMA, ["JSON schema"]),
    (CHAT, {**USER, **schema_format({"not": {"type": "string"}})}, SCHEMA, ["JSON schema", "not"]),
    (CHAT, {**USER, **schema_format(False)}, SCHEMA, ["JSON schema"]),
    (CHAT, {**USER, **schema_format({"enum": ["x" * MAX_GRAMMAR_CHARS]})}, SCHEMA, ["65536", "characters"]),
    (CHAT, {**USER, **schema_format({"enum": ["\ud800"]})}, f"{SCHEMA}.enum[0]", ["surrogate"]),
    (CHAT, {**USER, **schema_format("text")}, SCHEMA, ["object", "a string"]),
    (
        CHAT,
        {**USER, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        ["schema"],
    ),
    (CHAT, {**USER, "response_format": {"type": "json_schema"}}, "response_format", ["json_schema"]),
    (CHAT, {**USER, "response_format": {"type": "yaml"}}, "response_format", ["yaml", "json_schema"]),
    (
        CHAT,
        {**USER, "response_format": {"type": "json_object"}, "guided_regex": "a"},
        "guided_regex",
        ["response_format", "guided_regex", "give one"],
    ),
    (CHAT, {**USER, "structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", ["json", "choice"]),
    (
        CHAT,
        {**USER, "structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs.choice",
        ["give one"],
    ),
    (CHAT, {**USER, "structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ["grammar"]),
    (
        CHAT,
        {**USER, "structured_outputs": {"jason": {"type": "object"}}},
        "structured_outputs.jason",
        ["did you mean", "json"],
    ),
    (COMPLETIONS, {**TEXT, "structured_outputs": {"json": "{"}}, "structured_outputs.json", ["JSON schema"]),
    (COMPLETIONS, {**TEXT, "guided_regex": "(a"}, "guided_regex", ["regular expression"]),
    (COMPLETIONS, {**TEXT, "guided_regex": "(?=a)b"}, "guided_regex", ["regular expression", "look"]),
    (GENERATE, {**TEXT, "regex": r"(a)\1"}, "regex", ["regular expression"]),
    (GENERATE, {**TEXT, "regex": "(" * 5000 + ")" * 5000}, "regex", ["regular expression"]),
    (GENERATE, {**TEXT, "regex": 5}, "regex", ["string"]),
    (GENERATE, {**TEXT, "choice": []}, "choice", ["at least one"]),
    (GENERATE, {**TEXT, "choice": "ab"}, "choice", ["list"]),
    (GENERATE, {**TEXT, "choice": ["a", 5]}, "choice[1]", ["choice[1]", "string"]),
    (GENERATE, {**TEXT, "choice": ["a"] * 5000}, "choice", ["4096", "5000"]),
    (GENERATE, {**TEXT, "grammar": "start: nothing"}, "grammar", ["grammar", "nothing"]),
    (GENERATE, {**TEXT, "grammar": "start: " + "(" * 50000}, "grammar", ["grammar"]),
    (GENERATE, {**TEXT, "grammar": "start: " + "(" * 30000 + '"a"' + ")" * 30000}, "grammar", ["nested"]),
    (GENERATE, {**TEXT, "grammar": "root ::= " + "(" * 30000 + '"a"' + ")" * 30000}, "grammar", ["recursion"]),
    (GENERATE, {**TEXT, "grammar": "start: @elsewhere"}, "grammar", ["grammar"]),
    (GENERATE, {**TEXT, "regex": "a", "json_schema": {}}, "regex", ["json_schema", "regex", "give one"]),
    (GENERATE, {**TEXT, "json_schema": [1]}, "json_schema", ["object", "a list"]),
    (GENERATE, {**TEXT, "response_format": {"type": "json_object"}}, "response_format", ["own field"]),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_constraints(http: httpx.Client, path: str, body: dict[str, Any], param: str, words: list[str]) -> None:
    for sent in (body, {**body, "stream": True}):
        response = http.post(path, content=json.dumps(sent), headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text[:500]
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert len(error["message"]) < 800
        for word in words:
            assert word in error["message"], error["message"]
        for path_of_machine in ("/root", "/usr", "site-packages", ".rs:", ".py"):
            assert path_of_machine not in error["message"]


def test_refusals_are_the_clients_exceptions(client: OpenAI) -> None:
    bad: Any = schema_format({"type": "wizard"})["response_format"]
    with pytest.raises(openai.BadRequestError, match="wizard") as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=bad, stream=True)
    assert refused.value.code == "bad_grammar"


# --- compiling ---


def test_what_nests_deep_is_read_by_a_worker_or_refused(tokenizer: Tokenizer) -> None:
    text = ModelText(tokenizer, ("tiny",), True, 2048, tokenizer.vocab_size)

    def body(depth: int, name: str, inner: str) -> bytes:
        deep = "[" * depth + "]" * depth
        return f'{{"messages":[{{"role":"user","content":"Hi"}}],"{name}":{inner % deep}}}'.encode()

    schema = '{"type":"json_schema","json_schema":{"name":"x","schema":{"const":%s}}}'
    tool = '[{"type":"function","function":{"name":"f","parameters":{"x":%s}}}]'

    async def main() -> None:
        workers = Workers(lambda: World(text), LANES)
        try:
            read = await workers.run(ReadTask(ChatRequest, [body(120, "response_format", schema)], False), "small body")
        finally:
            workers.close()
        assert "[" * 120 in read.prepared.constraint.text
        assert read.body.response_format.json_schema.schema_ == {}

    asyncio.run(main())
    for depth in (900, 990, 10_000):
        for name, inner in (("tools", tool), ("response_format", schema), ("guided_json", json.dumps(schema))):
            with pytest.raises(InvalidRequest, match="nest"):
                read_body(ChatRequest, body(depth, name, inner), text)


def test_what_a_worker_looked_at_is_not_looked_at_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(compiling, "check_rules", looked.append)
    grammar = GrammarText("lark", 'start: "a"', "grammar")
    compiling.compile_here(grammar, tokenizer, compiling.Cost(1, 0))
    assert not looked
    compiling.new_matcher(grammar, compiling.token_tables(tokenizer, "grammar"))
    assert looked == [grammar.text]


def test_who_leaves_while_a_grammar_is_compiled_leaves_no_trace_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    raised, begun, go_on = list[Any](), threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def compiled() -> threading.Thread:
        begun.set()
        assert go_on.wait(20)
        return threading.current_thread()

    async def leave() -> None:
        result = compiling.on_a_deep_stack(compiled)
        client = asyncio.ensure_future(asyncio.wrap_future(result))
        await asyncio.to_thread(begun.wait, 20)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        go_on.set()
        thread = await asyncio.to_thread(result.result, 20)
        await asyncio.to_thread(thread.join, 20)

    asyncio.run(leave())
    assert raised == []


def test_slow_masks_are_the_same_and_computed_by_a_thread_that_steps_aside(tokenizer: Tokenizer) -> None:
    """None of Python's, which would keep the interpreter's lock while it waits for a core."""
    tables = compiling.token_tables(tokenizer, "regex")
    grammar = CompiledGrammar(compiling.new_matcher(GrammarText("regex", "[a-f]{3}x*", "regex"), tables), tables)
    quick, slow = grammar.matcher(), CompiledGrammar(grammar._prototype, tables, slow=True).matcher()
    size = -(-tables.vocab_size // 8)
    for text in ("a", "bc", "xx"):
        (token_id,) = tokenizer.encode(text, add_special_tokens=False)[-1:]
        assert slow.mask()[:size] == quick.mask()[:size]
        quick.accept(token_id)
        slow.accept(token_id)
        slow._slow = True  # it was not, in truth
    if sys.platform == "linux":
        pythons = {thread.native_id for thread in threading.enumerate()}
        others = [int(task.name) for task in Path("/proc/self/task").iterdir() if int(task.name) not in pythons]
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert min(19, own + ASIDE) in [os.getpriority(os.PRIO_PROCESS, task) for task in others]
        assert {os.getpriority(os.PRIO_PROCESS, task or 0) for task in pythons} == {own}


def test_compiled_grammars_are_kept_and_bounded_by_bytes(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        grammars = Grammars(lambda: tokenizer, workers)
        grammars.kept.max_bytes = 16 * 2**20
        first = await grammars.compile(GrammarText("regex", "a0", "regex"))
        assert await grammars.compile(GrammarText("regex", "a0", "guided_regex")) is first
        assert await grammars.compile(GrammarText("regex", "a0", "regex"), "another tenant") is not first
        assert await grammars.compile(GrammarText("lark", 'start: "a0"', "grammar")) is not first
        twice = GrammarText("json", "{}", "json_schema")
        one, other = await asyncio.gather(grammars.compile(twice), grammars.compile(twice))
        assert one is other
        large = await grammars.compile(GrammarText("regex", "a" * 8000, "regex"))
        assert 2**20 < large.num_bytes <= grammars.kept.num_bytes <= grammars.kept.max_bytes
        sets = {f"{i}": {"items": {"enum": [i, -1 - i]}, "type": "array", "uniqueItems": True} for i in range(150)}
        text = json.dumps(enforceable({"properties": sets, "additionalProperties": False}).schema)
        assert (await grammars.compile(GrammarText("json", text, "json_schema"))).num_bytes > 6 * 2**20
        for index in range(6):
            await grammars.compile(GrammarText("regex", f"{index}" * 8000, "regex"))
            assert grammars.kept.num_bytes <= grammars.kept.max_bytes
        assert await grammars.compile(GrammarText("regex", "a0", "regex")) is not first

    workers = Workers(lambda: World(ModelText(tokenizer, ("tiny",), True, 2048, tokenizer.vocab_size)), LANES)

    async def closing() -> None:
        try:
            await main()
        finally:
            workers.close()

    asyncio.run(closing())


@given(st.lists(st.sampled_from(["x", "ab", "cd", "a", "b", "c", "d", "e", "🙂"]), max_size=12), st.data())
def test_stop_strings_with_a_condition_do_not_depend_on_the_pieces(
    tokenizer: Tokenizer, words: list[str], data: st.DataObject
) -> None:
    """Against a search over the whole text: of the stop strings after an even number of letters, the first to end."""
    text = "".join(words)
    stop = ["ab", "bc", "abcd", "d"]
    places = sorted((i + len(s), i) for s in stop for i in range(len(text)) if text.startswith(s, i) and i % 2 == 0)
    expected = text[: places[0][1]] if places else text
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stop, may_stop=lambda before: len(before) % 2 == 0)
    found = ""
    while ids:
        size = data.draw(st.integers(1, len(ids)))
        found += stream.push(ids[:size])
        ids = ids[size:]
    assert found + stream.finish() == expected
    assert stream.stopped == bool(places)
