"""What others write into their bodies: fields that ask for nothing are taken, what would matter is refused by name.

The tables are drawn from request schemas: `DEFAULTS` is each schema's own defaults, which a client or router that
serialises its model sends along, and `HISTORY` is what clients send back of a reply.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as CompletionParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams
from openai.types.responses import ResponseIncludable
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming as ResponseParams
from prerope.server.api.chat.tool_choice import ToolChoice
from prerope.server.api.dialects.lowering.anthropic import CountTokensRequest, MessagesRequest
from prerope.server.api.dialects.lowering.items import Page
from prerope.server.api.dialects.lowering.ollama import OllamaChatRequest, OllamaFields, OllamaGenerateRequest, Options
from prerope.server.api.dialects.lowering.others import AnyGenerateRequest, SglangRequest, TgiRequest
from prerope.server.api.dialects.lowering.responses import INCLUDED, ResponsesRequest
from prerope.server.api.openai.schemas import ChatRequest, CompletionRequest
from prerope.server.api.requests import foreign
from prerope.server.api.requests.body import HEADER, reporting
from prerope.server.api.requests.internal import Chat
from prerope.server.errors import InvalidRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

SHARED: dict[str, Any] = {
    # vLLM
    "use_beam_search": False,
    "length_penalty": 1.0,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop_token_ids": [],
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "watermarking": None,
    "priority": 0,
    "echo": False,
    "request_id": "a1b2",
    "session_id": "s",
    "return_tokens_as_token_ids": None,
    "return_token_ids": None,
    "routed_experts_prompt_start": 0,
    "return_token_offsets": False,
    "return_mm_kwargs": True,
    "mm_payload": "tensors",
    "return_weight_versions": False,
    "cache_salt": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "vllm_xargs": None,
    "repetition_detection": None,
    "stream_interval": None,
    "thinking_token_budget": -1,
    "structured_outputs": None,
    "response_format": None,
    # SGLang and its router
    "return_hidden_states": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "regex": None,
    "return_cached_tokens_details": False,
    "top_k": -1,
    "min_p": 0.0,
    "ebnf": None,
    "stop_regex": None,
    "repetition_penalty": 1.0,
    "no_stop_trim": False,
    "lora_path": None,
    "session_params": None,
    "rid": "r-1",
    "custom_params": None,
    "custom_logit_processor": None,
    "images_config": None,
    "bootstrap_host": None,
    "bootstrap_port": None,
    "bootstrap_room": None,
    "routed_dp_rank": None,
    "data_parallel_rank": None,
    "extra_key": None,
    "ngram_corpus_id": None,
    "custom_labels": None,
    "json_schema": None,
    # OpenAI, LiteLLM
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "logit_bias": {},
    "seed": None,
    "stream_options": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "suffix": None,
    "stop": [],
    "litellm_metadata": {"x": 1},
    "cache_control": {"type": "ephemeral"},
    "prediction": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {**SHARED, "best_of": 1, "n": 1, "logprobs": None, "add_special_tokens": True, "suffix": ""},
    CHAT: {
        **SHARED,
        "logprobs": False,
        "top_logprobs": 0,
        "tools": None,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "include_reasoning": True,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "documents": None,
        "chat_template": None,
        "chat_template_kwargs": None,
        "media_io_kwargs": None,
        "mm_processor_kwargs": None,
        "return_prompt_text": None,
        "return_prompt_token_ids": False,
        "task": None,
        "return_meta_info": False,
        "return_flat_raw_top_logprobs_b64": True,
        "return_flat_raw_output_top_logprobs": False,
        "return_input_ids_in_sglext": False,
        "return_output_ids_in_sglext": False,
        "return_sampling_mask": False,
        "return_spec_tokens_details": False,
        "sampling_logprobs_mode": None,
        "video_config": None,
        "watermark": None,
        "input_ids": None,
        "max_dynamic_patch": None,
        "use_audio_in_video": False,
        "functions": None,
        "function_call": None,
        "modalities": ["text"],
        "audio": None,
        "moderation": None,
        "web_search_options": None,
        "verbosity": "medium",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
    },
}
OFF: dict[str, Any] = {
    # llama.cpp's page and Open WebUI: samplers at values that leave them off, and what goes with them
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "typ_p": 1,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "tfs_z": 1.0,
    "top_n_sigma": -1,
    "n_keep": 0,
    "n_probs": 0,
    "cache_prompt": True,
    "id_slot": -1,
    "logit_bias": [],
    "grammar": "",
    "chat_id": "c",
    "keep_alive": "5m",
    # fields of the other endpoint, at what asks for nothing
    "best_of": 1,
    "include_reasoning": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "modalities": ["text"],
    "top_logprobs": 0,
    "logprobs": False,
    # LiteLLM, OpenRouter, services
    "api_base": "x",
    "max_retries": 2,
    "provider": {"order": ["a"]},
    "truncation": "disabled",
    "reasoning_format": "auto",
    # empty where no such value is taken, and empty within
    "seed": False,
    "response_format": {},
    "structured_outputs": {},
    "rope": {},
    "tools": [],
    "made_up": {"a": None, "b": []},
    "made_up_too": [None, ""],
}
SYNONYMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_new_tokens": 3}, {"max_tokens": 3}),
    ({"n_predict": 3}, {"max_tokens": 3}),
    ({"max_tokens": 3.0, "seed": 5.0, "top_k": 9.0}, {"max_tokens": 3, "seed": 5, "top_k": 9}),
    ({"random_seed": 5, "temperature": 2}, {"seed": 5, "temperature": 2}),
    ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"do_sample": False, "temperature": None}, {"temperature": 0}),
    ({"stop_sequences": ["e"]}, {"stop": ["e"]}),
    ({"prompt_truncate_len": 9}, {"truncate_prompt_tokens": 9}),
    ({"regex": "[ab]{4}"}, {"guided_regex": "[ab]{4}"}),
    ({"ebnf": 'root ::= "a" "b"'}, {"guided_grammar": 'root ::= "a" "b"'}),
    ({"json_schema": '{"enum": ["a"]}'}, {"guided_json": {"enum": ["a"]}}),
    ({"response_format": {"type": "json_object", "schema": {"enum": ["a"]}}}, {"guided_json": {"enum": ["a"]}}),
    ({"response_format": {"type": "json_schema", "schema": {"enum": ["a"]}}}, {"guided_json": {"enum": ["a"]}}),
    ({"response_format": {"type": "json", "value": {"enum": ["a"]}}}, {"guided_json": {"enum": ["a"]}}),
    ({"response_format": {"type": "regex", "value": "[ab]{4}"}}, {"guided_regex": "[ab]{4}"}),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "a"'}}, {"guided_grammar": 'root ::= "a"'}),
    ({"extra_body": {"max_tokens": 3}}, {"max_tokens": 3}),
    ({"n_predict": 3, "max_tokens": None}, {"max_tokens": 3}),
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORY: list[dict[str, Any]] = [
    {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None, "function_call": None},
    {"role": "assistant", "content": "hi", "refusal": "", "tool_calls": []},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": None, "refusal": "No."},
    {"role": "assistant", "content": "hi", "reasoning_content": "hm", "reasoning": "hm"},
    {"role": "assistant", "content": "hi", "reasoning": None, "provider_specific_fields": {"refusal": None}},
    {"role": "assistant", "content": "hi", "thinking_blocks": [{"type": "thinking"}], "reasoning_details": [{}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"type": "message", "id": "m1", "status": "completed", "role": "user", "content": "hi"},
    {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}},
    {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
    {"role": "user", "content": [{"type": "input_text", "text": "hi", "prompt_cache_breakpoint": {}}]},
    {"role": "user", "content": "hi", "name": "someone"},
    {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "hi"}],
    },
    {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
    {"role": "assistant", "content": [{"type": "reasoning", "text": "hm"}, {"type": "redacted_thinking", "data": "x"}]},
    {"role": "assistant", "content": "hi", "usage": {"total_tokens": 5}, "stop_reason": "end_turn", "parsed": {"a": 1}},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "sunny"},
    {"role": "tool", "content": "sunny", "tool_call_id": "c", "is_error": True},
    {"role": "assistant", "content": "hi", "prefix": True},
    *(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": id_, "function": {"name": "f", "arguments": text}}],
        }
        for id_, text in (
            (7, "null"),
            ("call_1__thought__" + "A" * 2000, "[1]"),
            ("", "Rome"),
            (None, '"{\\"a\\": 1}"'),
        )
    ),
    {"role": "tool", "content": "sunny", "tool_call_id": 7},
]


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), rope_method="rope", max_model_len=256))


def answered(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_defaults_of_others_ask_for_nothing(http: httpx.Client) -> None:
    for path, defaults in DEFAULTS.items():
        body = USER if path == CHAT else {"prompt": "hi", "max_tokens": 2}
        plain = answered(http.post(path, json={**body, "temperature": 0}))
        told = http.post(path, json={**defaults, **body, "temperature": 0})
        assert answered(told)["choices"] == plain["choices"]
        assert told.headers.get(HEADER) == ("verbosity" if path == CHAT else None), "a hint is not kept quiet about"


@pytest.mark.parametrize("path", DEFAULTS)
def test_what_is_off_asks_for_nothing(http: httpx.Client, path: str) -> None:
    """Each alone, so that a refusal names it; whatever the endpoint, the reply is the plain one."""
    body = {**(USER if path == CHAT else {"prompt": "hi", "max_tokens": 2}), "temperature": 0}
    plain = answered(http.post(path, json=body))["choices"]
    for name, value in OFF.items():
        told = http.post(path, json={**body, name: value})
        assert answered(told)["choices"] == plain, name
        assert HEADER not in told.headers, name


@pytest.mark.parametrize(
    ("request_", "body"),
    [
        (MessagesRequest, USER),
        (CountTokensRequest, {"messages": USER["messages"]}),
        (OllamaChatRequest, {"messages": USER["messages"]}),
        (OllamaGenerateRequest, {"prompt": "hi"}),
        (TgiRequest, {"inputs": "hi"}),
        (SglangRequest, {"text": "hi"}),
        (ResponsesRequest, {"input": "hi"}),
        (AnyGenerateRequest, {"prompt": "hi"}),
    ],
)
def test_what_asks_for_nothing_does_so_in_every_dialect(request_: Any, body: dict[str, Any]) -> None:
    plain = request_.model_validate(body)
    for name, value in {**DEFAULTS[CHAT], **OFF, "best_of": 1, "detokenize": True, "user_id": "u"}.items():
        told = request_.model_validate({**body, name: value})
        beside = {*Options.model_fields, *Options.synonyms} if issubclass(request_, OllamaFields) else set()
        if name not in {*request_.model_fields, *request_.synonyms, *beside}:
            assert told == plain, name
    if request_ is not CountTokensRequest:  # to which what a reply should be like is nothing
        with pytest.raises(InvalidRequest, match="best_of"):
            request_.model_validate({**body, "best_of": 2})


EQUIVALENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/v1/messages", {"seed": 1, "min_p": 0.2}, {}),
    ("/v1/messages", {"response_format": {"type": "json_object"}, "temperature": 0}, {}),
    ("/v1/messages", {"reasoning_effort": "low", "do_sample": False}, {}),
    ("/v1/completions", {"max_completion_tokens": 3}, {"max_tokens": 3}),
    ("/v1/completions", {"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
    ("/v1/chat/completions", {"max_output_tokens": 3}, {"max_tokens": 3}),
    ("/v1/responses", {"response_format": {"type": "regex", "value": "[ab]{3}"}}, {"guided_regex": "[ab]{3}"}),
    ("/v1/responses", {"logprobs": True}, {"include": ["message.output_text.logprobs"]}),
    (
        "/api/chat",
        {"max_tokens": 3, "seed": 4, "stop": ["q"]},
        {"options": {"num_predict": 3, "seed": 4, "stop": ["q"]}},
    ),
    ("/api/chat", {"response_format": {"type": "json_object"}}, {"format": "json"}),
    (
        "/api/generate",
        {"temperature": 0, "options": {"num_predict": 3}},
        {"options": {"num_predict": 3, "temperature": 0}},
    ),
]
SENT: dict[str, dict[str, Any]] = {
    "/v1/messages": USER,
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": USER["messages"]},
    "/v1/responses": {"input": "hi", "max_output_tokens": 12},
    "/api/chat": {"messages": USER["messages"], "stream": False},
    "/api/generate": {"prompt": "hi", "stream": False},
}


@pytest.mark.parametrize(("path", "said", "meant"), EQUIVALENT, ids=lambda value: str(value)[:60])
def test_one_dialects_words_are_understood_in_another(
    http: httpx.Client, path: str, said: dict[str, Any], meant: dict[str, Any]
) -> None:
    def told(more: dict[str, Any]) -> Any:
        body = {"temperature": 0, **SENT[path]} if not path.startswith("/api") else SENT[path]
        reply = http.post(path, json={**body, **more})
        answered(reply)
        assert HEADER not in reply.headers
        held = [reply.json().get(name) for name in ("choices", "content", "output", "message", "response")]
        return re.sub(r'"id": "[^"]*"', "", json.dumps(held))

    if meant:
        more = {"options": {"temperature": 0}} if path == "/api/chat" else {}
        greedy = {"options": {"temperature": 0, **meant.get("options", {})}} if more else {}
        assert told({**more, **said}) == told({**meant, **greedy})
    else:
        assert told(said) == told(said), "a seed or no draw: twice the same"


def test_calls_and_results_among_parts_are_read(http: httpx.Client) -> None:
    """As Anthropic's, the Vercel SDK's, LangChain's and Responses' histories have them: the prompt is OpenAI's."""
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    plain = [
        *USER["messages"],
        {"role": "assistant", "content": "So.", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "x"},
        {"role": "user", "content": "And?"},
    ]
    ids = answered(http.post("/tokenize", json={"messages": plain}))["tokens"]
    so, arguments = {"type": "text", "text": "So."}, {"a": 1}
    for part, result in (
        (
            {"type": "tool_use", "id": "x", "name": "f", "input": arguments},
            {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "sunny"}]},
        ),
        (
            {"type": "tool-call", "toolCallId": "x", "toolName": "f", "input": arguments},
            {"type": "tool-result", "toolCallId": "x", "toolName": "f", "output": {"type": "text", "value": "sunny"}},
        ),
        (
            {"type": "tool_call", "id": "x", "name": "f", "args": arguments},
            {"type": "tool-result", "toolCallId": "x", "result": "sunny"},
        ),
        (
            {"type": "function_call", "call_id": "x", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "x", "output": "sunny"},
        ),
    ):
        apart = [{"role": "tool", "content": [result]}, {"role": "user", "content": "And?"}]
        beside = [{"role": "user", "content": [result, {"type": "text", "text": "And?"}]}]
        for rest in (apart, beside):
            messages = [*USER["messages"], {"role": "assistant", "content": [so, part]}, *rest]
            assert answered(http.post("/tokenize", json={"messages": messages}))["tokens"] == ids
            answered(http.post(CHAT, json={"messages": messages, "max_tokens": 2}))
    answered(http.post("/api/chat", json={"messages": messages, "stream": False, "options": {"num_predict": 2}}))
    twice = [*USER["messages"], {"role": "assistant", "content": [so, part], "tool_calls": [call]}, *beside]
    assert answered(http.post("/tokenize", json={"messages": twice}))["tokens"] == ids
    other = [*USER["messages"], {**twice[1], "tool_calls": [{**call, "id": "y"}]}, *beside]
    assert "'tool_calls' do not have" in http.post(CHAT, json={"messages": other}).json()["error"]["message"]
    silent, empty = ([*plain[:2], {"role": "tool", "content": one, "tool_call_id": "x"}] for one in ("null", ""))
    nothing = [*plain[:2], {"role": "tool", "content": [{"type": "tool_result", "tool_use_id": "x", "content": None}]}]
    given = [answered(http.post("/tokenize", json={"messages": one}))["tokens"] for one in (nothing, empty, silent)]
    assert given[0] == given[1] != given[2]
    refused = http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert "function_call" in refused.json()["error"]["message"], "a user makes no calls"
    for path in ("/v1/messages", "/v1/responses"):  # OpenAI's messages, sent there
        name = "input" if path == "/v1/responses" else "messages"
        told = answered(http.post(f"{path}/render", json={name: plain, "max_tokens": 2}))
        assert told["token_ids"] == ids


