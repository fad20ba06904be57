"""Tool calls: the reader on texts as models write them, and the server through the official client.

The embedded model's template takes no tools, so the servers here have templates of their own, in the shape of published
ones. Their model is random: what it must call is held by the grammar, and what it may call is tested on the reader.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import BadRequestError, OpenAI
from prerope.server.api.chat.parts import ArgumentsPart, CallPart, ChatReply
from prerope.server.api.chat.reasoning import ReasoningReader
from prerope.server.api.chat.tool_calls import TextReader, ToolCallReader
from prerope.server.api.chat.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    QWEN_TAGS,
    SMOLLM2,
    ToolFormat,
    ToolUse,
    format_of,
)
from prerope.server.api.chat.xml_calls import XmlCallReader, types_of
from prerope.server.api.openai.chat import _Writer
from prerope.server.api.openai.schemas import ChatRequest
from prerope.server.api.requests.internal import Chat
from prerope.server.api.running import Running
from prerope.server.api.stream.generation import Piece
from prerope.server.engine.outputs import FinishReason
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer

from tests.tiers import every

MODEL = "tiny-tools"
MESSAGES: list[Any] = [{"role": "user", "content": "How warm is it in Paris?"}]

HERMES_TEMPLATE = """{%- if tools %}<|im_start|>system
Functions: {{ tools | tojson }}. Write calls as
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MISTRAL_TEMPLATE = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% for c in m.tool_calls or [] %}[TOOL_CALLS][{{ c.function | tojson }}]{% endfor %}{% endfor %}"""
NAMED_TEMPLATE = MISTRAL_TEMPLATE.replace(
    "[TOOL_CALLS][{{ c.function | tojson }}]",
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
)
UNREAD_TEMPLATE = "{{ tools }}<tool_call>x<arg_key>{% for m in messages %}{{ m.content }}{% endfor %}"
TAGS_TEMPLATE = """{%- if tools %}{{ tools | tojson }}
{{- '\\n<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>' }}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>{% for name, value in call.function.arguments | items %}
<parameter={{ name }}>
{{ value if value is string else value | tojson }}
</parameter>{% endfor %}
</function>
</tool_call>{% endfor %}
{% endfor %}"""


def function(name: str, schema: dict[str, Any] | None) -> Any:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"$ref": "#/$defs/unit"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["°C", "°F"]}},
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["utc", "cet"]}}, "additionalProperties": False}
TOOLS = [function("get_weather", WEATHER), function("get-time", TIME), function("now", None)]
SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "get-time": TIME, "now": {"maxProperties": 0}}

# --- the reader ---

NAMES = ["get_weather", "now"]
ARGUMENTS = '{"city": "a } \\" ] b", "deep": [{"x": [1]}]}'
OTHER = '{"city": "Rom 🙂"}'


def call_text(arguments: str = ARGUMENTS, name: str = "get_weather", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


Expected = tuple[str | None, list[tuple[str, str]]]
TEXTS: list[tuple[ToolFormat, str, Expected]] = [
    (HERMES, "Just text.", ("Just text.", [])),
    (HERMES, " text \n", (" text \n", [])),
    (HERMES, f"<tool_call>\n{call_text()}\n</tool_call>", (None, [("get_weather", ARGUMENTS)])),
    (
        HERMES,
        f"Let me see. \n\n<tool_call>{call_text()}</tool_call>\n<tool_call>\n{call_text(OTHER)}\n</tool_call>\n",
        ("Let me see.", [("get_weather", ARGUMENTS), ("get_weather", OTHER)]),
    ),
    (HERMES, f"<tool_call>\n{call_text()}\n</tool_call> Done.", (" Done.", [("get_weather", ARGUMENTS)])),
    (HERMES, "a <tool_ca b", ("a <tool_ca b", [])),
    (HERMES, "a <tool_ca", ("a <tool_ca", [])),
    (HERMES, f"x <tool_call>\n{call_text(name='other')}\n</tool_call>", None),
    (HERMES, "x <tool_call>\n{'name': 'now'}\n</tool_call> y", None),
    (HERMES, "x <tool_call>now</tool_call> y", None),
    (HERMES, '<tool_call>{"name": "now", "argu', None),
    (HERMES, '<tool_call>\n{"arguments": {"a": 1}, "name": "now"}\n</tool_call>', (None, [("now", '{"a": 1}')])),
    (
        HERMES,
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        (None, [("now", '{"a": 1}')]),
    ),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "cut', (None, [("now", '{"a": "cut')])),
    (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {}, "id": "x}"}</tool_call>',
        (None, [("now", "{}")]),
    ),
    (
        SMOLLM2,
        f"<tool_call>[{call_text()}, {call_text(OTHER)}]</tool_call>",
        (None, [("get_weather", ARGUMENTS), ("get_weather", OTHER)]),
    ),
    (
        MISTRAL,
        f"[TOOL_CALLS] [{call_text()}, {call_text(OTHER)}]",
        (None, [("get_weather", ARGUMENTS), ("get_weather", OTHER)]),
    ),
    (
        MISTRAL_NAMED,
        f"I look. [TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]abc123XYZ[ARGS] {{}} Done.",
        ("I look. Done.", [("get_weather", ARGUMENTS), ("now", "{}")]),
    ),
    (MISTRAL_NAMED, "[TOOL_CALLS]other[ARGS]{}", None),
    (MISTRAL_NAMED, "[TOOL_CALLS]now[ARGS]1", None),
    (MISTRAL_NAMED, '[TOOL_CALLS]now[ARGS]{"a": "cut', (None, [("now", '{"a": "cut')])),
    (MISTRAL_NAMED, "[TOOL_CALLS]" + "x" * 300, None),
    (MISTRAL, "[TOOL] [1]", ("[TOOL] [1]", [])),
    (LLAMA, call_text(key="parameters"), (None, [("get_weather", ARGUMENTS)])),
    (
        LLAMA,
        "\n" + call_text(key="parameters") + "; " + call_text(OTHER),
        (None, [("get_weather", ARGUMENTS), ("get_weather", OTHER)]),
    ),
    (LLAMA, '{"type": "function", "name": "now", "parameters": {}}', (None, [("now", "{}")])),
    (LLAMA, '{"type": "function", "function": {"name": "now", "parameters": {}}}', (None, [("now", "{}")])),
    (LLAMA, '{"answer": {"name": "now"}} and more', None),
    (LLAMA, '{"name": "Bob", "parameters": {}} is text', None),
    (LLAMA, "{} is text", None),
    (LLAMA, "It is warm. " + call_text(), None),
    (LLAMA, "", ("", [])),
]


def read(form: ToolFormat, pieces: list[str], **options: Any) -> Expected:
    reader = ToolCallReader(form, NAMES, **options)
    reply = ChatReply.of([part for piece in pieces for part in reader.push(piece)] + reader.finish())
    calls = reply.calls
    assert reader.num_calls == len(calls)
    assert len({call.id for call in calls}) == len(calls)
    return (reply.text or None) if calls else reply.text, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize(("form", "text", "expected"), TEXTS, ids=lambda value: str(value)[:50])
def test_calls_in_texts(form: ToolFormat, text: str, expected: Expected | None) -> None:
    """Whole, and one character at a time. None: it is text, all of it."""
    for pieces in ([text], list(text)):
        assert read(form, pieces) == (expected or (text, []))


@pytest.mark.parametrize(
    ("form", "whole"),
    [
        (HERMES, f"<tool_call>\n{call_text()}\n</tool_call>"),
        (HERMES, '<tool_call>\n{"arguments": {"a": 1}, "name": "now"}\n</tool_call>'),
        (SMOLLM2, f"<tool_call>[{call_text()}, {call_text(OTHER)}]</tool_call>"),
        (MISTRAL, f"[TOOL_CALLS] [{call_text()}, {call_text(OTHER)}]"),
        (MISTRAL_NAMED, f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]abc123XYZ[ARGS] {{}}"),
        (LLAMA, '{"type": "function", "name": "now", "parameters": {}}'),
        (
            QWEN_TAGS,
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
@pytest.mark.parametrize("before", ["", "Let me see.\n"])
def test_a_call_that_is_cut_is_no_text(form: ToolFormat, whole: str, before: str) -> None:
    """Wherever the limit falls: words that stand before it, and calls whose names are known, are all there is."""
    if before and not form.begin:
        return
    for place in range(len(whole)):
        for pieces in ([before + whole[:place]], list(before + whole[:place])):
            use = ToolUse([], form, {}, True, None, {name: {} for name in NAMES})
            reader = XmlCallReader(use.types, lambda: "id") if form.tags else ToolCallReader(form, NAMES)
            parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish(cut=True)
            reply = ChatReply.of(parts)
            left = "<" if before and place == 1 and whole[0] == "<" else "[" if before and place == 1 else ""
            assert reply.text.strip() == f"{before}{left}".strip(), whole[:place]


def test_a_cut_text_that_looks_like_a_call_stays() -> None:
    for form, text in (
        (LLAMA, '{"name": "Bo'),
        (LLAMA, '{"answer": '),
        (HERMES, "if a < b <"),
        (HERMES, 'x <tool_call>{"name": "oth'),
        (HERMES, "words and \n"),
    ):
        reader = ToolCallReader(form, NAMES)
        assert ChatReply.of([*reader.push(text), *reader.finish(cut=True)]).text == text


@given(st.sampled_from(TEXTS), st.data())
def test_how_a_text_is_cut_changes_nothing(case: Any, data: st.DataObject) -> None:
    form, text, _ = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == read(form, [text])


@given(
    st.sampled_from([HERMES, SMOLLM2, MISTRAL, MISTRAL_NAMED, LLAMA]),
    st.text(alphabet='<tool_call>/[]{}":, \nnamegumtsTOL_CARGSw', max_size=60),
)
def test_any_text_is_read(form: ToolFormat, text: str) -> None:
    """Nothing that a model writes is an error, and text without calls is left as it is."""
    content, calls = read(form, list(text))
    if not calls:
        assert content == text


TYPES = {
    "get_weather": types_of(
        {
            "properties": {
                "city": {"type": "string"},
                "days": {"$ref": "#/$defs/days"},
                "deep": {"anyOf": [{"type": "array"}, {"type": "null"}]},
                "unit": {"enum": ["1", "2", None]},
                "loop": {"$ref": "#/properties/loop"},
            },
            "$defs": {"days": {"type": ["integer", "null"]}},
        }
    ),
    "now": {},
}
HEAD = "<tool_call>\n<function=get_weather>\n"
END = "</function>\n</tool_call>"
NOW = "<tool_call>\n<function=now>\n" + END


def argument(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>\n"


TAGGED: list[tuple[str, Expected | None]] = [
    ("Just < text. ", None),
    (HEAD + argument("city", "7") + argument("days", "7") + END, (None, [("get_weather", '{"city": "7", "days": 7}')])),
    (HEAD + argument("city", 'a "b"\n</x>\n') + END, (None, [("get_weather", '{"city": "a \\"b\\"\\n</x>\\n"}')])),
    (
        HEAD + argument("deep", '[{"x": 1}]') + argument("unit", "null") + END,
        (None, [("get_weather", '{"deep": [{"x": 1}], "unit": null}')]),
    ),
    *(
        (HEAD + argument("deep", value) + END, (None, [("get_weather", json.dumps({"deep": value}))]))
        for value in ("NaN", "[1e999]", '["\\ud800"]')  # JSON for Python alone
    ),
    (HEAD + argument("unit", "2") + END, (None, [("get_weather", '{"unit": "2"}')])),
    (
        HEAD + argument("other", "True") + argument("loop", "x") + END,
        (None, [("get_weather", '{"other": true, "loop": "x"}')]),
    ),
    (f"Let me see.\n\n{NOW}\n{NOW}\n", ("Let me see.", [("now", "{}"), ("now", "{}")])),
    ("<function=now>\n</function> Done.", (" Done.", [("now", "{}")])),
    (HEAD + argument("city", "Rome") + "<parameter=days>\n1", (None, [("get_weather", '{"city": "Rome"')])),
    (HEAD + argument("city", "Rome") + "</tool_call>", (None, [("get_weather", '{"city": "Rome"}')])),
    ("<tool_call>\n<function=other>\n</function>\n</tool_call> x", None),
    ("a <tool_call> b <function", None),
    ("<tool_call>" + " " * 300, None),
]


def read_tagged(pieces: list[str], **options: Any) -> Expected:
    ids = iter(range(99))
    reader = XmlCallReader(TYPES, lambda: str(next(ids)), **options)
    reply = ChatReply.of([part for piece in pieces for part in reader.push(piece)] + reader.finish())
    assert reader.num_calls == len(reply.calls)
    return (reply.text or None) if reply.calls else reply.text, [(call.name, call.arguments) for call in reply.calls]


@pytest.mark.parametrize(("text", "expected"), TAGGED, ids=lambda value: str(value)[:40])
def test_calls_between_tags(text: str, expected: Expected | None) -> None:
    for pieces in ([text], list(text)):
        assert read_tagged(pieces) == (expected or (text, []))


def test_one_call_between_tags_where_calls_may_not_be_parallel() -> None:
    assert read_tagged([NOW + HEAD + argument("city", "x") + END], parallel=False) == (None, [("now", "{}")])


@given(st.text(alphabet="<tool_call>/=function parameter\nnow", max_size=60))
def test_any_text_with_tags_is_read(text: str) -> None:
    content, calls = read_tagged(list(text))
    assert (content, calls) == read_tagged([text])
    if not calls:
        assert content == text


def test_arguments_stream_as_they_are_written() -> None:
    reader = ToolCallReader(HERMES, NAMES)
    assert reader.push('<tool_call>\n{"name": "now", "arg') == []
    assert reader.push('uments": ') == []
    start, first = reader.push('{"a": ')
    assert isinstance(start, CallPart)
    assert (start.index, start.name) == (0, "now")
    assert first == ArgumentsPart(0, '{"a": ')
    assert reader.push("[1, 2") == [ArgumentsPart(0, "[1, 2")]


def test_one_call_where_calls_may_not_be_parallel() -> None:
    text = f"<tool_call>\n{call_text()}\n</tool_call>\n<tool_call>\n{call_text(OTHER)}\n</tool_call>"
    assert read(HERMES, [text], parallel=False) == (None, [("get_weather", ARGUMENTS)])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (HERMES_TEMPLATE, HERMES),
        (MISTRAL_TEMPLATE, MISTRAL),
        (UNREAD_TEMPLATE, None),
        (TAGS_TEMPLATE, QWEN_TAGS),
        ('{{- \'<tool_call>\\n{"name": "\' }}{{ tool_call.name }}', HERMES),
        ('<tool_call>[\n{"name": "func_name1", "arguments": {}}]</tool_call>', SMOLLM2),
        ('Respond in the format {"name": function name, "parameters": dictionary}.', LLAMA),
        (NAMED_TEMPLATE, MISTRAL_NAMED),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", None),
    ],
)
def test_the_format_is_the_templates(template: str, form: ToolFormat | None) -> None:
    assert format_of(template) == form


# --- the server ---


def with_template(source: Path, folder: Path, template: str, **renamed: str) -> Path:
    """A copy of a checkpoint with another chat template, and tokens of its tokenizer renamed."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = text.replace(f"<{old}>", new)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_checkpoint, tmp_path_factory.mktemp("tools") / MODEL, HERMES_TEMPLATE)


