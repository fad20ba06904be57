"""Messages of a history as the replies of many servers and services were, brought to ours.

A history records: what an assistant's or a tool's message says beside what is known asks for nothing of the reply. It
is left out, and its sender is told (`leniency`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from prerope.server.api.requests.foreign import is_empty
from prerope.server.api.requests.leniency import current_report

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_text", "thinking_content")
"""Names of what an assistant thought: of DeepSeek, vLLM, Ollama, Copilot."""

THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text", "reasoning_content": "reasoning_content"}
"""Parts of a content that are thoughts, and the field that has them: of Mistral, SGLang, LangChain, the Vercel SDK."""

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
    called = message.pop("function_call", None)
    if isinstance(called, dict) and called and not message.get("tool_calls"):
        message["tool_calls"] = [{"type": "function", "function": called}]
    if message.get("content") is None:
        message["content"] = refusal or ""
    for name in message.keys() - known:
        if not is_empty(message.pop(name)):
            current_report().ignore(f"messages.{name}")
    return message


def _without_thoughts(parts: list[Any]) -> tuple[list[Any], list[str]]:
    """What is left of them, and the thoughts as one text, if there are any."""
    kept, texts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or (kind not in THOUGHT_PARTS and kind not in NO_PARTS):
            kept.append(part)
            continue
        told = part.get(THOUGHT_PARTS.get(kind, ""))
        if isinstance(told, list):  # Mistral's are parts again
            told = "".join(one["text"] for one in told if isinstance(one, dict) and isinstance(one.get("text"), str))
        if isinstance(told, str) and told:
            texts.append(told)
    return kept, ["\n".join(texts)] if texts else []