def test_false_asks_for_nothing_but_where_the_thing_is_done_anyway(http: httpx.Client) -> None:
    def said(**more: Any) -> tuple[int, str | None]:
        reply = http.post("/api/chat", json={**SENT["/api/chat"], "options": {"num_predict": 2}, **more})
        return reply.status_code, reply.headers.get(HEADER)

    assert said(return_hidden_states=False, use_cache=False, tools=False) == (200, None)
    assert said(skip_special_tokens=True) == (200, None)
    assert said(skip_special_tokens=False) == (400, None), "they are left out here unless that is asked for elsewhere"
    assert said(frobnicate=None, frobnicated=[]) == (200, None)
    assert said(frobnicate=False) == (200, "frobnicate"), "taken, but nobody here knows the word"


def test_a_field_without_a_name_loses_no_reply(http: httpx.Client) -> None:
    """Named last in the header, it left a blank at its end, which is no header."""
    reply = http.post(CHAT, json={**USER, "unknown": False, "": False})
    assert (reply.status_code, reply.headers[HEADER]) == (200, "unknown, _")


def test_seed_minus_one_is_none(http: httpx.Client) -> None:
    """As llama.cpp, Ollama and vLLM read it; pages write it where each reply is to be another."""
    body = {"prompt": "Once", "max_tokens": 12, "temperature": 3, "top_p": 1, "top_k": -1}
    for seed, num_replies in ((-1, 3), (5, 1)):
        texts = {answered(http.post("/generate", json={**body, "seed": seed}))["text"] for _ in range(3)}
        assert len(texts) == num_replies, seed


