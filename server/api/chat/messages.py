"""Chat messages as clients write them, brought to the one shape that chat templates take: role, text and tool calls.

Pictures are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from prerope.server.api.requests.body import MAX_SHOWN, Refusal, RequestBody, Text, json_type, unicode_text
from prerope.server.errors import InvalidRequest
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

ROLES = ("system", "developer", "user", "assistant", "tool")


def _role(value: Any) -> Any:
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


_AUDIO = Refusal("this server reads and writes text only")

_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}


class CalledFunction(RequestBody):
    """A function and its arguments: the text of a JSON object, as the model wrote it."""

    path: ClassVar[str] = "messages.tool_calls.function."

    name: Text = Field(max_length=64)
    arguments: Text

    def parsed(self) -> dict[str, Any]:
        """Chat templates write the arguments themselves and want them as an object."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequest(
                "'messages.tool_calls.function.arguments' must be the text of a JSON object", param="messages"
            )
        return arguments


class ToolCall(RequestBody):
    """A call that the assistant made earlier."""

    path: ClassVar[str] = "messages.tool_calls."
    ignored: ClassVar[frozenset[str]] = frozenset({"index"})  # of a stream's delta

    id: Text | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(RequestBody):
    """One message of a chat. Replies of this API can be sent back as they came."""

    path: ClassVar[str] = "messages."
    ignored: ClassVar[frozenset[str]] = frozenset({"annotations"})
    unsupported: ClassVar[dict[str, Refusal]] = {
        "function_call": Refusal("use 'tool_calls'"),
        "audio": _AUDIO,
        "refusal": Refusal("put the words of a refusal into 'content'"),
    }

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
    name: Text | None = Field(None, max_length=64)
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": ""}
        return data

    @model_validator(mode="after")
    def _roles_of_tool_fields(self) -> Message:
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise InvalidRequest(f"'messages.{name}' is of messages of role '{role}' only", param="messages")
        return self

    @property
    def num_chars(self) -> int:
        return len(self.content) + sum(len(call.function.arguments) for call in self.tool_calls or ())


def as_template_input(messages: Sequence[Message], *, knows_developer: bool) -> list[dict[str, Any]]:
    """What `Tokenizer.render_chat` takes. A template without developers is told as the system."""
    rendered = []
    for message in messages:
        dumped = message.model_dump(exclude_none=True, exclude={"tool_calls"})
        if message.role == "developer" and not knows_developer:
            dumped["role"] = "system"
        if message.tool_calls:
            dumped["tool_calls"] = [
                {**call.model_dump(exclude_none=True), "function": _called(call.function)}
                for call in message.tool_calls
            ]
        rendered.append(dumped)
    return rendered


def _called(function: CalledFunction) -> dict[str, Any]:
    return {"name": function.name, "arguments": function.parsed()}
