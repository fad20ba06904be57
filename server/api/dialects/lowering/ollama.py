"""What Ollama's clients send."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.replayed import results_apart
from prerope.server.api.chat.tool_choice import ToolChoiceField
from prerope.server.api.chat.tools import Tool
from prerope.server.api.dialects.lowering.common import (
    begins_reply,
    call,
    json_schema,
    message,
    not_read_here,
    object_of,
    text_of,
)
from prerope.server.api.requests.body import RequestBody, Text
from prerope.server.api.requests.constraints import ResponseFormat, only_one
from prerope.server.api.requests.fields import Stop
from prerope.server.api.requests.foreign import DIALECT, HINT, IGNORED, Foreign, ignored
from prerope.server.api.requests.internal import Chat, GenerationRequest, Output, Prompt, Sampling
from prerope.server.api.requests.schemas import MAX_LOGPROBS, RunFields
from prerope.server.api.requests.thinking import effort_kwargs
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText
from pydantic import BeforeValidator, Field, model_validator


class Options(RequestBody):
    """Ollama's `options`. Those that say how Ollama loads a model ask for nothing here."""

    path: ClassVar[str] = "options."
    foreign: ClassVar[Mapping[str, Foreign]] = {
        **DIALECT,
        **ignored("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "low_vram", "f16_kv"),
        **ignored("use_mmap", "use_mlock", "numa", "vocab_only", "logits_all", "draft_num_predict", "embedding_only"),
        **ignored("mirostat_tau", "mirostat_eta"),  # of mirostat
        "mirostat": Foreign("use 'temperature' with 'min_p' or 'top_p'", harmless=(0,)),
        "typical_p": Foreign("use 'top_p'", harmless=(1, 1.0)),
        "tfs_z": Foreign("use 'min_p'", harmless=(1, 1.0)),
        "repeat_last_n": HINT,
        "penalize_newline": HINT,
    }

    synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"), "num_predict"),
        "repetition_penalty": "repeat_penalty",
        "stop_sequences": "stop",
    }

    num_predict: int | None = None
    temperature: float | None = Field(None, ge=0, le=10)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(default_factory=list)

    def sampling(self) -> Sampling:
        asked = self.num_predict
        return Sampling(
            max_tokens=asked if asked is not None and asked > 0 else None,  # -1 and -2: to the end
            temperature=0.0 if self.top_p == 0 else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or None,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=self.stop,
        )


class OllamaFields(RunFields):
    """The fields that both endpoints take."""

    foreign: ClassVar[Mapping[str, Foreign]] = {**DIALECT, **ignored("keep_alive", "truncate", "shift")}

    model: Text | None = None
    stream: bool = True
    format: str | dict[str, Any] | None = None
    think: bool | Text | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    options: Options = Field(default_factory=Options)
    response_format: ResponseFormat | None = Field(None, description="OpenAI's word of 'format'.")
    reasoning_effort: str | float | None = Field(None, description="OpenAI's word of 'think'.")

    @model_validator(mode="before")
    @classmethod
    def _options_beside(cls, data: Any) -> Any:
        """Options that stand beside `options`, where OpenAI's clients write them."""
        inside = data.get("options") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(inside, dict | None):
            return data
        names = ({*Options.model_fields, *Options.synonyms} - cls.model_fields.keys()) & data.keys()
        beside = {name: data[name] for name in sorted(names) if data[name] is not None}
        for name, value in beside.items():
            if (inside or {}).get(name) not in (None, value):
                raise InvalidRequest(f"'{name}' and 'options.{name}' mean the same: give one of them", param=name)
        rest = {name: value for name, value in data.items() if name not in names}
        return {**rest, "options": {**(inside or {}), **beside}} if names else data

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token, as SamplingParams counts them."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def thinking_kwargs(self) -> dict[str, Any]:
        """Arguments for the chat template about thinking."""
        if isinstance(self.think, str):
            return effort_kwargs(self.think)
        if self.think is None:
            return effort_kwargs(self.reasoning_effort)
        return {"enable_thinking": self.think}

    def constraint(self) -> GrammarText | None:
        return only_one([self._format(), self.response_format.wanted() if self.response_format else None])

    def _format(self) -> GrammarText | None:
        if self.format in (None, ""):
            return None
        if self.format == "json":
            return json_schema({"type": "object"}, "format")
        if isinstance(self.format, str):
            raise InvalidRequest("'format' is 'json' or a JSON schema", param="format")
        return json_schema(self.format, "format")


