"""Other servers' APIs through their own clients: Anthropic's, OpenAI's Responses, Ollama's, TGI's and SGLang's."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import anthropic
import httpx
import ollama
import openai
import pytest
from anthropic.types.beta.message_count_tokens_params import MessageCountTokensParams as CountParams
from anthropic.types.beta.message_create_params import MessageCreateParamsStreaming as MessageParams
from huggingface_hub import InferenceClient
from prerope.server.api.dialects.lowering.anthropic import CountTokensRequest, MessagesRequest
from prerope.server.api.errors import instead_of

from tests.tiers import every

TOOL_TEMPLATE = """{%- if tools %}{{ '<|im_start|>system\\n<tools>' + tools | tojson + '</tools> <tool_call> name' }}
{{- '<|im_end|>\\n' }}{%- endif %}{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' + c.function | tojson + '\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
{#- tool system developer -#}"""
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "Say something."}]
MODEL = "tiny-llama"
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model with a template that takes tools."""
    folder = tmp_path_factory.mktemp("tools") / MODEL
    shutil.copytree(tiny_checkpoint, folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TOOL_TEMPLATE}))
    return str(serve_module(model_id=str(folder), max_model_len=2048, api_key="secret"))


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, headers={"authorization": "Bearer secret"}) as client:
        yield client


def expected_chat(http: httpx.Client, max_tokens: int = 8, **more: Any) -> str:
    """What OpenAI's endpoint says, greedily."""
    body = {"messages": ASKED, "max_tokens": max_tokens, "temperature": 0, **more}
    return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


# --- Anthropic ---


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        yield client


def test_anthropic_messages(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    reply = claude.messages.create(model=MODEL, max_tokens=8, messages=ASKED, extra_body=GREEDY)  # type: ignore[arg-type]
    assert reply.content[0].type == "text"
    assert reply.content[0].text == expected_chat(http)
    assert reply.stop_reason in ("max_tokens", "end_turn")
    assert reply.usage.output_tokens == 8
    counted = claude.messages.count_tokens(model=MODEL, messages=ASKED)  # type: ignore[arg-type]
    assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


def test_anthropic_stream_blocks_and_system(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    blocks = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Say something.", "cache_control": {"type": "ephemeral"}}],
        }
    ]
    with claude.messages.stream(model=MODEL, max_tokens=8, messages=blocks, extra_body=GREEDY) as stream:  # type: ignore[arg-type]
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == expected_chat(http)  # type: ignore[union-attr]
    silent: Any = [*ASKED, {"role": "assistant", "content": None}, *ASKED]
    assert claude.messages.create(model=MODEL, max_tokens=2, messages=silent).usage.output_tokens <= 2
    system = claude.messages.create(model=MODEL, max_tokens=8, messages=ASKED, system="Be brief.", extra_body=GREEDY)  # type: ignore[arg-type]
    both = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert system.content[0].text == expected_chat(http, messages=both)  # type: ignore[union-attr]


def test_a_reply_of_anthropics_shape_has_content_when_its_call_is_cut(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "weather", "description": "of a city", "input_schema": WEATHER}]
    asked: Any = {"tools": tools, "tool_choice": {"type": "tool", "name": "weather"}, "extra_body": GREEDY}
    for max_tokens in range(8, 80, 12):
        reply = claude.messages.create(model=MODEL, max_tokens=max_tokens, messages=ASKED, **asked)
        assert reply.content, f"clients read content[0]; cut at {max_tokens}"


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools_there_and_back(claude: anthropic.Anthropic, stream: bool) -> None:
    tools: Any = [{"name": "weather", "description": "of a city", "input_schema": WEATHER}]
    asked: Any = {"model": MODEL, "max_tokens": 200, "tools": tools, "tool_choice": {"type": "tool", "name": "weather"}}
    if stream:
        with claude.messages.stream(messages=ASKED, **asked) as events:  # type: ignore[arg-type]
            reply = events.get_final_message()
    else:
        reply = claude.messages.create(messages=ASKED, **asked)  # type: ignore[arg-type]
    assert reply.stop_reason == "tool_use"
    (use,) = [block for block in reply.content if block.type == "tool_use"]
    assert use.name == "weather"
    assert use.input["city"] in ("Paris", "Rome")  # type: ignore[index]
    history: Any = [
        *ASKED,
        {"role": "assistant", "content": [block.model_dump() for block in reply.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]},
    ]
    again = claude.messages.create(model=MODEL, max_tokens=4, messages=history, tools=tools)
    assert again.usage.output_tokens <= 4


