"""What OpenAI's clients send to /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.tool_choice import tool_choice
from prerope.server.api.chat.tools import Tool
from prerope.server.api.dialects.lowering.common import (
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
from prerope.server.api.requests.body import RequestBody, Text, Verbatim, current_report
from prerope.server.api.requests.constraints import OpenAIConstraints, only_one
from prerope.server.api.requests.foreign import BODY, FREE_TOOL, HINT, Foreign, ignored
from prerope.server.api.requests.internal import Chat, GenerationRequest
from prerope.server.api.requests.schemas import ALL_THAT_FIT, MAX_LOGPROBS, MaxTokens, SamplingFields
from prerope.server.api.requests.thinking import effort_kwargs
from prerope.server.api.requests.wording import MAX_SHOWN, json_type
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText
from pydantic import Field, PrivateAttr, model_validator
from pydantic.json_schema import SkipJsonSchema

LOGPROBS = "message.output_text.logprobs"
INCLUDED = (
    LOGPROBS,
    "reasoning.encrypted_content",  # thoughts are told as they are, where a model has any
    # Results of tools and of pictures, which a response here never holds.
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url", "message.input_image.image_url"),
)
"""What `include` may name. All but the first ask for nothing."""


class Reasoning(RequestBody):
    """How much the model is to think before it answers. Thoughts are told whole, so there is no summary of them."""

    path: ClassVar[str] = "reasoning."
    foreign: ClassVar[Mapping[str, Foreign]] = dict.fromkeys(("summary", "generate_summary"), HINT)

    effort: str | None = Field(None, description="Handed to the chat template; none: no thinking.")


class TextFields(RequestBody):
    """`text`: the format of the reply."""

    path: ClassVar[str] = "text."
    foreign: ClassVar[Mapping[str, Foreign]] = {"verbosity": HINT}

    format: dict[str, Any] | None = None


class ResponsesRequest(SamplingFields, OpenAIConstraints):
    """POST /v1/responses. Beside OpenAI's fields it takes those of sampling and of constraints by vLLM's names, and
    `rope`."""

    asked_in: ClassVar[str] = "input"

    synonyms: ClassVar[Mapping[str, str]] = {
        **{said: "max_output_tokens" if name == "max_tokens" else name for said, name in OpenAIFields.synonyms.items()},
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
    }
    foreign: ClassVar[Mapping[str, Foreign]] = {
        **BODY,
        **ignored("user", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention"),
        **ignored("stream_options", "max_tool_calls", "prompt_cache_options"),
        "moderation": Foreign("no moderation model runs here"),
        "context_management": Foreign("'truncation': 'auto' leaves out the oldest items"),
        "background_options": Foreign("replies are made while their client waits"),
        "access_programs": Foreign("there are none here"),
        "image": Foreign("this server reads and writes text only"),
    }

    model: Text | None = None
    input: str | list[Any] = Field(default_factory=list, description="May be left out behind previous_response_id.")
    instructions: Text | None = None
    max_output_tokens: MaxTokens | None = Field(None, description=ALL_THAT_FIT)
    store: bool = True
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    include: list[Any] = Field(default_factory=list, json_schema_extra={"items": {"enum": list(INCLUDED)}})
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: of a conversation that is too long, the oldest items are left out."
    )
    reasoning: Reasoning | None = None
    reasoning_effort: str | float | None = Field(None, description="A chat's name of reasoning.effort.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Handed to the chat template.")
    logprobs: bool = Field(False, description="A chat's name of what 'include' asks for.")
    metadata: dict[str, Any] | None = None
    background: bool = False
    conversation: Any = None
    prompt: Any = None
    previous_response_id: Text | None = None
    history: SkipJsonSchema[dict[str, Any] | None] = Field(None, alias="_history", exclude=True)

    _slim: tuple[str, dict[str, Verbatim]] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _known_names(self) -> ResponsesRequest:
        for one in self.include:
            if one not in INCLUDED:
                shown = one[:MAX_SHOWN] if isinstance(one, str) else json_type(one)
                raise InvalidRequest(
                    f"'include' asks for '{shown}', which responses here do not have; known: {', '.join(INCLUDED)}",
                    param="include",
                    code="unsupported_field",
                )
        self.include = sorted(set(self.include))
        for name, reason in (
            ("background", "replies are made while their client waits"),
            ("conversation", "conversations are kept by their client; use previous_response_id"),
            ("prompt", "there are no stored prompts here"),
        ):
            if getattr(self, name):
                raise InvalidRequest(f"'{name}' is not supported: {reason}", param=name, code="unsupported_field")
        if "input" not in self.model_fields_set and self.previous_response_id is None:
            raise InvalidRequest("'input' is missing: it may be left out behind previous_response_id", param="input")
        TextFields.model_validate(self.text or {})
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token, as SamplingParams counts them."""
        asked = self.top_logprobs or self.logprobs or LOGPROBS in self.include
        return (self.top_logprobs or 0) if asked else None

    def slim(self) -> None:
        self._slim = self.kept(), {name: Verbatim.of(value) for name, value in self.repeated().items()}
        include = self.include
        super().slim()
        self.include, self.tool_choice, self.history = include, None, None

    def kept(self) -> str:
        """The conversation as JSON, a list."""
        return Verbatim.of(self.items()).text if self._slim is None else self._slim[0]

    def repeated(self) -> Mapping[str, Any]:
        """What the response repeats of lists and objects."""
        if self._slim is not None:
            return self._slim[1]
        text = self.text or {"format": {"type": "text"}}
        told = {"text": text, "tool_choice": self.tool_choice or "auto", "tools": self.tools}
        return {**told, "metadata": self.metadata or {}}

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
        without_token_ids(self.return_token_ids)
        chat = Chat(
            messages=list(self._messages()),
            tools=[tool for index, one in enumerate(self.tools) if (tool := _tool(one, f"tools[{index}]"))],
            tool_choice=tool_choice(self.tool_choice) if self.tools and self.tool_choice else None,
            parallel_tool_calls=self.parallel_tool_calls,
            template_kwargs=effort_kwargs(self._effort) | self.chat_template_kwargs,
            leaves_out_oldest=self.truncation == "auto",
        )
        return GenerationRequest(
            input=chat,
            model=self.model,
            sampling=self.sampling(max_tokens=self.max_output_tokens),
            output=self.output(logprobs=self.num_logprobs),
            constraint=only_one([self._constraint(), self.wanted_grammar()]),
            **self.shared(),
        )

    @property
    def _effort(self) -> str | float | None:
        effort = self.reasoning.effort if self.reasoning else None
        return self.reasoning_effort if effort is None else effort

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
                pending.append(call(item.get("call_id"), item.get("name"), text_of(item.get("arguments") or "", place)))
                continue
            if pending:
                yield message("assistant", "", tool_calls=pending)
                pending = []
            yield from _lowered(item, place)
        if pending:
            yield message("assistant", "", tool_calls=pending)