@pytest.fixture(scope="module")
def url(serve_module: Any, checkpoint: Path) -> str:
    return str(serve_module(model_id=str(checkpoint), rope_method="rope", max_model_len=2048))


def checked(message: Any) -> list[str]:
    """Names of the calls; their arguments must be valid."""
    for call in message.tool_calls or []:
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        jsonschema.Draft202012Validator(SCHEMAS[call.function.name]).validate(arguments)
    return [call.function.name for call in message.tool_calls or []]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_required_call_always_parses(client: OpenAI, temperature: float) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        temperature=temperature,
        seed=3,
        n=4,
        max_tokens=200,
        parallel_tool_calls=False,
    )
    for choice in reply.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(checked(choice.message)) == 1


def test_several_calls_may_be_required(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS[2:], tool_choice="required", seed=1, n=4, max_tokens=600
    )
    counts = [len(checked(choice.message)) for choice in reply.choices]
    assert all(choice.finish_reason == "tool_calls" for choice in reply.choices)
    assert max(counts) > 1


@pytest.mark.parametrize("name", ["get_weather", "get-time", "now"])
def test_a_named_function_is_called(client: OpenAI, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "seed": 2,
        "max_tokens": 200,
        "stop": ["}", '"'],
    }
    whole = client.chat.completions.create(**options).choices[0]
    assert checked(whole.message) == [name]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert [part.function.name for part in parts if part.id] == [name]
    assert parts[0].type == "function"
    streamed = "".join(part.function.arguments or "" for part in parts)
    assert whole.message.tool_calls is not None
    assert streamed == whole.message.tool_calls[0].function.arguments
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].finish_reason == whole.finish_reason == "tool_calls"