def test_anthropic_schemas_prefills_and_stops(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 100, "messages": ASKED, "extra_body": GREEDY}
    form: Any = {"format": {"type": "json_schema", "schema": WEATHER}, "effort": "low"}
    reply: Any = claude.messages.create(output_config=form, **asked)
    assert json.loads(reply.content[0].text)["city"] in ("Paris", "Rome")
    begun: Any = [*ASKED, {"role": "assistant", "content": "The answer is"}]
    reply = claude.messages.create(**{**asked, "messages": begun, "max_tokens": 8})
    assert reply.content[0].text == expected_chat(http, messages=begun, continue_final_message=True)
    for word in expected_chat(http, 30).split():
        if word.isalpha():
            stopped = claude.messages.create(stop_sequences=["never", word], **asked)
            assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
            break


def test_every_field_of_anthropics_client_is_known() -> None:
    for params, request in ((MessageParams, MessagesRequest), (CountParams, CountTokensRequest)):
        known = {*request._names(), *request.foreign, *request.synonyms}
        assert not set(get_type_hints(params)) - known, request.__name__


def test_anthropic_refuses_pictures_by_name(claude: anthropic.Anthropic) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "aaaa"}
    with pytest.raises(anthropic.BadRequestError, match="text only") as refused:
        claude.messages.create(
            model=MODEL,
            max_tokens=4,
            messages=[{"role": "user", "content": [{"type": "image", "source": source}]}],  # type: ignore[typeddict-item,list-item]
        )
    assert refused.value.body["type"] == "error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError) as nowhere:
        claude.messages.batches.list()
    assert nowhere.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": [[]]}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": 5}]}),
        ("/v1/messages", {"max_tokens": 1, "messages": ASKED, "tools": [{"name": "f", "input_schema": [1]}]}),
        ("/v1/messages", {"max_tokens": 1, "messages": ASKED, "tools": [{"name": "f" * 999, "input_schema": {}}]}),
    ],
    ids=str,
)
def test_what_an_adapter_makes_may_be_refused(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


# --- Responses ---


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_responses_text_and_stream(client: openai.OpenAI, http: httpx.Client) -> None:
    reply = client.responses.create(model=MODEL, input="Say something.", temperature=0, max_output_tokens=8)
    assert reply.output_text == expected_chat(http)
    assert reply.usage is not None
    assert reply.usage.output_tokens == 8
    text, types = "", []
    for event in client.responses.create(
        model=MODEL,
        input=ASKED,
        temperature=0,
        max_output_tokens=8,
        stream=True,  # type: ignore[arg-type]
    ):
        types.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == reply.output_text
    assert types[:2] == ["response.created", "response.in_progress"]
    assert types[-1] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize("called", [False, True])
def test_items_of_a_response_end_as_they_were_told(client: openai.OpenAI, called: bool) -> None:
    """Also where the reply was cut short."""
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER}
    more: Any = {"tools": [tool], "tool_choice": "required"} if called else {}
    for limit in (2, 8, 24, 60, 200):
        events = list(client.responses.create(model=MODEL, input="x", max_output_tokens=limit, stream=True, **more))
        reply = events[-1].response  # type: ignore[union-attr]
        assert reply.output == [event.item for event in events if event.type == "response.output_item.done"]
        assert reply.output[-1].status == reply.status  # type: ignore[union-attr]


def test_responses_go_on(client: openai.OpenAI, http: httpx.Client) -> None:
    first = client.responses.create(model=MODEL, input="Say something.", temperature=0, max_output_tokens=8)
    second = client.responses.create(
        model=MODEL, input="And more.", previous_response_id=first.id, temperature=0, max_output_tokens=8
    )
    whole = [*ASKED, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And more."}]
    assert second.output_text == expected_chat(http, messages=whole)
    with pytest.raises(openai.BadRequestError, match="not kept here"):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp-" + "0" * 32)


def test_responses_go_on_without_more_input(client: openai.OpenAI, http: httpx.Client) -> None:
    first = client.responses.create(model=MODEL, input="Say something.", temperature=0, max_output_tokens=8)
    more: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 8}
    second = client.responses.create(previous_response_id=first.id, **more)
    whole = [*ASKED, {"role": "assistant", "content": first.output_text}]
    assert second.output_text == expected_chat(http, messages=whole)
    with pytest.raises(openai.BadRequestError, match="'input' is missing") as refused:
        client.responses.create(**more)
    assert refused.value.param == "input"


