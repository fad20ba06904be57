"""What adapters share: messages and tools in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.tools import Tool
from prerope.server.api.requests.constraints import schema_grammar
from prerope.server.api.requests.wording import MAX_SHOWN, json_type
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText


def message(role: str, content: str | Sequence[Mapping[str, Any]], **more: Any) -> Message:
    """A message as OpenAI's chat has it."""
    return Message.model_validate({"role": role, "content": content, **more})


def call(call_id: str | None, name: Any, arguments: str) -> dict[str, Any]:
    """A call that an assistant's message holds."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def begins_reply(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the reply, as Anthropic's and Ollama's chats have it."""
    last = messages[-1] if messages else None
    return last is not None and last.role == "assistant" and bool(last.content) and not last.tool_calls


def function_tool(name: Any, description: Any, parameters: Any, strict: Any = None) -> Tool:
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return Tool.model_validate({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})


def object_of(value: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{param}' must be an object, not {json_type(value)}", param=param)
    return value


def list_of(value: Any, param: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"'{param}' must be a list, not {json_type(value)}", param=param)
    return value


def text_of(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"'{param}' must be a string, not {json_type(value)}", param=param)
    return value


def not_read_here(kind: Any, param: str) -> InvalidRequest:
    """For pictures, sound and files."""
    return InvalidRequest(
        f"'{param}' has the type '{str(kind)[:MAX_SHOWN]}': this server reads and writes text only",
        param=param,
        code="unsupported_field",
    )


def without_token_ids(requested: bool) -> None:
    """InvalidRequest where a reply's token ids are asked for: replies of these shapes have no place for them."""
    if requested:
        raise InvalidRequest(
            "'return_token_ids' is not supported here: /v1/chat/completions and /v1/completions tell them, and this "
            "path with /render behind it the prompt's",
            param="return_token_ids",
            code="unsupported_field",
        )


def json_schema(schema: Any, param: str) -> GrammarText:
    """A reply that follows a JSON schema; `{"type": "object"}` is any object."""
    return schema_grammar(object_of(schema, param), param)