def test_auto_leaves_text_free(client: OpenAI) -> None:
    """A model that calls nothing answers, with the tools in its prompt; with `none` they are not even there."""
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    plain, none, auto = (
        client.chat.completions.create(**options, **more)
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    )
    assert none.choices[0].message == plain.choices[0].message
    assert auto.usage is not None
    assert plain.usage is not None
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens + 100
    streamed = client.chat.completions.create(**options, tools=TOOLS, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == auto.choices[0].message.content


def test_pieces_of_a_stream(checkpoint: Path) -> None:
    """What an auto reply that calls a function sends, chunk by chunk."""
    tokenizer = Tokenizer.load(Checkpoint(str(checkpoint), MODEL))
    body = ChatRequest.model_validate({"messages": MESSAGES, "tools": TOOLS, "stream": True})
    service: Any = SimpleNamespace(tokenizer=tokenizer)
    request = body.lowered()
    assert isinstance(request.input, Chat)
    writer = _Writer(service, body, Running("id", request, [], ToolUse.of(tokenizer, request.input)))
    texts = ["Well. ", "<tool_", 'call>\n{"name": "now",', ' "arguments": {', "}}\n</tool", "_call>"]
    parts = [part for text in texts for part in writer.parts(0, Piece(text))]
    parts += writer.parts(0, Piece("", finish_reason=FinishReason.STOP))
    calls = [part["delta"]["tool_calls"][0] for part in parts if "tool_calls" in part["delta"]]
    assert [part["delta"].get("content") for part in parts if "content" in part["delta"]] == ["Well."]
    assert calls[0]["function"] == {"name": "now", "arguments": ""}
    assert [call["function"]["arguments"] for call in calls[1:]] == ["{", "}"]
    assert parts[-1]["finish_reason"] == "tool_calls"
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_a_conversation_with_calls(client: OpenAI, url: str) -> None:
    """The reply goes back as it came, with the function's answer; the template writes both."""
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    message = reply.choices[0].message
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    answer = {"role": "tool", "tool_call_id": call.id, "content": "21 °C"}
    history: list[Any] = [*MESSAGES, message, answer]
    assert client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS, max_tokens=4).choices
    sent = [*MESSAGES, message.model_dump(exclude_none=True), answer]
    ids = httpx.post(f"{url}/tokenize", json={"messages": sent}).json()["tokens"]
    text = httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"]
    arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    written = f'<tool_call>\n{{"name": "{call.function.name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    assert text.endswith(f"{written}\n<|im_start|>user\n21 °C<|im_end|>\n<|im_start|>assistant\n")