LONG = "word " * 3000


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/responses", {"input": [{"role": "user", "content": LONG}]}, "input"),
        ("/v1/responses", {"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}, "messages"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
    ],
)
def test_a_refusal_names_the_field_of_its_dialect(http: httpx.Client, path: str, body: Any, field: str) -> None:
    error = http.post(path, json=body).json()["error"]
    assert error["param"].split(".")[0].split("[")[0] == field
    for other in {"input", "messages", "prompt"} - {field}:
        assert f"'{other}" not in error["message"]


def test_ollama_takes_what_says_how_a_request_is_run(http: httpx.Client) -> None:
    few: dict[str, Any] = {"stream": False, "options": {"num_predict": 4, "temperature": 0}}
    body = {**few, "messages": ASKED}
    own = {"timeout_s": 60, "priority": 0, "cache_salt": "s", "rope": {"method": "rerope", "window": 64}}
    assert http.post("/api/chat", json={**body, **own}).status_code == 200
    assert http.post("/api/generate", json={**few, "prompt": "x", **own}).status_code == 200
    late = http.post("/api/chat", json={**body, "timeout_s": 1e-6})
    assert late.status_code == 504
    refused = http.post("/api/chat", json={**body, "rope": {"method": "no such"}})
    assert refused.status_code == 400


def test_responses_are_kept_and_forgotten(client: openai.OpenAI, http: httpx.Client) -> None:
    more: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 8, "metadata": {"a": "b"}}
    first = client.responses.create(input="Say something.", **more)
    items: Any = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And more. " * 600}]
    events = list(client.responses.create(input=items, previous_response_id=first.id, stream=True, **more))
    second = events[-1].response  # type: ignore[union-attr]
    for one in (first, second):
        assert client.responses.retrieve(one.id) == one
    listed = list(client.responses.input_items.list(second.id, order="asc", limit=2))  # of four, two pages
    texts = [one.content[0].text for one in listed]  # type: ignore[union-attr, index]
    assert texts == ["Say something.", first.output_text, "Yes.", items[1]["content"]]
    newest = client.responses.input_items.list(second.id, limit=1)
    assert newest.data == listed[-1:]
    assert newest.has_more
    client.responses.delete(first.id)
    for gone in (first.id, "resp-" + "0" * 32, client.responses.create(input="x", store=False, **more).id):
        with pytest.raises(openai.NotFoundError, match="not kept here"):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError, match="not kept here"):
            client.responses.delete(gone)
    assert client.responses.create(input="x", previous_response_id=second.id, **more).status
    assert http.get(f"/v1/responses/{second.id}", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert http.get(f"/v1/responses/{second.id}?stream=true").status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    every(
        2,
        [
            ("/v1/responses", {"input": "Say something.", "instructions": "Be brief."}),
            ("/v1/completions", {"prompt": ["Once upon", "One two three"]}),
            ("/v1/messages", {"messages": ASKED, "max_tokens": 4, "system": "Be brief."}),
            ("/v1/chat/completions", {"messages": ASKED}),
        ],
    ),
)
def test_any_body_is_told_as_the_token_ids_that_answer_it(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    told = http.post(f"{path}/render", json=body).json()
    rendered = told if isinstance(told, list) else [told]
    texts = [http.post("/detokenize", json={"tokens": one["token_ids"]}).json()["prompt"] for one in rendered]
    if path == "/v1/completions":
        assert texts == body["prompt"]
    else:
        assert texts[0].endswith("Say something.<|im_end|>\n<|im_start|>assistant\n")
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    usage = http.post(path, json={**body, length: 2}).json()["usage"]
    counted = usage.get("prompt_tokens", usage.get("input_tokens")) + usage.get("cache_read_input_tokens", 0)
    assert counted == sum(len(one["token_ids"]) for one in rendered)
    for bad in ({"temperature": "hot"}, {length: 100_000}, {"guided_regex": "(a"}):
        answers = [http.post(one, json={**body, **bad}) for one in (f"{path}/render", path)]
        assert [one.status_code for one in answers] == [400, 400], bad
        assert answers[0].json()["error"] == answers[1].json()["error"], bad
    asked = http.post(path, json={**body, length: 2, "return_token_ids": True})
    if path in ("/v1/responses", "/v1/messages"):
        assert asked.status_code == 400
        assert asked.json()["error"]["message"].startswith("'return_token_ids'")
    else:
        assert "token_ids" in asked.text
    if path == "/v1/messages":
        for cut in (5, -1):
            cutting = {**body, "truncate_prompt_tokens": cut}
            count = http.post(f"{path}/count_tokens", json=cutting).json()["input_tokens"]
            assert count == len(http.post(f"{path}/render", json=cutting).json()["token_ids"])
        assert http.post(f"{path}/count_tokens", json={**body, "truncate_prompt_tokens": 5}).json()["input_tokens"] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_functions(client: openai.OpenAI, stream: bool) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
    asked: Any = {
        "model": MODEL,
        "tools": tools,
        "tool_choice": "required",
        "max_output_tokens": 400,
        "parallel_tool_calls": False,
    }
    if stream:
        events = list(client.responses.create(input="The weather?", stream=True, **asked))
        reply = events[-1].response  # type: ignore[union-attr]
    else:
        reply = client.responses.create(input="The weather?", **asked)
    (item,) = [one for one in reply.output if one.type == "function_call"]
    assert json.loads(item.arguments)["city"] in ("Paris", "Rome")
    history: Any = [
        {"role": "user", "content": "The weather?"},
        *[one.model_dump() for one in reply.output],
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"},
    ]
    assert client.responses.create(model=MODEL, input=history, tools=tools, max_output_tokens=4).status


def test_responses_follow_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "w", "schema": WEATHER}}
    reply = client.responses.create(model=MODEL, input="x", text=form, max_output_tokens=100)
    assert json.loads(reply.output_text)["city"] in ("Paris", "Rome")


