"""What OpenAI's clients send to /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.tools import Tool, ToolChoice
from prerope.server.api.dialects.requests.common import (
    call,
    function_tool,
    json_schema,
    list_of,
    message,
    not_read_here,
    object_of,
    text_of,
)
from prerope.server.api.requests.body import INT32_MAX, MAX_SHOWN, RequestBody, Text, Verbatim
from prerope.server.api.requests.foreign import IGNORED, Foreign
from prerope.server.api.requests.internal import Chat, GenerationRequest, Sampling
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText
from pydantic import Field, PrivateAttr
from pydantic.json_schema import SkipJsonSchema


class ResponsesRequest(RequestBody):
    """POST /v1/responses."""

    foreign: ClassVar[Mapping[str, Foreign]] = dict.fromkeys(
        {
            *("user", "safety_identifier", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention"),
            *("include", "truncation", "reasoning", "stream_options", "max_tool_calls", "prompt_cache_options"),
        },
        IGNORED,
    )

    model: Text | None = None
    input: str | list[Any]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool = False
    store: bool = True
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    text: dict[str, Any] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    background: bool = False
    conversation: Any = None
    prompt: Any = None
    previous_response_id: Text | None = None
    history: SkipJsonSchema[dict[str, Any] | None] = Field(None, alias="_history", exclude=True)

    _slim: tuple[str, dict[str, Verbatim]] | None = PrivateAttr(None)

    def slim(self) -> None:
        self._slim = self.kept(), {name: Verbatim.of(value) for name, value in self.repeated().items()}
        super().slim()
        self.tool_choice = self.history = None

    def kept(self) -> str:
        """The conversation as JSON, a list."""
        return Verbatim.of(self.items()).text if self._slim is None else self._slim[0]

    def repeated(self) -> Mapping[str, Any]:
        """What the response repeats of lists and objects."""
        if self._slim is not None:
            return self._slim[1]
        text = self.text or {"format": {"type": "text"}}
        return {"text": text, "tool_choice": self.tool_choice or "auto", "tools": self.tools}

    def items(self) -> list[Any]:
        """All of the conversation: what was kept, and what is new."""
        new = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        if self.previous_response_id is None:
            return list(new)
        history = self.history or {}
        kept = history.get("items") if history.get("id") == self.previous_response_id else None
        if not isinstance(kept, list):
            raise InvalidRequest(
                f"'previous_response_id' is '{self.previous_response_id[:MAX_SHOWN]}': that response is not kept here "
                "(any more, or for this key); send the whole conversation as 'input'",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return [*kept, *new]

    def lowered(self) -> GenerationRequest:
        for name, reason in (
            ("background", "replies are made while their client waits"),
            ("conversation", "conversations are kept by their client; use previous_response_id"),
            ("prompt", "there are no stored prompts here"),
        ):
            if getattr(self, name):
                raise InvalidRequest(f"'{name}' is not supported: {reason}", param=name, code="unsupported_field")
        chat = Chat(
            messages=list(self._messages()),
            tools=[_tool(one, f"tools[{index}]") for index, one in enumerate(self.tools)],
            tool_choice=_choice(self.tool_choice) if self.tools else None,
            parallel_tool_calls=self.parallel_tool_calls,
        )
        sampling = Sampling(
            max_tokens=self.max_output_tokens,
            temperature=0.0 if self.top_p == 0 else self.temperature,
            top_p=self.top_p or None,
        )
        return GenerationRequest(input=chat, model=self.model, sampling=sampling, constraint=self._constraint())

    def _constraint(self) -> GrammarText | None:
        given = (self.text or {}).get("format") or {"type": "text"}
        match given.get("type"):
            case "text":
                return None
            case "json_object":
                return json_schema({"type": "object"}, "text.format")
            case "json_schema":
                return json_schema(given.get("schema"), "text.format.schema")
        raise InvalidRequest("'text.format.type' is text, json_object or json_schema", param="text.format")

    def _messages(self) -> Iterator[Message]:
        if self.instructions:
            yield message("system", self.instructions)
        pending: list[dict[str, Any]] = []  # calls that stand side by side are of one message
        for index, one in enumerate(self.items()):
            place = f"input[{index}]"
            item = object_of(one, place)
            if item.get("type") == "function_call":
                pending.append(call(item.get("call_id"), item.get("name"), text_of(item.get("arguments"), place)))
                continue
            if pending:
                yield message("assistant", "", tool_calls=pending)
                pending = []
            yield from _lowered(item, place)
        if pending:
            yield message("assistant", "", tool_calls=pending)


def _lowered(item: Any, param: str) -> Iterator[Message]:
    match item.get("type", "message"):
        case "message":
            yield message(item.get("role", "user"), _content(item.get("content"), f"{param}.content"))
        case "function_call_output":
            output = _content(item.get("output") or "", f"{param}.output")
            yield message("tool", output, tool_call_id=item.get("call_id"))
        case "reasoning" | "item_reference":
            pass
        case kind:
            raise not_read_here(kind, param)


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    texts = []
    for index, one in enumerate(list_of(value, param)):
        part = object_of(one, f"{param}[{index}]")
        if part.get("type") not in ("input_text", "output_text", "text", "refusal"):
            raise not_read_here(part.get("type"), f"{param}[{index}]")
        texts.append(text_of(part.get("text", part.get("refusal")), f"{param}[{index}].text"))
    return "\n".join(texts)


def _tool(value: Any, param: str) -> Tool:
    given = object_of(value, param)
    if given.get("type") != "function":
        raise InvalidRequest(
            f"'{param}' has the type '{str(given.get('type'))[:MAX_SHOWN]}': only functions are supported",
            param="tools",
            code="unsupported_field",
        )
    return function_tool(given.get("name"), given.get("description"), given.get("parameters"))


def _choice(value: Any) -> ToolChoice | None:
    match value:
        case None:
            return None
        case "none" | "auto" | "required" as mode:
            return ToolChoice(mode)
        case {"type": "function", "name": str(name)}:
            return ToolChoice("required", name)
    raise InvalidRequest("'tool_choice' is none, auto, required or one function", param="tool_choice")