def test_tags_are_read_where_calls_are_free_and_held_as_json_where_they_are_not(
    serve: Any, byte_checkpoint: Path, tmp_path: Path
) -> None:
    """No schema can hold values without quotes, so a required call is Hermes'; the template writes what was called."""
    folder = with_template(byte_checkpoint, tmp_path / MODEL, TAGS_TEMPLATE)
    tokenizer = Tokenizer.load(Checkpoint(str(folder), MODEL))
    body = ChatRequest.model_validate({"messages": MESSAGES, "tools": TOOLS}).lowered().input
    assert isinstance(body, Chat)
    use = ToolUse.of(tokenizer, body)
    assert use is not None
    assert (use.form, use.grammar, use.types["get_weather"]["days"]) == (QWEN_TAGS, None, {"integer"})
    url = serve(model_id=str(folder), rope_method="rope", max_model_len=2048)
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200}
        message = (
            client.chat.completions.create(**options, tool_choice="required", seed=1, parallel_tool_calls=False)
            .choices[0]
            .message
        )
        assert len(checked(message)) == 1
        assert client.chat.completions.create(**options, seed=1).choices[0].message.content
    sent = [*MESSAGES, message.model_dump(exclude_none=True)]
    ids = httpx.post(f"{url}/tokenize", json={"messages": sent}).json()["tokens"]
    text = httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"]
    assert message.tool_calls is not None
    assert f"<tool_call>\n<function={message.tool_calls[0].function.name}>" in text


