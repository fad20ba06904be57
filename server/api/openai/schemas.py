"""What clients may send to /v1/completions and /v1/chat/completions: OpenAI's fields, and vLLM's extras by its names.

A field of OpenAI's is honoured, or refused by name, or listed as one that may be ignored since nothing the user gets
depends on it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.tools import ToolFields
from prerope.server.api.requests.body import INT32_MAX, Refusal, RequestBody, Text, json_type, token_ids, unicode_text
from prerope.server.api.requests.internal import Chat, GenerationRequest, Output, Prompt
from prerope.server.api.requests.schemas import MAX_LOGPROBS, SamplingFields
from prerope.server.api.requests.structured import OpenAIConstraints
from prerope.server.errors import InvalidRequest
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

MAX_CHOICES = 128
MAX_PROMPTS = 1024
"""Prompts of a request; and prompts times choices."""
DEFAULT_MAX_TOKENS = 16
"""Of completions, where none are asked for (OpenAI's)."""

IGNORED = frozenset(
    {
        "user",  # who asks: for abuse reports
        "safety_identifier",  # the same
        "metadata",  # labels for OpenAI's dashboard
        "store",  # keep a copy for OpenAI's dashboard
        "service_tier",  # price and queue; there is one tier here
        "prompt_cache_key",  # routing to a warm cache; one cache here
        "prompt_cache_retention",
        "prompt_cache_options",
        "prediction",  # a hint that makes the same reply come sooner
    }
)


class StreamOptions(RequestBody):
    """`include_usage`: one more chunk, without choices, that carries the usage of the whole request."""

    path: ClassVar[str] = "stream_options."
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})  # padding against traffic analysis

    include_usage: bool = False


class OpenAIFields(SamplingFields, OpenAIConstraints):
    """What both OpenAI endpoints share."""

    ignored: ClassVar[frozenset[str]] = IGNORED

    model: Text | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> OpenAIFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def shared(self) -> dict[str, Any]:
        return {**super().shared(), "model": self.model, "n": self.n, "constraint": self.wanted_grammar()}


def _prompts(value: Any) -> list[str | list[int]]:
    """A string, a list of strings, token ids, or a list of lists of them, as a list of prompts."""
    if isinstance(value, str):
        return [unicode_text(value, "prompt")]
    if not isinstance(value, list):
        raise InvalidRequest(
            f"'prompt' must be text, token ids, or a list of them, not {json_type(value)}", param="prompt"
        )
    if not value:
        raise InvalidRequest("'prompt' is an empty list: give at least one prompt", param="prompt")
    if not isinstance(value[0], str | list):
        return [token_ids(value, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"'prompt' takes at most {MAX_PROMPTS} prompts, not {len(value)}", param="prompt")
    read = unicode_text if isinstance(value[0], str) else token_ids
    return [read(prompt, f"prompt[{index}]") for index, prompt in enumerate(value)]


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

    unsupported: ClassVar[dict[str, Refusal]] = {
        "suffix": Refusal("models served here complete at the end only", harmless=("",)),
    }

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPTS_SCHEMA)]
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Only the value of n.")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest(
                f"'best_of' is {self.best_of} and 'n' is {self.n}: ranking completions is not supported, "
                "so best_of must equal n",
                param="best_of",
            )
        if len(self.prompt) * self.n > MAX_PROMPTS:
            raise InvalidRequest(
                f"{len(self.prompt)} prompts of {self.n} choices each are {len(self.prompt) * self.n} completions; "
                f"one request takes at most {MAX_PROMPTS}",
                param="n",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("'max_tokens' is 0, which asks for nothing unless 'echo' is true", param="max_tokens")
        return self

    def lowered(self) -> GenerationRequest:
        many = len(self.prompt) > 1
        names = (f"prompt[{index}]" if many else "prompt" for index in range(len(self.prompt)))
        scores_prompt = self.echo and (self.logprobs is not None or self.max_tokens == 0)
        return GenerationRequest(
            input=[Prompt(given=given, param=name) for given, name in zip(self.prompt, names, strict=True)],
            sampling=self.sampling(default_max_tokens=DEFAULT_MAX_TOKENS),
            output=Output(logprobs=self.logprobs, prompt_logprobs=self.logprobs or 0 if scores_prompt else None),
            **self.shared(),
        )


class ChatRequest(OpenAIFields, ToolFields):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, Refusal]] = {
        "functions": Refusal("use 'tools'", harmless=([],)),
        "function_call": Refusal("use 'tool_choice'", harmless=("none",)),
        "modalities": Refusal("this server reads and writes text only", harmless=(["text"],)),
        "audio": Refusal("this server reads and writes text only"),
        "moderation": Refusal("no moderation model runs here"),
        "web_search_options": Refusal("the server reaches no web"),
        "reasoning_effort": Refusal("use 'chat_template_kwargs' for what the model's template offers"),
        "verbosity": Refusal("ask for it in a message"),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Handed to the chat template.")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
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
        return GenerationRequest(
            input=Chat(
                messages=self.messages,
                tools=self.tools,
                tool_choice=self.tool_choice,
                parallel_tool_calls=self.parallel_tool_calls,
                add_generation_prompt=self.add_generation_prompt,
                template_kwargs=self.chat_template_kwargs,
            ),
            sampling=self.sampling(max_tokens=max_tokens),
            output=Output(logprobs=self.num_logprobs),
            **self.shared(),
        )
