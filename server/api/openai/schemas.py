"""What clients may send to /v1/completions and /v1/chat/completions: OpenAI's fields, and vLLM's extras by its names.

A field that is not among them asks for nothing, or is refused by name: `server.api.requests.foreign` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from prerope.server.api.chat.documents import ChatDocumentFields
from prerope.server.api.chat.messages import MAX_MESSAGES, Messages
from prerope.server.api.chat.tools import ToolFields
from prerope.server.api.requests.body import RequestBody, Text
from prerope.server.api.requests.constraints import OpenAIConstraints
from prerope.server.api.requests.foreign import CHAT, STREAM_OPTIONS, Foreign
from prerope.server.api.requests.internal import Beams, Chat, GenerationRequest, Prompt
from prerope.server.api.requests.schemas import (
    ALL_THAT_FIT,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    SYNONYMS,
    MaxTokens,
    SamplingFields,
    asks_for_reply,
    prompts_of,
)
from prerope.server.api.requests.thinking import ThinkingFields
from prerope.server.errors import InvalidRequest
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

MAX_CHOICES = 128
"""The most choices of a prompt; prompts times choices are `MAX_PROMPTS` at most."""
MAX_BEAMS = 32
NOT_OF_BEAMS = (
    *("prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "stop"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
NO_PENALTY = {"repetition_penalty": 1}
DEFAULT_MAX_TOKENS = 16
"""The max_tokens of /v1/completions, where a request does not say (OpenAI's)."""


class StreamOptions(RequestBody):
    """`include_usage`: one more chunk, without choices, that carries the usage of the whole request.
    `continuous_usage_stats`: with it, each chunk tells the usage so far. Without `stream` neither asks for anything."""

    path: ClassVar[str] = "stream_options."
    foreign: ClassVar[Mapping[str, Foreign]] = STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False


class OpenAIFields(SamplingFields, OpenAIConstraints):
    """What both OpenAI endpoints share."""

    synonyms: ClassVar[Mapping[str, str]] = {
        **SYNONYMS,
        "json_schema": "guided_json",
        "regex": "guided_regex",
        "choice": "guided_choice",
        "grammar": "guided_grammar",
        "ebnf": "guided_grammar",
    }

    model: Text | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None

    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Not in a stream.")
    use_beam_search: bool = Field(False, description="Search for the n likeliest replies as a whole; nothing is drawn.")
    length_penalty: float = Field(1.0, ge=-8, le=8, description="Beams compare by log-probability / length ** this.")

    @model_validator(mode="after")
    def _prompts_are_scored_whole(self) -> OpenAIFields:
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("'prompt_logprobs' are not streamed: leave 'stream' out", param="prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _beams_stand_alone(self) -> OpenAIFields:
        if not self.use_beam_search:
            return self
        if self.width > MAX_BEAMS:
            raise InvalidRequest(
                f"'use_beam_search' goes on with {self.width} beams, as 'n' asks; at most {MAX_BEAMS}", param="n"
            )
        for name in NOT_OF_BEAMS:
            off = type(self).model_fields[name].get_default(call_default_factory=True), NO_PENALTY.get(name)
            if getattr(self, name) not in off:
                raise InvalidRequest(
                    f"'use_beam_search' compares replies by the model's own log-probabilities: leave out '{name}'",
                    param=name,
                )
        return self

    @property
    def width(self) -> int:
        """Beams of a search."""
        return self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_so_far(self) -> bool:
        """Whether each chunk tells the usage."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def shared(self) -> dict[str, Any]:
        beams = Beams(width=self.width, length_penalty=self.length_penalty) if self.use_beam_search else None
        return {
            **super().shared(),
            "model": self.model,
            "n": self.n,
            "beams": beams,
            "constraint": self.wanted_grammar(),
        }


def _prompts(value: Any) -> list[str | list[int]]:
    """A string, a list of strings, token ids, or a list of lists of them, as a list of prompts."""
    return prompts_of(value, "prompt")


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


class CompletionRequest(OpenAIFields):
    """POST /v1/completions."""

    synonyms: ClassVar[Mapping[str, str]] = {**OpenAIFields.synonyms, "max_completion_tokens": "max_tokens"}

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPTS_SCHEMA)]
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Completions drawn, of which the n likeliest a token are given."
    )
    add_special_tokens: bool = Field(True, description="To prompts that are text, as the tokenizer does.")
    echo: bool = False
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Alternatives beside each token; true and top_logprobs, as chats have it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _logprobs_as_chats_have_them(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("logprobs") is not True:
            return data
        return {name: one for name, one in data.items() if name != "top_logprobs"} | {
            "logprobs": data.get("top_logprobs") or 0
        }

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(
                f"'best_of' is {self.best_of} and 'n' is {self.n}: there are no {self.n} best of fewer", param="best_of"
            )
        if self.num_drawn > self.n and self.stream:
            raise InvalidRequest("'best_of' is known at the end only: leave 'stream' out", param="best_of")
        if len(self.prompt) * self.num_drawn > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(self.prompt)} prompts of {self.num_drawn} choices each are "
                f"{len(self.prompt) * self.num_drawn} completions; "
                f"one request takes at most {MAX_PROMPTS}",
                param="n",
            )
        if self.use_beam_search and self.echo and (self.logprobs is not None or self.max_tokens == 0):
            raise InvalidRequest(
                "'use_beam_search' tells log-probabilities of the reply, which is searched for: leave out 'echo'",
                param="echo",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("'max_tokens' is 0, which asks for nothing unless 'echo' is true", param="max_tokens")
        return self

    def slim(self) -> None:
        echoed = self.prompt if self.echo else []
        super().slim()
        self.prompt = echoed

    @property
    def num_drawn(self) -> int:
        """Completions of each prompt, of which the best `n` are given."""
        return self.n if self.use_beam_search else self.width

    @property
    def width(self) -> int:
        return self.best_of or self.n

    def lowered(self) -> GenerationRequest:
        many = len(self.prompt) > 1
        names = (f"prompt[{index}]" if many else "prompt" for index in range(len(self.prompt)))
        prompt_logprobs = self.prompt_logprobs
        if self.echo and prompt_logprobs is None and (self.logprobs is not None or self.max_tokens == 0):
            prompt_logprobs = self.logprobs or 0
        ranked = 0 if self.num_drawn > self.n else None
        return GenerationRequest(
            input=[
                Prompt(given=given, param=name, add_special_tokens=self.add_special_tokens)
                for given, name in zip(self.prompt, names, strict=True)
            ],
            sampling=self.sampling(default_max_tokens=DEFAULT_MAX_TOKENS),
            output=self.output(
                logprobs=ranked if self.logprobs is None else self.logprobs, prompt_logprobs=prompt_logprobs
            ),
            **self.shared() | {"n": self.num_drawn},
        )


class ChatRequest(OpenAIFields, ToolFields, ThinkingFields, ChatDocumentFields):
    """POST /v1/chat/completions."""

    asked_in: ClassVar[str] = "messages"

    foreign: ClassVar[Mapping[str, Foreign]] = CHAT

    messages: Messages = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: MaxTokens | None = Field(None, description=ALL_THAT_FIT)
    max_completion_tokens: MaxTokens | None = Field(None, description="OpenAI's newer name of max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = Field(False, description="The reply goes on with the last message.")
    add_special_tokens: bool = Field(False, description="Beside those that the chat template writes.")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequest(
                f"'max_tokens' is {self.max_tokens} and 'max_completion_tokens' is {self.max_completion_tokens}: "
                "they mean the same, give one",
                param="max_tokens",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token, as SamplingParams counts them."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def lowered(self) -> GenerationRequest:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        continues = self.continue_final_message or bool(self.messages[-1].prefix)
        return GenerationRequest(
            input=Chat(
                messages=self.messages,
                tools=self.tools,
                tool_choice=self.tool_choice,
                parallel_tool_calls=self.parallel_tool_calls,
                add_generation_prompt=asks_for_reply(self.add_generation_prompt, continues),
                continue_final_message=continues,
                add_special_tokens=self.add_special_tokens,
                separate_reasoning=self.separates_thoughts,
                documents=self.documents,
                reading=self.document_reading(),
                template_kwargs=self.thinking_kwargs() | self.chat_template_kwargs,
            ),
            sampling=self.sampling(max_tokens=max_tokens),
            output=self.output(logprobs=self.num_logprobs, prompt_logprobs=self.prompt_logprobs),
            **self.shared(),
        )