ROOMS = function(
    "rooms",
    {
        "type": "object",
        "properties": {
            "n": {"type": "array", "items": {"enum": [*range(8)]}, "uniqueItems": True, "minItems": 6, "maxItems": 6}
        },
        "required": ["n"],
        "additionalProperties": False,
    },
)


def each_room_once(reply: Any) -> None:
    calls = [call for choice in reply.choices for call in choice.message.tool_calls]
    whole = [json.loads(call.function.arguments)["n"] for call in calls if call.function.arguments.endswith("]}")]
    assert whole
    assert all(len(numbers) == len(set(numbers)) == 6 for numbers in whole)


def test_items_of_a_call_differ_where_they_must(client: OpenAI) -> None:
    for parallel in (False, True):
        each_room_once(
            client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                tools=[*TOOLS[:1], ROOMS],
                tool_choice={"type": "function", "function": {"name": "rooms"}},
                parallel_tool_calls=parallel,
                seed=1,
                n=3,
                max_tokens=400,
            )
        )


def test_items_of_a_tool_that_cannot_be_held_to_differ(client: OpenAI) -> None:
    """Refused where the tool is strict; else left out, and named."""
    items = {"type": "array", "items": {"type": "object"}, "uniqueItems": True}
    parameters = {"type": "object", "properties": {"n": items}, "required": ["n"]}
    asked: Any = {"model": MODEL, "messages": MESSAGES, "tool_choice": "required", "max_tokens": 4}
    lax = client.chat.completions.with_raw_response.create(tools=[function("rooms", parameters)], **asked)
    assert lax.headers["x-ignored-fields"] == "tools.function.parameters.uniqueItems"
    strict = function("rooms", parameters)
    strict["function"]["strict"] = True
    with pytest.raises(BadRequestError, match="'uniqueItems' is not held for items that are lists or objects"):
        client.chat.completions.create(tools=[strict], **asked)