class OllamaChatRequest(OllamaFields):
    """POST /api/chat."""

    asked_in: ClassVar[str] = "messages"

    messages: Annotated[list[Any], BeforeValidator(results_apart)] = Field(default_factory=list)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoiceField | None = Field(None, description="As OpenAI's chats have it.")
    parallel_tool_calls: bool | None = Field(None, description="As OpenAI's chats have it.")

    def lowered(self) -> GenerationRequest:
        messages = list(self._messages())
        continues = begins_reply(messages)
        chat = Chat(
            messages=messages,
            tools=self.tools,
            tool_choice=self.tool_choice if self.tools else None,
            parallel_tool_calls=self.parallel_tool_calls,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            template_kwargs=self.thinking_kwargs(),
        )
        return GenerationRequest(
            input=chat if messages else [],  # none: to load the model
            model=_name(self.model),
            sampling=self.options.sampling(),
            output=Output(logprobs=self.num_logprobs),
            constraint=self.constraint(),
            **self.shared(),
        )

    def _messages(self) -> Iterator[Message]:
        last_ids: list[str] = []
        for index, one in enumerate(self.messages):
            place = f"messages[{index}]"
            given = object_of(one, place)
            if given.get("images"):
                raise not_read_here("image", f"{place}.images")
            more: dict[str, Any] = {}
            if given.get("tool_calls"):
                functions = [object_of(object_of(c, place).get("function"), place) for c in given["tool_calls"]]
                last_ids = [f"call{index:04}{n:04}" for n in range(len(functions))]
                more["tool_calls"] = [
                    call(call_id, function.get("name"), json.dumps(function.get("arguments") or {}))
                    for call_id, function in zip(last_ids, functions, strict=True)
                ]
            if given.get("role") == "tool":
                more["tool_call_id"] = last_ids.pop(0) if last_ids else "call00000000"
            content = given.get("content") or ""
            if not isinstance(content, list):  # of parts, as OpenAI's chats have them
                text_of(content, f"{place}.content")
            yield message(given.get("role", ""), content, **more)


class OllamaGenerateRequest(OllamaFields):
    """POST /api/generate: a prompt in the model's chat template, or as it is where `raw`."""

    prompt: Text = ""
    system: Text | None = None
    raw: bool = False
    suffix: Text | None = None
    images: list[Any] | None = None
    template: Text | None = None
    context: list[int] | None = None

    def lowered(self) -> GenerationRequest:
        for name, reason in (
            ("suffix", "nothing is filled in between here"),
            ("images", "this server reads and writes text only"),
            ("template", "the model's own template is used; with raw the prompt is taken as it is"),
        ):
            if getattr(self, name):
                raise InvalidRequest(f"'{name}' is not supported: {reason}", param=name, code="unsupported_field")
        given: list[Prompt] | Chat = [Prompt(given=self.prompt)] if self.prompt else []  # none: to load the model
        if self.prompt and not self.raw:
            system = [message("system", self.system)] if self.system else []
            given = Chat(messages=[*system, message("user", self.prompt)], template_kwargs=self.thinking_kwargs())
        return GenerationRequest(
            input=given,
            model=_name(self.model),
            sampling=self.options.sampling(),
            output=Output(logprobs=self.num_logprobs),
            constraint=self.constraint(),
            **self.shared(),
        )


def _name(model: str | None) -> str | None:
    """A model's name without the tag that Ollama's clients write behind every name."""
    return None if model is None else model.removesuffix(":latest")


class ShowRequest(RequestBody):
    """POST /api/show. Its clients name the model either way."""

    foreign: ClassVar[Mapping[str, Foreign]] = dict.fromkeys({"verbose", "system", "template", "options"}, IGNORED)

    model: Text | None = None
    name: Text | None = None
