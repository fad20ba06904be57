"""Chat messages as clients write them, brought to the one shape that chat templates take: role, text and tool calls.

Pictures are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, ClassVar, Literal

from prerope.server.api.chat.documents import DOCUMENT_PART_NAMES, Content, Document, document_part
from prerope.server.api.chat.replayed import replayed, results_apart
from prerope.server.api.requests.body import RequestBody, Text, current_report, unicode_text
from prerope.server.api.requests.foreign import EMPTY, MESSAGE, PART, TOOL_CALL, Foreign, is_empty
from prerope.server.api.requests.wording import MAX_SHOWN, json_type
from prerope.server.errors import InvalidRequest
from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, PlainValidator, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json

MAX_NAME = 128
"""Characters of the name of a function."""

MAX_ID = 2**14
"""Characters of a call's id: LiteLLM hides signatures of Gemini's thoughts in them."""

MAX_MESSAGES = 10_000
MAX_PARTS = 10_000
"""The most messages of a chat, and parts of one message: each costs time by being there, however little it says."""

ROLES = ("system", "developer", "user", "assistant", "tool")


def _role(value: Any) -> Any:
    if value not in ROLES:
        shown = f"'{value[:MAX_SHOWN]}'" if isinstance(value, str) else json_type(value)
        raise InvalidRequest(f"a message's 'role' is one of {', '.join(ROLES)}, not {shown}", param="messages")
    return value


def _content(value: Any) -> Content:
    """The text of a message; parts are joined by a line break, as vLLM does for templates that take text only."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list):
        if len(value) > MAX_PARTS:
            raise InvalidRequest(
                f"'content' has {len(value)} parts; at most {MAX_PARTS} are taken: join some of them", param="messages"
            )
        return Content.joined([_part(part, f"content[{index}]") for index, part in enumerate(value)])
    return Content(unicode_text(value, "content"))


def _part(part: Any, param: str) -> str | Document:
    if isinstance(part, str):
        return unicode_text(part, param)
    if not isinstance(part, dict):
        raise InvalidRequest(f"'{param}' must be an object, not {json_type(part)}", param="messages")
    kind = str(part.get("type", "text"))
    if kind == "document":
        _check_extras(part, DOCUMENT_PART_NAMES, param)
        return document_part(part, param)
    name = TEXT_PARTS.get(kind)
    if name is None:
        shown = kind[:MAX_SHOWN]
        raise InvalidRequest(
            f"'{param}' has the type '{shown}'; only 'text' and 'document' are supported, calls in an assistant's "
            "message, and their results",
            param="messages",
        )
    _check_extras(part, {"type", name}, param)
    return unicode_text(part.get(name), f"{param}.{name}")


def _check_extras(part: dict[str, Any], known: Set[str], param: str) -> None:
    for extra in sorted(part.keys() - known):
        foreign = PART.get(extra)
        if not (is_empty(part[extra]) or (foreign is not None and foreign.asks_for_nothing(part[extra]))):
            if current_report().strict:
                shown = f"{param}.{extra[:MAX_SHOWN]}"
                raise InvalidRequest(f"unknown field '{shown}'", param="messages", code="unknown_field")
            current_report().ignore(f"messages.{param}.{extra}")


TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the field that has it."""

_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "null"},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "object",
                        "properties": {
                            "type": {"enum": [*TEXT_PARTS]},
                            **{
                                name: {"anyOf": [{"type": "string"}, {"enum": list(EMPTY)}]}
                                for name in TEXT_PARTS.values()
                            },
                            **{name: {"description": "Accepted and ignored."} for name in PART},
                        },
                        "additionalProperties": {"enum": list(EMPTY)},
                    },
                    {
                        "type": "object",
                        "description": "A document: a text, or Anthropic's {source, title, context}.",
                        "properties": {"type": {"enum": ["document"]}},
                        "required": ["type"],
                    },
                ]
            },
        },
    ]
}


def _arguments(value: Any) -> Any:
    """The arguments of a call as text: some clients keep the object that they read the text into."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _id(value: Any) -> Any:
    return str(value) if type(value) is int else value


CallId = Annotated[Text, Field(max_length=MAX_ID), BeforeValidator(_id)]


class CalledFunction(RequestBody):
    """A function and its arguments: the text of a JSON object, as the model wrote it, whole or cut short."""

    path: ClassVar[str] = "messages.tool_calls.function."

    name: Text = Field(max_length=MAX_NAME)
    arguments: Annotated[Text, BeforeValidator(_arguments)] = ""

    def parsed(self) -> dict[str, Any] | str:
        """Chat templates write the arguments themselves and want them as an object. A call of ours that was cut short
        comes back as it is: of such a one, what can be read; the text itself where that is nothing. Others' models
        write `null`, and some clients the text of a text."""
        arguments: Any = self.arguments
        for _ in range(2):
            try:
                arguments = from_json(arguments.strip() or "{}", allow_partial="trailing-strings")
            except ValueError:
                break
            if not isinstance(arguments, str):
                break
        return {} if arguments is None else arguments if isinstance(arguments, dict) else self.arguments


class ToolCall(RequestBody):
    """A call that the assistant made earlier."""

    path: ClassVar[str] = "messages.tool_calls."
    foreign: ClassVar[Mapping[str, Foreign]] = TOOL_CALL

    id: CallId | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(RequestBody):
    """One message of a chat. Replies of this API can be sent back as they came."""

    path: ClassVar[str] = "messages."
    foreign: ClassVar[Mapping[str, Foreign]] = MESSAGE
    synonyms: ClassVar[Mapping[str, str]] = {"partial": "prefix"}  # Moonshot's and DashScope's

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Annotated[Content, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
    name: Text | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_PARTS)
    tool_call_id: CallId | None = None
    reasoning_content: Annotated[Text | None, WithJsonSchema({})] = Field(
        None, description="What the assistant thought, for the chat template; ignored in its messages if it is no text."
    )
    prefix: bool | None = Field(None, description="Of the last message: the reply goes on with it (Mistral, DeepSeek).")

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """`content` may be missing where an assistant or a tool said nothing, and what else theirs hold is ignored."""
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        body = handler.resolve_ref_schema(schema)
        body["required"] = [name for name in body["required"] if name != "content"]
        body["additionalProperties"] = {"description": "Ignored in what an assistant or a tool said; else to be empty."}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_answered(cls, data: Any) -> Any:
        """What replies of this API and of others hold, see `replayed`."""
        return replayed(data, {*cls._names(), *cls.foreign, *cls.synonyms}) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _roles_of_tool_fields(self) -> Message:
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise InvalidRequest(f"'messages.{name}' is of messages of role '{role}' only", param="messages")
        return self

    @property
    def num_chars(self) -> int:
        return (
            len(self.content)
            + len(self.reasoning_content or "")
            + sum(len(call.function.arguments) for call in self.tool_calls or ())
        )


Messages = Annotated[list[Message], BeforeValidator(results_apart)]
"""A chat. Results of calls that stand among the parts of a message are messages of their own."""


def as_template_input(messages: Sequence[Message], *, knows_developer: bool) -> list[dict[str, Any]]:
    """What `template.render_chat` takes. A template without developers is told as the system."""
    rendered = []
    for message in messages:
        dumped = message.model_dump(exclude_none=True, exclude={"tool_calls", "prefix"})
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