@pytest.mark.parametrize("template", every(2, [MISTRAL_TEMPLATE, NAMED_TEMPLATE]), ids=["list", "named"])
def test_marks_that_are_special_tokens(serve: Any, byte_checkpoint: Path, tmp_path: Path, template: str) -> None:
    """Mistral's marks are tokens that text leaves out: the grammar asks for them by id, and the reader sees them."""
    renamed = {"repo_name": "[TOOL_CALLS]", "file_sep": "[ARGS]"}
    folder = with_template(byte_checkpoint, tmp_path / MODEL, template, **renamed)
    tokenizer = Tokenizer.load(Checkpoint(str(folder), MODEL))
    mark = tokenizer.special_id("[TOOL_CALLS]")
    assert mark is not None
    url = serve(model_id=str(folder), rope_method="rope", max_model_len=2048)
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        reply = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            seed=1,
            max_tokens=400,
            logprobs=True,
            parallel_tool_calls=False,
        )
        free = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            tools=[{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS],
            seed=1,
            n=3,
            max_tokens=100,
            logit_bias={str(mark): 100},
            parallel_tool_calls=False,
        )
        rooms = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=[ROOMS], tool_choice="required", seed=2, n=3, max_tokens=200
        )
    for one in free.choices:
        assert len(checked(one.message)) == 1, "the model is made to write the mark, and the rest follows"
    each_room_once(rooms)
    choice = reply.choices[0]
    assert len(checked(choice.message)) == 1
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert len(choice.message.tool_calls[0].id) == 9
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].token == "[TOOL_CALLS]"