@pytest.mark.parametrize("path", DEFAULTS)
@pytest.mark.parametrize(("said", "meant"), SYNONYMS, ids=lambda value: json.dumps(value)[:60])
def test_others_names_are_honoured(http: httpx.Client, path: str, said: dict[str, Any], meant: dict[str, Any]) -> None:
    body = {"messages": USER["messages"]} if path == CHAT else {"prompt": "hi"}
    usual = {"temperature": 0, "max_tokens": 12}
    limit = {} if {*said} & {"max_new_tokens", "n_predict", "extra_body"} else {"max_tokens": 12}
    replies = [
        answered(http.post(path, json={**body, "temperature": 0, **limit, **said})),
        answered(http.post(path, json={**body, **usual, **meant})),
    ]
    assert replies[0]["choices"] == replies[1]["choices"]
    if "max_new_tokens" in said:
        both = http.post(path, json={**body, **said, "max_tokens": 4})
        assert both.json()["error"]["param"] == "max_new_tokens", "two that differ are refused"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, {"enable_thinking": True}),
        ({"thinking": False}, {"enable_thinking": False}),
        ({"think": False}, {"enable_thinking": False}),
        ({"think": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning": {"effort": "none", "exclude": True}}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}),
        ({"reasoning": "high"}, {"reasoning_effort": "high", "enable_thinking": True}),
        ({"reasoning_effort": "low", "enable_thinking": False}, {"reasoning_effort": "low", "enable_thinking": False}),
        ({}, {}),
    ],
)
def test_all_names_of_thinking_reach_the_template(said: dict[str, Any], meant: dict[str, Any]) -> None:
    given = ChatRequest.model_validate({**USER, **said}).lowered().input
    assert isinstance(given, Chat)
    assert given.template_kwargs == meant