def test_a_conversation_goes_on_and_is_ones_own(client: openai.OpenAI, http: httpx.Client) -> None:
    """Whole as it was, read by a worker (it is long) or here; and counted."""
    for padding in ("", "And so on. " * 400):
        first = client.responses.create(model=MODEL, input=f"One. {padding}", max_output_tokens=4)
        history = [{"role": "user", "content": f"One. {padding}"}, *(item.model_dump() for item in first.output)]
        history.append({"role": "user", "content": "Two."})
        whole = client.responses.create(model=MODEL, input=history, max_output_tokens=4)
        again = client.responses.create(model=MODEL, input="Two.", previous_response_id=first.id, max_output_tokens=4)
        assert again.usage is not None
        assert whole.usage is not None
        assert again.usage.input_tokens == whole.usage.input_tokens
    held = next(line for line in http.get("/metrics").text.splitlines() if 'cache="conversations"' in line)
    assert held.startswith("prerope:cache_bytes")
    assert float(held.split()[-1]) > 2 * 400 * len("And so on. ")


def test_responses_tell_log_probabilities(client: openai.OpenAI, http: httpx.Client) -> None:
    """As a chat does; whole, in a stream, and where a worker reads the body."""
    for asked in ("Say something.", "Say something. " * 300):
        body: Any = {"messages": [{"role": "user", "content": asked}], "logprobs": True, "top_logprobs": 2}
        known = http.post("/v1/chat/completions", json={**body, "max_tokens": 6, **GREEDY}).json()["choices"][0]
        scores = known["logprobs"]["content"]
        wanted: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0}
        more: Any = {"model": MODEL, "input": asked, "max_output_tokens": 6, "metadata": {"a": "b"}, **wanted}
        reply = client.responses.create(**more)
        assert reply.metadata == {"a": "b"}
        (item,) = reply.output
        assert [one.model_dump() for one in item.content[0].logprobs] == scores  # type: ignore[union-attr, index]
        events = list(client.responses.create(stream=True, **more))
        told = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
        assert [one.logprob for one in told] == [one["logprob"] for one in scores][: len(told)]
        done = next(event for event in events if event.type == "response.output_text.done")
        assert [one.logprob for one in done.logprobs] == [one["logprob"] for one in scores]
        assert client.responses.create(previous_response_id=reply.id, **{**more, "input": "And?"}).output