# --- refusals ---

BAD: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"tools": [{"type": "function"}]}, "tools.0.function", ["function"]),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.custom", ["one parameter of the type string"]),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools.0.type", ["function"]),
    ({"tools": [function("a b", None)]}, "tools.0.function.name", ["name"]),
    ({"tools": [function("f", {"type": "string"})]}, "tools.0.function.parameters", ["object"]),
    ({"tools": [function("f", None), function("f", None)]}, "tools", ["two functions", "'f'"]),
    ({"tools": [function(f"f{i}", None) for i in range(129)]}, "tools", ["128"]),
    ({"tool_choice": "required"}, "tool_choice", ["needs 'tools'"]),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", ["'required'"]),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
        ["'other'", "'tools' does not hold"],
    ),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", ["tools", "give one"]),
    (
        {"tools": [function("f", {"properties": {"x": {"type": "wizard"}}})], "tool_choice": "required"},
        "tools",
        ["wizard"],
    ),
    ({"functions": [{"name": "f"}]}, "functions", ["use 'tools'"]),
    (
        {
            "messages": [
                {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
            ]
        },
        "messages",
        ["tool_calls", "assistant"],
    ),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_tools(url: str, body: dict[str, Any], param: str, words: list[str]) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES, **body}, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    for word in words:
        assert word in error["message"], error["message"]