def test_tools_may_be_narrowed_and_chosen_by_others_words() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    of_f = {"type": "function", "function": {"name": "f"}}
    for said, meant in (
        ({"type": "auto"}, ToolChoice("auto")),
        ({"type": "any"}, ToolChoice("required")),
        ("any", ToolChoice("required")),
        ({"type": "function", "name": "f"}, ToolChoice("required", "f")),
        ({"type": "tool", "name": "f"}, ToolChoice("required", "f")),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [of_f]}},
            ToolChoice("required", names=("f",)),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [of_f]}, ToolChoice("auto", names=("f",))),
    ):
        assert ChatRequest.model_validate({**USER, "tools": tools, "tool_choice": said}).tool_choice == meant
    for wrong in (
        {"type": "allowed_tools", "tools": []},
        {"type": "custom", "custom": {"name": "f"}},
        {"type": "tool", "name": "h"},
    ):
        with pytest.raises(InvalidRequest, match="tool_choice"):
            ChatRequest.model_validate({**USER, "tools": tools, "tool_choice": wrong})


def test_all_tokens_that_fit(http: httpx.Client) -> None:
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "hi " * 180}]}),
        (COMPLETIONS, {"prompt": "hi " * 200}),
        ("/generate", {"prompt": "hi " * 200}),
    ):
        reply = answered(http.post(path, json={**body, "max_tokens": -1, "ignore_eos": True, "temperature": 0}))
        used = reply["usage"]
        assert used["prompt_tokens"] + used["completion_tokens"] == 256, path