def test_the_oldest_items_are_left_out_where_that_is_asked_for(client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "sunny"}
    old = [{"role": "user", "content": "word " * 900}, call, result]
    new = [{"role": "user", "content": "And?"}]
    asked: Any = {"model": MODEL, "instructions": "Be.", "max_output_tokens": 64, "temperature": 0}
    alone = client.responses.create(input=new, **asked)
    reply = client.responses.create(input=[*old, *old, *old, *new], truncation="auto", **asked)
    assert reply.truncation == "auto"
    kept = client.responses.create(input=[*old, *old, *new], truncation="auto", **asked)
    whole = client.responses.create(input=[*old, *old, *new], **asked)
    read = {one.usage.input_tokens for one in (reply, kept, whole) if one.usage is not None}
    assert len(read) == 1, "as much as fits is read"
    assert (reply.output_text, kept.output_text) == (whole.output_text, whole.output_text)
    last: Any = {"input": [*old, {"role": "user", "content": "word " * 2100}, *new], "truncation": "auto"}
    assert client.responses.create(**asked, **last).output_text == alone.output_text
    with pytest.raises(openai.BadRequestError, match="prompt and output together"):
        client.responses.create(**asked, input=[*new, {"role": "user", "content": "word " * 3000}], truncation="auto")
    with pytest.raises(openai.BadRequestError, match="prompt and output together"):
        client.responses.create(**asked, input=[*old, *old, *old, *new])


def test_responses_take_the_sampling_of_other_servers(client: openai.OpenAI, http: httpx.Client) -> None:
    plain = expected_chat(http, 12)
    asked: Any = {"model": MODEL, "input": "Say something.", "max_output_tokens": 12, "temperature": 0}
    stop = plain[5:8]
    more: Any = {"stop": [stop], "seed": 1, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.0, "priority": 0, "n": 1}
    assert client.responses.create(**asked, extra_body=more).output_text == plain[: plain.index(stop)]
    assert client.responses.create(**asked, extra_body={"rope": {"method": "rope"}}).output_text == plain
    with pytest.raises(openai.BadRequestError, match="known methods"):
        client.responses.create(**asked, extra_body={"rope": {"method": "none"}})
    assert http.post("/v1/responses", json={"input": "x", "max_tokens": 2}).json()["usage"]["output_tokens"] == 2
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2, "tools": [tool]}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "choice"),
    [
        ("/v1/responses", {"input": "x"}, {"type": "function", "name": "other"}),
        ("/v1/responses", {"input": "x"}, {"type": "allowed_tools", "tools": [{"type": "function", "name": "other"}]}),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 2}, {"type": "tool", "name": "other"}),
    ],
)
def test_a_choice_of_a_function_that_is_not_there(
    http: httpx.Client, path: str, body: dict[str, Any], choice: dict[str, Any]
) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "input_schema": {"type": "object"}}
    told = {**tool, "type": "custom"} if path == "/v1/messages" else tool
    reply = http.post(path, json={**body, "tools": [told], "tool_choice": choice})
    assert (reply.status_code, "function 'other'" in reply.json()["error"]["message"]) == (400, True), reply.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"include": ["message.thoughts"]}, "message.thoughts"),
        ({"include": [["message.output_text.logprobs"]]}, "a list"),
        ({"text": {"formt": {"type": "json_object"}}}, "text.formt"),
        ({"truncation": "middle"}, "truncation"),
        ({"reasoning": {"budget": 7}}, "reasoning.budget"),
        ({"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": None}}, None),
    ],
)
def test_nothing_of_a_response_is_ignored_in_silence(
    http: httpx.Client, more: dict[str, Any], said: str | None
) -> None:
    reply = http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2, **more})
    assert reply.status_code == (400 if said else 200)
    assert said is None or said in reply.json()["error"]["message"]


