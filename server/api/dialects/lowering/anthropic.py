"""What Anthropic's clients send to /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.replayed import tell_of_the_rest
from prerope.server.api.chat.tool_choice import ToolChoice
from prerope.server.api.chat.tools import Tool
from prerope.server.api.dialects.lowering.common import (
    begins_reply,
    call,
    function_tool,
    json_schema,
    list_of,
    message,
    not_read_here,
    object_of,
    text_of,
    without_token_ids,
)
from prerope.server.api.openai.schemas import OpenAIFields
from prerope.server.api.requests.body import INT32_MAX, RequestBody, Text
from prerope.server.api.requests.constraints import OpenAIConstraints, only_one
from prerope.server.api.requests.documents import REREAD_FIELD, Attention, DocumentReading
from prerope.server.api.requests.foreign import DIALECT, OF_A_REPLY, Foreign, hints, ignored
from prerope.server.api.requests.internal import Chat, GenerationRequest, Sampling
from prerope.server.api.requests.schemas import CUT_FIELD, SIDE_FIELD, SamplingFields, truncation
from prerope.server.api.requests.thinking import effort_kwargs
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText
from pydantic import Field


class OutputConfig(RequestBody):
    """`output_config`: how much the model is to think, and the schema that its reply follows."""

    path: ClassVar[str] = "output_config."
    foreign: ClassVar[Mapping[str, Foreign]] = hints("task_budget")

    effort: str | None = Field(None, description="Handed to the chat template.")
    format: dict[str, Any] | None = Field(None, description='{"type": "json_schema", "schema": …}')


FOREIGN: Mapping[str, Foreign] = {
    **DIALECT,
    **ignored("metadata", "service_tier", "cache_control", "betas", "inference_geo", "user_profile_id"),
    **ignored("workspace_id", "diagnostics", "billing_policy", "fallback_credit_token"),
    **hints("container", "context_management", "speed", "fallbacks", "compaction"),
    "mcp_servers": Foreign("the server calls no others; tools are their client's"),
    "thread": Foreign("conversations are kept by their client"),
}


class CountTokensRequest(RequestBody):
    """The part of a request that makes its prompt. `document_attention` and `document_reread` are ours."""

    asked_in: ClassVar[str] = "messages"

    foreign: ClassVar[Mapping[str, Foreign]] = {**FOREIGN, **OF_A_REPLY}

    model: Text | None = None
    messages: list[Any] = Field(min_length=1)
    system: str | list[Any] | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: dict[str, Any] | str | None = Field(None, description="An object; OpenAI's words, too.")
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = Field(None, description="Older name of output_config.format.")
    reasoning_effort: str | float | None = Field(None, description="OpenAI's name of output_config.effort.")
    parallel_tool_calls: bool | None = Field(None, description="OpenAI's word of tool_choice.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Handed to the chat template.")
    document_attention: Attention | None = None
    document_reread: int = REREAD_FIELD
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="Where the prompt is cut to leave room.")
    truncate_prompt_tokens: int | None = CUT_FIELD
    truncation_side: Literal["left", "right"] = SIDE_FIELD

    @property
    def tells_thoughts(self) -> bool:
        """Whether the reply's thoughts are told: its clients take the first block for the answer unless they asked."""
        return (self.thinking or {}).get("type") in ("enabled", "adaptive")

    def chat(self) -> Chat:
        given = self.tool_choice or {}
        choice = {"type": "any" if given == "required" else given} if isinstance(given, str) else given
        one = choice.get("disable_parallel_tool_use")
        parallel = self.parallel_tool_calls if one is None else one is not True
        effort = self.output_config.effort if self.output_config else None
        told = effort_kwargs(self.reasoning_effort if effort is None else effort)
        if self.thinking is not None:
            told["enable_thinking"] = self.tells_thoughts
        messages = list(self._messages())
        continues = begins_reply(messages)
        return Chat(
            messages=messages,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tools=[_tool(one, f"tools[{index}]") for index, one in enumerate(self.tools)],
            tool_choice=_choice(choice) if self.tools and choice else None,
            parallel_tool_calls=parallel,
            template_kwargs=told | self.chat_template_kwargs,
            reading=DocumentReading(attention=self.document_attention, reread=self.document_reread),
        )

    def lowered(self) -> GenerationRequest:
        return GenerationRequest(
            input=self.chat(),
            model=self.model,
            sampling=Sampling(max_tokens=self.max_tokens or 1),
            truncation=truncation(self.truncate_prompt_tokens, self.truncation_side),
        )

    def _messages(self) -> Iterator[Message]:
        if self.system:
            yield message("system", _parts(self.system, "system"))
        for index, one in enumerate(self.messages):
            given = object_of(one, f"messages[{index}]")
            yield from _lowered(given, f"messages[{index}]")