@pytest.mark.parametrize("message", HISTORY, ids=lambda message: json.dumps(message)[:70])
def test_what_comes_back_in_a_history(http: httpx.Client, message: dict[str, Any]) -> None:
    history = [*USER["messages"], message, {"role": "user", "content": "And?"}]
    answered(http.post(CHAT, json={**USER, "messages": history}))


@given(st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.sampled_from(foreign.EMPTY))
def test_what_is_empty_asks_for_nothing_whatever_its_name(name: str, empty: Any) -> None:
    known = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    if name not in known:
        assert ChatRequest.model_validate({**USER, name: empty}) == ChatRequest.model_validate(USER)
        message = {**USER["messages"][0], name: empty}
        if name not in ("role", "content", "type", "text"):
            assert ChatRequest.model_validate({**USER, "messages": [message]}).messages[0].content == "hi"


@pytest.mark.parametrize("table", ["BODY", "CHAT"])
def test_every_refusal_says_what_to_do(table: str) -> None:
    """Each foreign field is taken where it asks for nothing, and refused by its name where it does not."""
    request = ChatRequest if table == "CHAT" else CompletionRequest
    body = USER if table == "CHAT" else {"prompt": "hi"}
    for name, row in getattr(foreign, table).items():
        if name in request.model_fields:
            continue
        for value in (*foreign.EMPTY, *row.harmless):
            if row.asks_for_nothing(value):
                request.model_validate({**body, name: value})
            else:
                assert (value, True in row.harmless) == (False, True), "what is on by itself is not off"
        if row.any_value or row.hint:
            request.model_validate({**body, name: "anything"})
            continue
        with pytest.raises(InvalidRequest, match=name) as refused:
            request.model_validate({**body, name: "anything"})
        assert row.reason in refused.value.message
        with reporting(strict=False) as report:
            request.model_validate({**body, name: "anything"})
        assert report.names == [name]


def test_every_field_of_the_official_client_is_known() -> None:
    """Of its newest requests: honoured, or in the table of what is not and why."""
    for params, request in (
        (CompletionParams, ChatRequest),
        (TextParams, CompletionRequest),
        (ResponseParams, ResponsesRequest),
    ):
        known = {*request._names(), *request.foreign}
        assert not set(get_type_hints(params)) - known, request.__name__
    assert set(get_args(ResponseIncludable)) <= set(INCLUDED)