def test_sglang_and_tgi_options(http: httpx.Client) -> None:
    few = {"max_new_tokens": 6, "temperature": 0}
    text = http.post("/generate", json={"text": "Once", "sampling_params": few}).json()["text"]
    stop = text[2:4]
    for keep, wanted in ((True, text[: text.index(stop)] + stop), (False, text[: text.index(stop)])):
        body = {"text": "Once", "sampling_params": {**few, "stop": [stop], "no_stop_trim": keep}}
        assert http.post("/generate", json=body).json()["text"] == wanted
    for constraint in ({"ebnf": 'root ::= "ab"'}, {"json_schema": '{"enum": [7]}'}, {"regex": "[a]{3}"}):
        body = {"text": "Once", "sampling_params": {**few, **constraint}}
        assert http.post("/generate", json=body).json()["text"] in ("ab", "7", "aaa")
    ids = http.post("/tokenize", json={"prompt": "a b c d e f g"}).json()["tokens"]
    neutral = {"top_p": 0, "top_k": -1, "skip_special_tokens": True, "temperature": 2, "max_new_tokens": 6}
    greedy = {"inputs": "Once", "parameters": {"max_new_tokens": 6}}
    said = http.post("/generate", json={"inputs": "Once", "parameters": neutral}).json()
    assert said == http.post("/generate", json=greedy).json()
    last = http.post("/generate", json={"input_ids": ids[-3:], "sampling_params": few}).json()["text"]
    cut = {"inputs": "a b c d e f g", "parameters": {"max_new_tokens": 6, "truncate": 3}}
    assert http.post("/generate", json=cut).json()["generated_text"] == last


# --- Ollama ---


@pytest.fixture(scope="module")
def llama(url: str) -> Iterator[ollama.Client]:
    client = ollama.Client(host=url, headers={"authorization": "Bearer secret"})
    yield client
    client._client.close()


