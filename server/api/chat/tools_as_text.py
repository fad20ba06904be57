"""Tools for models whose chat template knows none: a prompt that says what there is, and calls written as text.

The format is Hermes', which most open models have seen. Where a call is required the grammar sees to it, so agents work
on any model; under `auto` it is the model's affair whether it calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PROMPT = """You can call these functions. Each is described by a JSON schema:
{tools}

To call one, write its name and its arguments as JSON between tags, and nothing else:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>
The result is then given between <tool_response> tags."""


def as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Any]:
    """Messages for a template that knows roles and texts alone. system: it knows that role."""
    written: list[dict[str, Any]] = []
    for message in messages:
        text, role = _text(message), "user" if message["role"] == "tool" else message["role"]
        if message["role"] == "tool" and written and written[-1].get("answers"):
            written[-1]["content"] += "\n" + text
        else:
            written.append({"role": role, "content": text, "answers": message["role"] == "tool"})
    if tools:
        _tell(written, PROMPT.format(tools="\n".join(_schema(tool) for tool in tools)), system=system)
    return [{"role": message["role"], "content": message["content"]} for message in written]


def _text(message: Mapping[str, Any]) -> str:
    content = str(message["content"])
    if message["role"] == "tool":
        return f"<tool_response>\n{content}\n</tool_response>"
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return "\n".join(filter(None, [content, *calls]))


def _tell(messages: list[dict[str, Any]], prompt: str, *, system: bool) -> None:
    """Put the prompt where a model looks first: after the system's words, or before the first message's."""
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = "\n\n".join(filter(None, [messages[0]["content"], prompt]))
    elif system or not messages:
        messages.insert(0, {"role": "system", "content": prompt})
    else:
        messages[0]["content"] = f"{prompt}\n\n{messages[0]['content']}"


def _schema(tool: Mapping[str, Any]) -> str:
    return json.dumps(tool["function"], ensure_ascii=False)