def _lowered(item: Any, param: str) -> Iterator[Message]:
    match item.get("type") or "message":
        case "message":
            more = {name: item[name] for name in ("tool_calls", "tool_call_id") if item.get(name)}  # as chats have them
            yield message(item.get("role", "user"), _content(item.get("content") or "", f"{param}.content"), **more)
        case "function_call_output":
            output = _content(item.get("output") or "", f"{param}.output")
            yield message("tool", output, tool_call_id=item.get("call_id"))
        case "reasoning" | "item_reference":
            pass
        case "web_search_call" | "file_search_call" | "code_interpreter_call" | "image_generation_call":
            current_report().ignore(param)  # of a tool that OpenAI ran: what came of it is in the message after it
        case kind:
            raise InvalidRequest(
                f"'{param}' has the type '{str(kind)[:MAX_SHOWN]}', which is not read here: messages, function calls "
                "and their outputs are",
                param=param,
                code="unsupported_field",
            )


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


def _tool(value: Any, param: str) -> Tool | None:
    """A function; None for another tool, where such are left out."""
    given = object_of(value, param)
    if given.get("type") != "function":
        if not current_report().strict:
            current_report().ignore(param)
            return None
        instead = f"; {FREE_TOOL}" if given.get("type") == "custom" else ""
        raise InvalidRequest(
            f"'{param}' has the type '{str(given.get('type'))[:MAX_SHOWN]}': only functions are supported{instead}",
            param="tools",
            code="unsupported_field",
        )
    given = object_of(given.get("function", given), param)  # some write it as chats have it
    return function_tool(given.get("name"), given.get("description"), given.get("parameters"), given.get("strict"))