def test_ollama_prefills_and_log_probabilities(llama: ollama.Client, http: httpx.Client) -> None:
    options = {"temperature": 0, "num_predict": 6}
    begun: Any = [*ASKED, {"role": "assistant", "content": "The answer is"}]
    asked: Any = {"options": options, "logprobs": True, "top_logprobs": 2}
    body = {"messages": begun, "continue_final_message": True, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    wanted = http.post("/v1/chat/completions", json={**body, **GREEDY}).json()["choices"][0]
    reply = llama.chat(MODEL, begun, **asked)
    assert reply.message.content == wanted["message"]["content"]
    streamed = [one for part in llama.chat(MODEL, begun, stream=True, **asked) for one in part.logprobs or ()]
    for told in (list(reply.logprobs or ()), streamed):
        assert [one.token for one in told] == [one["token"] for one in wanted["logprobs"]["content"]]
        assert all(len(one.top_logprobs or ()) == 2 for one in told)
    assert len(llama.generate(MODEL, "Once", **asked).logprobs or ()) == 6


def test_ollama(llama: ollama.Client, http: httpx.Client) -> None:
    options = {"temperature": 0, "num_predict": 8, "num_ctx": 4096}
    reply = llama.chat(model=f"{MODEL}:latest", messages=ASKED, options=options)
    assert reply.message.content == expected_chat(http)
    assert (reply.done, reply.eval_count) == (True, 8)
    streamed = list(llama.chat(model=MODEL, messages=ASKED, options=options, stream=True))
    assert "".join(part.message.content or "" for part in streamed) == reply.message.content
    assert streamed[-1].done_reason == "length"
    said = llama.generate(model=MODEL, prompt="Say something.", options=options)
    assert said.response == reply.message.content
    raw = llama.generate(model=MODEL, prompt="Say", raw=True, options=options, stream=True)
    plain = http.post("/generate", json={"prompt": "Say", "max_tokens": 8, "temperature": 0}).json()["text"]
    assert "".join(part.response for part in raw) == plain
    spaced = {"model": MODEL, "messages": ASKED, "options": options, "stream": False}
    large = json.dumps(spaced) + " " * 5000  # read by a worker
    answered = http.post("/api/chat", content=large, headers={"content-type": "application/json"}).json()
    assert answered["message"]["content"] == reply.message.content
    assert llama.chat(model=MODEL, messages=[]).done_reason == "load"
    assert llama.generate(model=MODEL).done_reason == "load"
    assert llama.list().models[0].model == MODEL
    assert llama.show(MODEL).capabilities == ["completion", "tools"]


def test_ollama_tools_and_schemas(llama: ollama.Client) -> None:
    reply = llama.chat(model=MODEL, messages=ASKED, format=WEATHER, options={"num_predict": 100})
    assert json.loads(reply.message.content or "")["city"] in ("Paris", "Rome")
    called = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    history = [*ASKED, {"role": "assistant", "tool_calls": [called]}, {"role": "tool", "content": "sunny"}]
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    assert llama.chat(model=MODEL, messages=history, tools=[tool], options={"num_predict": 4}).done
    with pytest.raises(ollama.ResponseError, match="not served"):
        llama.embed(model=MODEL, input="x")
    with pytest.raises(ollama.ResponseError) as refused:
        llama.chat(model=MODEL, messages=ASKED, options={"num_predict": "many"})
    assert refused.value.error.startswith("options.num_predict"), "the sentence, not an object that holds it"
    with pytest.raises(ollama.ResponseError, match="Not served here: models by their clients' wish"):
        llama.pull("llama3.2")


# --- TGI and SGLang ---


def test_text_generation_inference(url: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # for this machine's own address
    plain = http.post("/generate", json={"prompt": "Say", "max_tokens": 8, "temperature": 0}).json()["text"]
    hub = InferenceClient(url, token="secret")
    assert hub.text_generation("Say", max_new_tokens=8) == plain
    detailed = hub.text_generation("Say", max_new_tokens=8, details=True)
    assert detailed.details is not None
    assert detailed.details.generated_tokens == 8
    assert "".join(hub.text_generation("Say", max_new_tokens=8, stream=True)) == plain
    body = {"inputs": "Say", "parameters": {"max_new_tokens": 8}}
    assert http.post("/generate", json=body).json()["generated_text"] == plain
    events = [line for line in http.post("/generate_stream", json=body).text.splitlines() if "generated_text" in line]
    assert json.loads(events[-1].removeprefix("data:"))["generated_text"] == plain


def test_sglang(http: httpx.Client) -> None:
    plain = http.post("/generate", json={"prompt": "Say", "max_tokens": 8, "temperature": 0}).json()["text"]
    body = {"text": "Say", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    reply = http.post("/generate", json=body).json()
    assert reply["text"] == plain
    assert reply["meta_info"]["finish_reason"]["type"] == "length"
    assert reply["meta_info"]["completion_tokens"] == 8
    lines = [line for line in http.post("/generate", json={**body, "stream": True}).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["text"] == plain


def test_alternatives_are_told_by_their_names_there(http: httpx.Client) -> None:
    asked = {"prompt": "Say it", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2, "model": MODEL}
    known = http.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]["top_logprobs"]
    values = [None if one is None else sorted(one.values(), reverse=True)[:2] for one in known]
    sampling = {"max_new_tokens": 3, "temperature": 0}
    body = {"text": "Say it", "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    told = http.post("/generate", json=body | {"top_logprobs_num": 2}).json()["meta_info"]
    tops = [*told["input_top_logprobs"], *told["output_top_logprobs"]]
    assert len(tops) == len(values)
    for top, value in zip(tops, values, strict=True):
        assert top is value is None or [one[0] for one in top] == pytest.approx(value, abs=1e-5)
    parameters = {"max_new_tokens": 3, "details": True, "top_n_tokens": 2}
    details = http.post("/", json={"inputs": "Say it", "parameters": parameters}).json()[0]["details"]
    said = [[one["logprob"] for one in top] for top in details["top_tokens"]]
    assert said == [pytest.approx(value, abs=1e-5) for value in values[-3:]]
    streamed = http.post("/generate_stream", json={"inputs": "Say it", "parameters": parameters}).text.splitlines()
    events = [json.loads(line.removeprefix("data:")) for line in streamed if "generated_text" in line]
    assert [one["top_tokens"] for one in events] == details["top_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"inputs": "x", "parameters": {"typical_p": 0.9}}, "typical_p"),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "a"}}, "adapter_id"),
        ("/generate", {"inputs": "x", "parameters": {"watermark": True}}, "watermark"),
        ("/generate", {"text": "x", "lora_path": "a"}, "lora_path"),
        ("/generate", {"text": "x", "return_hidden_states": True}, "return_hidden_states"),
        ("/generate", {"text": "x", "sampling_params": {"stop_regex": "a+"}}, "stop_regex"),
        ("/api/generate", {"prompt": "x", "options": {"mirostat": 2}}, "mirostat"),
        ("/api/generate", {"prompt": "x", "options": {"tfs_z": 0.5}}, "tfs_z"),
    ],
)
def test_what_would_change_a_reply_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], field: str
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert field in reply.text


def test_sglang_scores_several_prompts(http: httpx.Client) -> None:
    """What `sgl.select` asks: the log-probabilities of each choice behind one text, and nothing new."""
    texts = ["The sky is blue", "The sky is seven"]
    body = {"text": texts, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 2}
    for text, reply in zip(texts, http.post("/generate", json=body).json(), strict=True):
        asked = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 1, "model": MODEL}
        known = http.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
        scored = reply["meta_info"]["input_token_logprobs"]
        assert [one[0] for one in scored] == pytest.approx(known["token_logprobs"][2:], abs=1e-5)
        assert [one[2] for one in scored] == known["tokens"][2:]
        assert (reply["text"], reply["meta_info"]["completion_tokens"]) == ("", 0)
    refused = http.post("/generate", json=body | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")


def test_every_door_asks_for_the_key(url: str) -> None:
    for path, body in (
        ("/", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/v1/messages", {"max_tokens": 1, "messages": ASKED}),
        ("/v1/responses", {"input": "x"}),
        ("/api/chat", {"messages": ASKED}),
        ("/api/generate", {"prompt": "x"}),
        ("/api/show", {}),
    ):
        assert httpx.post(f"{url}{path}", json=body).status_code == 401, path
    assert httpx.get(f"{url}/api/tags").status_code == 401
    assert httpx.get(url).status_code == 200


def test_thoughts_in_every_dialect(serve: Any, byte_checkpoint: Path, tmp_path: Path) -> None:
    """The template begins thoughts, and the random model never ends them: all of a reply is thought."""
    folder = tmp_path / MODEL
    shutil.copytree(byte_checkpoint, folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    url = serve(model_id=str(folder), max_model_len=256)
    body = {"messages": ASKED, "max_tokens": 8, "temperature": 0}
    thought = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["reasoning_content"]
    assert thought

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude:
        asked: Any = {"model": MODEL, "max_tokens": 8, "messages": ASKED, "extra_body": GREEDY}
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}
        with claude.messages.stream(**asked, thinking=thinking) as stream:
            streamed = stream.get_final_message()
        for reply in (claude.messages.create(**asked, thinking=thinking), streamed):
            assert (reply.content[0].type, reply.content[0].thinking) == ("thinking", thought)  # type: ignore[union-attr]
        assert [block.type for block in claude.messages.create(**asked).content] == ["text"]

    options = {"num_predict": 8, "temperature": 0}
    with ollama.Client(url) as llama:
        assert llama.chat(MODEL, ASKED, options=options).message.thinking == thought
        pieces = llama.chat(MODEL, ASKED, options=options, stream=True)
        assert "".join(piece.message.thinking or "" for piece in pieces) == thought
        assert llama.chat(MODEL, ASKED, options=options, think=False).message.thinking is None
        said = llama.generate(MODEL, "Say something.", options=options)
        assert (said.response, said.thinking) == ("", thought)
        streamed_ = llama.generate(MODEL, "Say something.", options=options, stream=True)
        assert "".join(piece.thinking or "" for piece in streamed_) == thought

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": MODEL, "input": "Say something.", "max_output_tokens": 16, "temperature": 0}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as events:
            told = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        (item,) = whole.output
        assert item.type == "reasoning"
        assert (item.content or [])[0].text == told
        assert told.startswith(thought)


def test_tokens_of_a_response_are_counted_before_it_is_asked_for(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "instructions": "Be brief.", "input": "Say something."}
    counted = client.responses.input_tokens.count(**asked).input_tokens
    first = client.responses.create(**asked, max_output_tokens=4)
    assert counted == first.usage.input_tokens
    following = {"model": MODEL, "previous_response_id": first.id, "input": "More."}
    counted = client.responses.input_tokens.count(**following).input_tokens
    assert (
        counted
        == client.responses.create(**following, max_output_tokens=4).usage.input_tokens
        > first.usage.input_tokens
    )


def test_what_is_not_served_says_what_to_use_instead(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError, match="embedding model beside it"):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError, match="images: this server writes text"):
        client.images.generate(model=MODEL, prompt="x")
    with pytest.raises(openai.NotFoundError, match="transcribe beside it"):
        client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"x"))
    for path in (
        "/v1/rerank",
        "/v1/moderations",
        "/v1/files/f/content",
        "/v1/threads/t/runs",
        "/completion",
        "/v1/responses/compact",
    ):
        reply = http.post(path, json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_served"), path
    assert http.post("/v1/none", json={}).json()["error"]["code"] is None
    began = time.process_time()
    assert all(instead_of("/a" * 8000) is None for _ in range(10))
    assert time.process_time() - began < 0.5, "no path, however long, takes long"
