"""Messages of a history as the replies of many servers and services were, brought to ours.

A history records: what an assistant's or a tool's message says beside what is known asks for nothing of the reply. It
is left out, and its sender is told (`requests.body`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from prerope.server.api.requests.body import current_report
from prerope.server.api.requests.foreign import is_empty
from prerope.server.errors import InvalidRequest

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_text", "thinking_content")
"""Names of what an assistant thought: of DeepSeek, vLLM, Ollama, Copilot."""

THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text", "reasoning_content": "reasoning_content"}
"""Parts of a content that are thoughts, and the field that has them: of Mistral, SGLang, LangChain, the Vercel SDK."""

CALL_PARTS = ("tool_use", "tool-call", "tool_call", "function_call")
"""Parts that are calls: of Anthropic, the Vercel SDK, LangChain, Responses."""

RESULT_PARTS = ("tool_result", "tool-result", "function_call_output")
"""Parts that are what a call gave: of Anthropic, the Vercel SDK, Responses."""

RESULT_WORDS = ("content", "output", "result")
CALL_IDS = ("tool_use_id", "toolCallId", "call_id")
OF_RESULTS = frozenset({"type", "toolName", "name", "id", "status", "cache_control", *RESULT_WORDS, *CALL_IDS})
"""What a result's part has of the result, or what asks for nothing of the model."""

NO_PARTS = ("redacted_thinking", "redacted_reasoning")


def replayed(data: dict[str, Any], known: Set[str]) -> dict[str, Any]:
    """A message with one content, one name for its thoughts, and calls by their newer name."""
    message = dict(data)
    if message.get("role") == "function":  # as they were called before there were tools
        message["role"] = "tool"
    refusal = message.pop("refusal", None)
    if message.get("role") not in ("assistant", "tool"):
        return message
    thoughts = [thought for name in THOUGHTS if isinstance(thought := message.pop(name, None), str) and thought]
    if isinstance(message.get("content"), list):
        kept, found = _without_thoughts(message["content"])
        message["content"], thoughts = kept, thoughts or found
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if isinstance(message.get("content"), list):
        message["content"], calls = _without_calls(message["content"])
        if calls:
            message["tool_calls"] = _once(calls, message.get("tool_calls"))
    called = message.pop("function_call", None)
    if isinstance(called, dict) and called and not message.get("tool_calls"):
        message["tool_calls"] = [{"type": "function", "function": called}]
    if message.get("content") is None:
        message["content"] = refusal or ""
    for name in message.keys() - known:
        if not is_empty(message.pop(name)):
            current_report().ignore(f"messages.{name}")
    return message


def results_apart(messages: Any) -> Any:
    """A chat in which each result of a call is a message of its own, as it is OpenAI's."""
    if not isinstance(messages, list):
        return messages
    apart: list[Any] = []
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        if not isinstance(parts, list) or not any(_kind(part) in RESULT_PARTS for part in parts):
            apart.append(message)
            continue
        apart += [_result(part) for part in parts if _kind(part) in RESULT_PARTS]
        if rest := [part for part in parts if _kind(part) not in RESULT_PARTS]:
            apart.append({**message, "content": rest})
    return apart


def tell_of_the_rest(result: Mapping[str, Any]) -> None:
    """What a result of a call says beside what templates write, such as that it was an error: its sender is told."""
    for name in sorted(result.keys() - OF_RESULTS):
        if not is_empty(result[name]):
            current_report().ignore(f"messages.{name}")


def _result(part: dict[str, Any]) -> dict[str, Any]:
    call_id = next((part[name] for name in CALL_IDS if name in part), None)
    told = next((part[name] for name in RESULT_WORDS if part.get(name) is not None), "")
    tell_of_the_rest(part)
    if isinstance(told, dict) and set(told) == {"type", "value"}:  # as the Vercel SDK says what it is
        told = told["value"]
    parts = isinstance(told, list) and all(isinstance(one, dict) and "type" in one for one in told)
    content = told if isinstance(told, str) or parts else json.dumps(told, ensure_ascii=False)
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def _without_calls(parts: list[Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """The parts without tool calls, and the calls in the form that a message has."""
    kept, calls = [], []
    for part in parts:
        if _kind(part) not in CALL_PARTS:
            kept.append(part)
            continue
        call_id = next((part[name] for name in ("call_id", "toolCallId", "id") if part.get(name)), None)
        arguments = next((part[name] for name in ("arguments", "input", "args") if name in part), None) or {}
        function = {"name": part.get("name", part.get("toolName")), "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
    return kept, calls


def _once(among_parts: list[dict[str, Any]], beside: Any) -> Any:
    """A message's calls, which may be written among its parts, beside them, or in both ways."""
    if not beside or not isinstance(beside, list):
        return beside or among_parts
    if not {*map(_call_id, among_parts)} <= {*map(_call_id, beside)}:
        raise InvalidRequest(
            "'messages' has a message with calls in 'content' that its 'tool_calls' do not have: give all of them in "
            "one of the two",
            param="messages",
        )
    return beside


def _call_id(call: Any) -> str:
    return str(call.get("id")) if isinstance(call, dict) else ""


def _kind(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else ""


def _without_thoughts(parts: list[Any]) -> tuple[list[Any], list[str]]:
    """The parts without thoughts, and the thoughts as one text, if there are any."""
    kept, texts = [], []
    for part in parts:
        kind = _kind(part)
        if kind not in THOUGHT_PARTS and kind not in NO_PARTS:
            kept.append(part)
            continue
        told = part.get(THOUGHT_PARTS.get(kind, ""))
        if isinstance(told, list):  # Mistral's are parts again
            told = "".join(one["text"] for one in told if isinstance(one, dict) and isinstance(one.get("text"), str))
        if isinstance(told, str) and told:
            texts.append(told)
    return kept, ["\n".join(texts)] if texts else []