class MessagesRequest(CountTokensRequest, SamplingFields, OpenAIConstraints):
    """POST /v1/messages. Beside Anthropic's fields it takes those of sampling by OpenAI's and vLLM's names, their
    constraints, and `rope`."""

    foreign: ClassVar[Mapping[str, Foreign]] = FOREIGN
    synonyms: ClassVar[Mapping[str, str]] = {**OpenAIFields.synonyms, "max_completion_tokens": "max_tokens"}

    max_tokens: int = Field(ge=1, le=INT32_MAX)

    def lowered(self) -> GenerationRequest:
        without_token_ids(self.return_token_ids)
        return GenerationRequest(
            input=self.chat(),
            model=self.model,
            sampling=self.sampling(),
            output=self.output(),
            constraint=only_one([self._constraint(), self.wanted_grammar()]),
            **self.shared(),
        )

    def _constraint(self) -> GrammarText | None:
        name, given = "output_format", self.output_format
        if self.output_config is not None and self.output_config.format:
            name, given = "output_config.format", self.output_config.format
        match given:
            case None | {"type": "text"}:
                return None
            case {"type": "json_schema", "schema": schema}:
                return json_schema(schema, f"{name}.schema")
        raise InvalidRequest(f'\'{name}\' is {{"type": "json_schema", "schema": …}}', param=name)


def _parts(value: Any, param: str) -> str | list[Mapping[str, Any]]:
    """Text, or blocks of it and documents, as parts of a message."""
    if isinstance(value, str):
        return value
    given = enumerate(list_of(value, param))
    return [_part(object_of(one, f"{param}[{index}]"), f"{param}[{index}]") for index, one in given]


def _part(block: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    match block.get("type"):
        case "text":
            return {"type": "text", "text": text_of(block.get("text"), f"{param}.text")}
        case "document" if isinstance(block.get("source"), dict) and block["source"].get("type") in ("text", "content"):
            return {name: block[name] for name in ("type", "source", "title", "context") if name in block}
        case "document":
            raise InvalidRequest(
                f"'{param}.source' must be {{'type': 'text', 'media_type': 'text/plain', 'data': …}}, or 'content' "
                "with blocks of text: of a document this server reads text only",
                param=f"{param}.source",
                code="unsupported_field",
            )
        case kind:
            raise not_read_here(kind, param)


def _lowered(given: Any, param: str) -> Iterator[Message]:
    """One message as OpenAI's: results of tools become messages of their own, before the text beside them."""
    role, content = given.get("role"), given.get("content")
    openais = {name: given[name] for name in ("tool_calls", "tool_call_id") if given.get(name)}
    if content is None and role == "assistant" and not openais:  # who said nothing
        return
    if isinstance(content, str) or openais or role not in ("user", "assistant", "system"):
        yield message(
            role, text_of(content or "", f"{param}.content") if isinstance(content, str | None) else content, **openais
        )
        return
    parts, calls = [], []
    for index, one in enumerate(list_of(content, f"{param}.content")):
        place = f"{param}.content[{index}]"
        block = object_of(one, place)
        match block.get("type"):
            case "tool_result":
                result = _parts(block.get("content") or "", f"{place}.content")
                tell_of_the_rest(block)
                yield message("tool", result, tool_call_id=block.get("tool_use_id"))
            case "tool_use":
                calls.append(call(block.get("id"), block.get("name"), json.dumps(block.get("input") or {})))
            case "thinking" | "redacted_thinking":
                pass  # of an earlier reply: the model is not told its thoughts again
            case _:
                parts.append(_part(block, place))
    if parts or calls:
        yield message(role, parts, **({"tool_calls": calls} if calls else {}))


def _tool(value: Any, param: str) -> Tool:
    given = object_of(value, param)
    if given.get("type", "custom") != "custom":
        raise InvalidRequest(
            f"'{param}' is a tool that Anthropic runs ('{str(given['type'])[:64]}'); only functions are supported",
            param="tools",
            code="unsupported_field",
        )
    return function_tool(given.get("name"), given.get("description"), given.get("input_schema"), given.get("strict"))


def _choice(value: dict[str, Any]) -> ToolChoice:
    match value.get("type"):
        case "auto" | "none" as mode:
            return ToolChoice(mode)
        case "any":
            return ToolChoice("required")
        case "tool":
            return ToolChoice("required", text_of(value.get("name"), "tool_choice.name"))
    raise InvalidRequest("'tool_choice.type' is auto, any, tool or none", param="tool_choice")