@pytest.mark.parametrize("template", every(2, [None, UNREAD_TEMPLATE]), ids=["embedded", "unread"])
def test_templates_without_tools(serve: Any, tiny_checkpoint: Path, tmp_path: Path, template: str | None) -> None:
    """The embedded model's, and one whose calls are written in a way that is not read here: tools are told in words."""
    path = tiny_checkpoint if template is None else with_template(tiny_checkpoint, tmp_path / MODEL, template)
    url = serve(model_id=str(path), max_model_len=2048)
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        options: dict[str, Any] = {"model": path.name, "tools": TOOLS, "max_tokens": 200}
        must: dict[str, Any] = {"messages": MESSAGES, "tool_choice": "required", "seed": 1, "temperature": 2}
        reply = client.chat.completions.create(n=4, **must, **options)
        for choice in reply.choices:  # agents take one call for an answer, and two for a mistake
            assert (choice.finish_reason, len(checked(choice.message))) == ("tool_calls", 1)
        several = client.chat.completions.create(n=4, parallel_tool_calls=True, **must, **options)
        assert any(len(choice.message.tool_calls or []) > 1 for choice in several.choices)
        message = reply.choices[0].message
        assert message.tool_calls is not None
        answers: list[Any] = [
            {"role": "tool", "tool_call_id": call.id, "content": "21 °C"} for call in message.tool_calls
        ]
        history: list[Any] = [*MESSAGES, message, *answers]
        assert client.chat.completions.create(messages=history, **options | {"max_tokens": 4}).choices
        sent = [*MESSAGES, message.model_dump(exclude_none=True), *answers]
        body = {"messages": sent, "tools": TOOLS}
        ids = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
        text = httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"]
        assert '"name": "get_weather", "description": "Does get_weather."' in text
        assert f'<tool_call>\n{{"name": "{message.tool_calls[0].function.name}", "arguments": ' in text
        assert "<tool_response>\n21 °C\n</tool_response>" in text
        assert "21 °C" in httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_cut_before_its_call_is_named_comes_back(url: str, stream: bool) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for limit in range(1, 12):
            must: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "tool_choice": "required", "max_tokens": limit}
            if stream:
                chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **must))
                choices = [chunk.choices[0] for chunk in chunks]
                text, reason = "".join(one.delta.content or "" for one in choices), choices[-1].finish_reason
                sent: Any = {"role": "assistant", "content": text}
            else:
                choice = client.chat.completions.create(messages=MESSAGES, **must).choices[0]
                text, reason, sent = choice.message.content or "", choice.finish_reason, choice.message
            assert (text, reason) == ("", "length")
            history: Any = [*MESSAGES, sent, {"role": "user", "content": "Go on."}]
            assert client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS, max_tokens=2).choices


@pytest.mark.parametrize("cut", ["{", '{"city": "Par', '{"city": "Paris", "unit"', '{"a": nonsense', ""])
def test_a_call_that_was_cut_short_comes_back(url: str, cut: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": cut}}
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    body = {"messages": [*history, {"role": "user", "content": "Go on."}], "tools": TOOLS, "max_tokens": 2}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text


THOUGHTS = [
    ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.\n", "Yes."),
    ("Hm.</think>Yes.", True, "Hm.", "Yes."),
    ("\n<think>Hm", False, "Hm", ""),
    ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
    ("<thin", False, "", "<thin"),
    ("", False, "", ""),
    ("<think>a </thin b</think>c", False, "a </thin b", "c"),
]


@pytest.mark.parametrize(("text", "thinking", "thought", "answer"), THOUGHTS)
def test_thoughts_are_told_apart(text: str, thinking: bool, thought: str, answer: str) -> None:
    for pieces in ([text], list(text)):
        reader = ReasoningReader(TextReader(), thinking=thinking)
        parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
        reply = ChatReply.of(parts)
        assert (reply.reasoning, reply.text) == (thought, answer)


def test_thoughts_reach_the_client(serve: Any, byte_checkpoint: Path, tmp_path: Path) -> None:
    """A template that begins thoughts, as DeepSeek's does."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n"
    folder = with_template(byte_checkpoint, tmp_path / MODEL, template)
    url = serve(model_id=str(folder), max_model_len=256)
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 20, "guided_choice": ["Hm.</think>Warm."]}

    def message(**more: Any) -> dict[str, Any]:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body | more, timeout=60).json()
        return dict(reply["choices"][0]["message"])

    assert (message()["reasoning_content"], message()["content"]) == ("Hm.", "Warm.")
    assert "reasoning_content" not in message(include_reasoning=False)
    assert message(separate_reasoning=False)["content"] == "Hm.</think>Warm."
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        extra = {"guided_choice": body["guided_choice"]}
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, extra_body=extra)
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Warm."
