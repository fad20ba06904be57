"""Chat messages as clients write them, brought to the one shape that chat templates take: role and text.

Tool calls and pictures are refused by name. To serve tools, add the `tool` role and `tool_calls` here, and hand the
request's tools to the template in `openai_chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.api.body import MAX_SHOWN, Refusal, RequestBody, Text, json_type, unicode_text
from server.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant")


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise InvalidRequest(f"messages of role '{value}' are not supported: tools are not", param="messages")
    if value not in ROLES:
        shown = f"'{value[:MAX_SHOWN]}'" if isinstance(value, str) else json_type(value)
        raise InvalidRequest(f"a message's 'role' is one of {', '.join(ROLES)}, not {shown}", param="messages")
    return value


def _content(value: Any) -> str:
    """The text of a message; parts are joined by a line break, as vLLM does for templates that take text only."""
    if isinstance(value, list):
        return "\n".join(_part(part, f"content[{index}]") for index, part in enumerate(value))
    return unicode_text(value, "content")


def _part(part: Any, param: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(f"'{param}' must be an object, not {json_type(part)}", param="messages")
    if part.get("type") != "text":
        shown = str(part.get("type"))[:MAX_SHOWN]
        raise InvalidRequest(f"'{param}' has the type '{shown}'; only 'text' is supported", param="messages")
    extra = sorted(part.keys() - {"type", "text"})
    if extra:
        raise InvalidRequest(f"unknown field '{param}.{extra[0][:MAX_SHOWN]}'", param="messages", code="unknown_field")
    return unicode_text(part.get("text"), f"{param}.text")


_TOOLS = Refusal("tools are not", harmless=([], {}))
_AUDIO = Refusal("this server reads and writes text only")

_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
        },
    ]
}


class Message(RequestBody):
    """One message of a chat. Replies of this API can be sent back as they came."""

    path: ClassVar[str] = "messages."
    ignored: ClassVar[frozenset[str]] = frozenset({"annotations"})
    unsupported: ClassVar[dict[str, Refusal]] = {
        "tool_calls": _TOOLS,
        "tool_call_id": _TOOLS,
        "function_call": _TOOLS,
        "audio": _AUDIO,
        "refusal": Refusal("put the words of a refusal into 'content'"),
    }

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
    name: Text | None = Field(None, max_length=64)


def as_template_input(messages: Sequence[Message], *, knows_developer: bool) -> list[dict[str, Any]]:
    """What `Tokenizer.apply_chat_template` takes. A template without developers is told as the system."""
    dumped = [message.model_dump(exclude_none=True) for message in messages]
    if not knows_developer:
        for message in dumped:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
    return dumped