def test_lenient_servers_say_what_they_ignore(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), strict_fields=False, max_model_len=256)
    part = {"type": "text", "text": "hi", "colour": "red"}
    body = {
        "messages": [{"role": "user", "content": [part], "mood": "good"}],
        "max_tokens": 2,
        "tempature": 1,
        "a b": 2,
    }
    response = httpx.post(url + CHAT, json=body)
    answered(response)
    named = {"messages.content[0].colour", "messages.mood", "tempature", "a_b"}
    assert set(response.headers[HEADER].split(", ")) == named
    assert HEADER not in httpx.post(url + CHAT, json=USER).headers
    assert httpx.post(url + CHAT, json={**USER, "temperature": "hot"}).status_code == 400


def test_any_model_name_is_served_until_names_are_given(http: httpx.Client, serve: Any, tiny_checkpoint: Path) -> None:
    assert answered(http.post(CHAT, json={**USER, "model": "gpt-7"}))["model"] == "tiny-llama"
    url = serve(model_id=str(tiny_checkpoint), served_model_name="mine, gpt-4o", max_model_len=64)
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["mine", "gpt-4o"]
    assert httpx.get(f"{url}/v1/models/gpt-4o").json()["root"] == "mine"
    assert answered(httpx.post(url + CHAT, json={**USER, "model": "gpt-4o"}))["model"] == "mine"
    assert httpx.post(url + CHAT, json={**USER, "model": "tiny-llama"}).status_code == 404


def test_a_base_url_may_lack_its_v1(http: httpx.Client, serve: Any, tiny_checkpoint: Path) -> None:
    plain = answered(http.post(CHAT, json={**USER, "temperature": 0}))["choices"]
    assert answered(http.post(CHAT.removeprefix("/v1"), json={**USER, "temperature": 0}))["choices"] == plain
    assert answered(http.get("/models")) == answered(http.get("/v1/models"))
    for path in ("/models/", "/completions/none", "/modelsx", "/v1/chat"):
        assert http.get(path).status_code == 404, path
    url = serve(model_id=str(tiny_checkpoint), api_key="secret", max_model_len=64)
    assert httpx.get(f"{url}/models").status_code == 401


def test_groqs_paths_and_mistrals_cards(http: httpx.Client, serve: Any, tiny_checkpoint: Path) -> None:
    plain = answered(http.post(CHAT, json={**USER, "temperature": 0}))["choices"]
    assert answered(http.post(f"/openai{CHAT}", json={**USER, "temperature": 0}))["choices"] == plain
    (card,) = answered(http.get("/openai/v1/models"))["data"]
    assert card["type"] == "base"
    assert card["capabilities"]["completion_chat"]
    assert http.get("/openai/health").status_code == 404
    url = serve(model_id=str(tiny_checkpoint), api_key="secret", max_model_len=64)
    assert httpx.get(f"{url}/openai/v1/models").status_code == 401


def test_a_snapshot_of_the_hub_has_the_models_name(tmp_path: Path) -> None:
    from prerope.server.models.checkpoint import checkpoint_name

    folder = tmp_path / "models--org--some-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert checkpoint_name(str(folder)) == "org/some-model"


def test_the_checkpoints_sampling_defaults(serve: Any, byte_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "tiny-llama"
    shutil.copytree(byte_checkpoint, folder)
    path = folder / "generation_config.json"
    recommended = {"temperature": 0.5, "top_k": 1, "top_p": 0.9, "do_sample": True, "min_p": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | recommended))
    url = serve(model_id=str(folder), max_model_len=128)
    (card,) = httpx.get(f"{url}/v1/models").json()["data"]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert card["default_sampling_params"] == neutral | {"temperature": 0.5, "top_k": 1, "top_p": 0.9}

    def texts(url: str, **more: Any) -> set[str]:
        bodies = [{"prompt": "Once", "max_tokens": 8, "seed": seed, **more} for seed in range(3)]
        return {answered(httpx.post(f"{url}/generate", json=body))["text"] for body in bodies}

    assert len(texts(url)) == 1, "the model's top_k of 1 holds"
    assert len(texts(url, top_k=-1, top_p=1, temperature=1)) == 3, "a request has the last word"
    assert len(texts(url, top_k=-1, top_p=0, temperature=2)) == 1, "top_p 0 keeps the best token"
    off = serve(model_id=str(folder), generation_config="none", max_model_len=128)
    assert httpx.get(f"{off}/v1/models").json()["data"][0]["default_sampling_params"] == neutral
    assert len(texts(off)) == 3


# --- options of vLLM and SGLang ---


def ids_of(http: httpx.Client, **body: Any) -> list[int]:
    reply = answered(http.post("/generate", json={"prompt": "One two three", "max_tokens": 12, **body}))
    return list(reply["token_ids"])


def test_tokens_that_are_allowed_and_words_that_are_not(http: httpx.Client) -> None:
    plain = ids_of(http, temperature=0)
    assert set(ids_of(http, allowed_token_ids=[5, 6, 7], temperature=2, ignore_eos=True)) <= {5, 6, 7}
    words = [http.post("/detokenize", json={"tokens": plain[:1]}).json()["prompt"].strip()]
    banned = ids_of(http, temperature=0, bad_words=words)
    assert plain[0] not in banned
    two = http.post("/detokenize", json={"tokens": plain[1:3]}).json()["prompt"]
    pair = http.post("/tokenize", json={"prompt": two}).json()["tokens"]
    if pair == plain[1:3]:
        assert ids_of(http, temperature=0, bad_words=[two])[:2] == plain[:2], "only the second of them is not drawn"
        assert ids_of(http, temperature=0, bad_words=[two])[2] != plain[2]
    constrained = {"choice": ["yes", "no"], "bad_words": ["yes", "no", "y", "n"], "allowed_token_ids": [5]}
    reply = answered(http.post("/generate", json={"prompt": "Well?", "max_tokens": 5, **constrained}))
    assert reply["text"] in ("yes", "no"), "a grammar has the last word"


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_the_stop_string_may_stay(http: httpx.Client, name: str) -> None:
    body = {"prompt": "One two three", "temperature": 0, "max_tokens": 30}
    text = answered(http.post(COMPLETIONS, json=body))["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    stops = [stop, *(f"never {i}" for i in range(20))]
    for stream in (False, True):
        reply = http.post(COMPLETIONS, json={**body, "stop": stops, name: True, "stream": stream})
        found = streamed_text(reply) if stream else answered(reply)["choices"][0]["text"]
        assert found == text[: text.index(stop)] + stop


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def streamed_text(response: httpx.Response) -> str:
    return "".join(choice["text"] for event in events(response) for choice in event["choices"])


def test_line_ends_of_unicode_do_not_cut_events(http: httpx.Client) -> None:
    """httpx and requests split lines where str.splitlines does."""
    text = "a\u2028b\u2029c\u0085d"
    body = {"prompt": "Say it.", "choice": [text], "stream": True, "max_tokens": 30}
    response = http.post("/generate", json=body)
    assert not set(response.text) & set("\u2028\u2029\u0085")
    assert "".join(event.get("text", "") for event in events(response)) == text


def test_usage_so_far_and_token_ids(http: httpx.Client) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for path, body in ((CHAT, USER), (COMPLETIONS, {"prompt": "hi"})):
        body = {**body, "max_tokens": 5, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        whole = answered(http.post(path, json=body))
        chunks = events(http.post(path, json={**body, **options}))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"] is not None]
        assert counts == sorted(counts)
        assert counts[-1] == 5
        assert len(counts) > 3
        ids = [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids") or ()]
        assert ids == whole["choices"][0]["token_ids"]
        of_prompt = whole if path == CHAT else whole["choices"][0]
        first = chunks[0] if path == CHAT else chunks[0]["choices"][0]
        assert first["prompt_token_ids"] == of_prompt["prompt_token_ids"]
        assert len(of_prompt["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]


def test_prompt_logprobs_are_those_of_echo(http: httpx.Client) -> None:
    body = {"prompt": "One two three four", "max_tokens": 1}
    echoed = answered(http.post(COMPLETIONS, json={**body, "echo": True, "logprobs": 1}))["choices"][0]["logprobs"]
    scored = answered(http.post(COMPLETIONS, json={**body, "prompt_logprobs": 1}))["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    for token, logprob, entry in zip(echoed["tokens"][1:], echoed["token_logprobs"][1:], scored[1:], strict=False):
        assert any(one["decoded_token"] == token and abs(one["logprob"] - logprob) < 1e-4 for one in entry.values())
        assert [one["rank"] for one in entry.values()].count(1) == 1
    chat = answered(http.post(CHAT, json={**USER, "prompt_logprobs": 0}))
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_best_of_gives_the_likeliest(http: httpx.Client) -> None:
    body = {"prompt": ["One two", "Three"], "max_tokens": 6, "seed": 3, "logprobs": 0, "ignore_eos": True}
    drawn = answered(http.post(COMPLETIONS, json={**body, "n": 5}))["choices"]
    best = answered(http.post(COMPLETIONS, json={**body, "n": 2, "best_of": 5}))
    assert [choice["index"] for choice in best["choices"]] == list(range(4))
    for first, given_first in ((0, 0), (5, 2)):
        ranked = sorted(drawn[first : first + 5], key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
        expected = [choice["text"] for choice in ranked[:2]]
        assert [choice["text"] for choice in best["choices"][given_first : given_first + 2]] == expected
    assert best["usage"]["completion_tokens"] == 60, "all that were drawn count"


def test_prompts_are_truncated_where_that_is_asked_for(http: httpx.Client) -> None:
    ids = answered(http.post("/tokenize", json={"prompt": "a b c d e f g h"}))["tokens"]
    body = {"prompt": ids, "max_tokens": 1, "return_token_ids": True}

    def read(**more: Any) -> list[int]:
        reply = answered(http.post(COMPLETIONS, json={**body, **more}))
        return list(reply["choices"][0]["prompt_token_ids"])

    assert read(truncate_prompt_tokens=3) == ids[-3:]
    assert read(truncate_prompt_tokens=3, truncation_side="right") == ids[:3]
    assert read(truncate_prompt_tokens=100) == ids
    assert len(read(prompt="word " * 5000, truncate_prompt_tokens=-1, max_tokens=6)) == 250
    assert http.post(COMPLETIONS, json={**body, "truncate_prompt_tokens": 0}).status_code == 400


def test_special_tokens_may_be_shown(http: httpx.Client) -> None:
    special = answered(http.post("/tokenize", json={"prompt": "<|im_end|>"}))["tokens"]
    body = {"prompt": "x", "allowed_token_ids": special, "max_tokens": 2, "ignore_eos": True}
    assert answered(http.post("/generate", json=body))["text"] == ""
    assert answered(http.post("/generate", json={**body, "skip_special_tokens": False}))["text"] == "<|im_end|>" * 2


def test_a_reply_goes_on_with_the_last_message(http: httpx.Client) -> None:
    messages = [*USER["messages"], {"role": "assistant", "content": "The answer is"}]
    told = {"messages": messages, "continue_final_message": True}
    ids = answered(http.post("/tokenize", json=told))["tokens"]
    text = answered(http.post("/detokenize", json={"tokens": ids}))["prompt"]
    assert text.endswith("<|im_start|>assistant\nThe answer is")
    reply = answered(http.post(CHAT, json={**USER, **told, "return_token_ids": True, "add_generation_prompt": False}))
    assert reply["prompt_token_ids"] == ids
    for name in ("prefix", "partial"):  # Mistral's and DeepSeek's, Moonshot's and DashScope's
        asked = {"messages": [messages[0], {**messages[1], name: True}]}
        assert answered(http.post("/tokenize", json=asked))["tokens"] == ids
    both = http.post(CHAT, json={**USER, **told, "add_generation_prompt": True})
    assert both.json()["error"]["param"] == "continue_final_message"


def test_what_a_result_of_a_call_says_beside_its_text_is_told() -> None:
    part = {
        "type": "tool_result",
        "tool_use_id": "c",
        "content": "no",
        "is_error": True,
        "cache_control": {"type": "x"},
    }
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    for model, messages in (
        (ChatRequest, [{"role": "user", "content": [part]}]),
        (MessagesRequest, [{"role": "assistant", "content": [call]}, {"role": "user", "content": [part]}]),
    ):
        with reporting(strict=False) as report:
            model.model_validate({"messages": messages, "max_tokens": 4}).lowered()
        assert report.names == ["messages.is_error"]
        part["is_error"] = False
        with reporting(strict=False) as report:
            model.model_validate({"messages": messages, "max_tokens": 4}).lowered()
        assert report.names == []
        part["is_error"] = True


@pytest.mark.parametrize("ids", [("a", "a", 7, None, "b"), ("a", "a", "a_00000000", "a_00000001", "b")])
def test_pages_of_items_that_are_called_alike_end(ids: tuple[Any, ...]) -> None:
    """Each is listed once, whatever a client called them, and each has an id that is a text."""
    given = [{"role": "user", "content": str(index), "id": id_} for index, id_ in enumerate(ids)]
    found, after = list[str](), None
    for _ in given:
        page = json.loads(Page(json.dumps(given).encode(), 1, newest_first=False, after=after).run(None))
        found += [item["content"][0]["text"] for item in page["data"]]
        after = page["last_id"]
        assert isinstance(after, str)
        assert page["first_id"] == after
        assert page["has_more"] is (len(found) < len(given))
    assert found == ["0", "1", "2", "3", "4"]
    assert after == "b"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate", "/api/generate", "/api/chat"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_as_such(http: httpx.Client, path: str, number: str) -> None:
    """NaN differs from itself, so that one name for it was taken for two that differ."""
    prompt = json.dumps(USER if "chat" in path else {"prompt": "hi"})
    reply = http.post(path, content=f'{prompt[:-1]}, "temperature": {number}}}')
    assert (reply.status_code, "mean the same" in reply.text) == (400, False)
    assert re.search("temperature: Input should be (a finite number|less than)", reply.text), reply.text


def test_an_option_that_is_null_leaves_the_one_beside_it() -> None:
    """It was told as two that differ, though null asks for nothing."""
    body = OllamaGenerateRequest.model_validate({"prompt": "a", "temperature": 0.5, "options": {"temperature": None}})
    assert body.options is not None
    assert body.options.temperature == 0.5
    other = OllamaGenerateRequest.model_validate({"prompt": "a", "temperature": None, "options": {"temperature": 0.5}})
    assert other.options is not None
    assert other.options.temperature == 0.5
    with pytest.raises(InvalidRequest, match="mean the same"):
        OllamaGenerateRequest.model_validate({"prompt": "a", "temperature": 1, "options": {"temperature": 0.5}})
