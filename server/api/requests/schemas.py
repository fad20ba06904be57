"""What clients may send to /generate, and the prompts and sampling fields of all generating endpoints.

Names, types and ranges are settled here, and by which words a field refuses; what depends on the model is checked in
`server.api.running`. `server.api.openai.schemas` adds the OpenAI shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from prerope.rope.spec import ALIASES, MAX_GROUP, METHOD_NAMES, RopeSpec
from prerope.server.api.requests.body import INT32_MAX, RequestBody, Text, token_ids, unicode_text
from prerope.server.api.requests.constraints import GenerateConstraints
from prerope.server.api.requests.documents import DocumentFields
from prerope.server.api.requests.fields import IDS_SCHEMA, AllowedTokenIds, BadWords, LogitBias, Stop, StopTokenIds
from prerope.server.api.requests.foreign import BODY, Foreign
from prerope.server.api.requests.internal import GenerationRequest, Output, Prompt, Sampling, Truncation
from prerope.server.api.requests.wording import MAX_SHOWN, json_type, shown_number
from prerope.server.errors import InvalidRequest
from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator


def _token_limit(value: Any, info: ValidationInfo) -> Any:
    if type(value) is int and (value == 0 or value < -1):
        raise InvalidRequest(
            f"'{info.field_name}' is {shown_number(value)}: at least 1, or -1 for all that fit", param=info.field_name
        )
    return value


MaxTokens = Annotated[
    int,
    Field(ge=-1, le=INT32_MAX),
    BeforeValidator(_token_limit),
    WithJsonSchema({"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": INT32_MAX}]}),
]
"""Tokens of a reply; −1, which llama.cpp and LM Studio have for it, is as many as fit."""


MAX_LOGPROBS = 20
MODELS_OWN = "Without it the model's own default, which /v1/models tells."
DEFAULT_MAX_TOKENS = 256
"""The max_tokens of /generate, where a request does not say."""
ALL_THAT_FIT = "-1: all that fit."

SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict", "max_output_tokens"), "max_tokens"),
    **dict.fromkeys(("random_seed", "sampling_seed"), "seed"),
    "repeat_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "prompt_truncate_len": "truncate_prompt_tokens",
}
"""Names that TGI, llama.cpp, Ollama, Mistral, SGLang, Anthropic and Fireworks have for fields of ours."""

_PROMPT_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string", "minLength": 1}, {**IDS_SCHEMA, "minItems": 1}]}


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return unicode_text(value, "prompt")
    if isinstance(value, list):
        return token_ids(value, "prompt")
    raise InvalidRequest(f"'prompt' must be text or a list of token ids, not {json_type(value)}", param="prompt")


PromptField = Annotated[str | list[int], PlainValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
"""Text, or token ids as they are (no special tokens are added to ids)."""


MAX_PROMPTS = 1024
"""The most prompts of one request."""


def prompts_of(value: Any, param: str) -> list[str | list[int]]:
    """A string, a list of strings, token ids, or a list of lists of them, as a list of prompts."""
    if isinstance(value, str):
        return [unicode_text(value, param)]
    if not isinstance(value, list):
        raise InvalidRequest(
            f"'{param}' must be text, token ids, or a list of them, not {json_type(value)}", param=param
        )
    if not value:
        raise InvalidRequest(f"'{param}' is an empty list: give at least one prompt", param=param)
    if not isinstance(value[0], str | list):
        return [token_ids(value, param)]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"'{param}' takes at most {MAX_PROMPTS} prompts, not {len(value)}", param=param)
    read = unicode_text if isinstance(value[0], str) else token_ids
    return [read(prompt, f"{param}[{index}]") for index, prompt in enumerate(value)]


MAX_GROUPS = 256
"""Pairs of dims of a head, at most: more groups than pairs are refused where the model is known."""


class RopeFields(RequestBody):
    """The position method of one request, where ROPE_PER_REQUEST allows it to choose."""

    path: ClassVar[str] = "rope."

    method: str = Field(
        description=f"One of {', '.join(METHOD_NAMES)}.", json_schema_extra={"enum": [*METHOD_NAMES, *ALIASES]}
    )
    factor: float | None = Field(None, ge=1, le=65536)
    window: int | None = Field(None, ge=1, le=INT32_MAX)
    leak: float | None = Field(None, ge=1, le=65536)
    group: int | None = Field(None, ge=1, le=MAX_GROUP)
    groups: list[Annotated[int, Field(ge=1, le=MAX_GROUP)]] | None = Field(None, min_length=1, max_length=MAX_GROUPS)
    sinks: int | None = Field(None, ge=0, le=65536)
    select: int | None = Field(None, ge=1, le=INT32_MAX)
    logn: bool = False
    train_length: int | None = Field(None, ge=1, le=INT32_MAX)

    @model_validator(mode="after")
    def _known_method(self) -> RopeFields:
        if self.method not in METHOD_NAMES and self.method not in ALIASES:
            raise InvalidRequest(
                f"'rope.method' is '{self.method[:MAX_SHOWN]}'; known methods: {', '.join(METHOD_NAMES)}",
                param="rope.method",
            )
        return self

    def spec(self) -> RopeSpec:
        return RopeSpec(
            method=self.method,
            factor=self.factor,
            window=self.window,
            leak=self.leak,
            group=self.group,
            groups=None if self.groups is None else tuple(self.groups),
            sinks=self.sinks,
            select=self.select,
            logn=self.logn,
            train_length=self.train_length,
        )


CUT_FIELD: Any = Field(None, ge=-1, le=INT32_MAX, description="Tokens of the prompt that are read; -1: as many as fit.")
SIDE_FIELD: Any = Field("left", description="left: the last tokens stay.")


def truncation(num_tokens: int | None, side: Literal["left", "right"]) -> Truncation | None:
    return None if num_tokens is None else Truncation(num_tokens=num_tokens, side=side)


class RunFields(RequestBody):
    """How a request is run, by our own names: all dialects take them."""

    cache_salt: Text = Field("", max_length=256, description="Prefixes are shared within one salt only.")
    priority: int = Field(0, ge=-INT32_MAX, le=INT32_MAX, description="Lower runs first.")
    timeout_s: float | None = Field(
        None, gt=0, le=INT32_MAX, description="Seconds until it is aborted; REQUEST_TIMEOUT_S holds beside it."
    )
    speculation: Literal["auto", "off"] = Field(
        "auto", description="Guess tokens ahead from the text so far, where SPECULATION allows it: no token changes."
    )
    rope: RopeFields | None = None

    def shared(self) -> dict[str, Any]:
        """These fields as the internal request has them."""
        return {
            "rope": None if self.rope is None else self.rope.spec(),
            "cache_salt": self.cache_salt,
            "priority": self.priority,
            "timeout_s": self.timeout_s,
            "speculation": self.speculation == "auto",
        }


class SamplingFields(RunFields):
    """How to choose tokens and when to end, under the names of OpenAI, vLLM and SGLang."""

    foreign: ClassVar[Mapping[str, Foreign]] = BODY
    synonyms: ClassVar[Mapping[str, str]] = SYNONYMS

    max_tokens: int | None = Field(None, ge=-1, le=INT32_MAX, description=ALL_THAT_FIT)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=10, description=MODELS_OWN)
    top_p: float | None = Field(None, ge=0, le=1, description=f"0 keeps the likeliest token. {MODELS_OWN}")
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description=f"0 and -1 keep all tokens. {MODELS_OWN}")
    min_p: float | None = Field(None, ge=0, le=1, description=MODELS_OWN)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description=MODELS_OWN)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: StopTokenIds = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    no_stop_trim: bool = Field(False, description="SGLang's name of include_stop_str_in_output.")
    skip_special_tokens: bool = True
    allowed_token_ids: AllowedTokenIds | None = Field(None, description="No other token is drawn.")
    bad_words: BadWords = Field(default_factory=list, description="Are not written, with or without a space before.")
    truncate_prompt_tokens: int | None = CUT_FIELD
    truncation_side: Literal["left", "right"] = SIDE_FIELD
    return_token_ids: bool = False
    ignore_eos: bool = False
    do_sample: bool | None = Field(None, description="false: temperature 0 (TGI, transformers).")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False

    def sampling(self, **more: Any) -> Sampling:
        """These fields as the internal request has them; `more` are those that a dialect names otherwise."""
        given = {name: getattr(self, name) for name in SAMPLING_NAMES} | more
        if self.do_sample is False and self.temperature is None:
            given["temperature"] = 0.0
        if given["max_tokens"] == -1:
            given |= {"max_tokens": None, "default_max_tokens": None}
        return Sampling(**given)

    def output(self, **more: Any) -> Output:
        """Which fields the reply has; `more` are those that dialects name otherwise."""
        include_stop = self.include_stop_str_in_output or self.no_stop_trim
        return Output(include_stop=include_stop, skip_special_tokens=self.skip_special_tokens, **more)

    def shared(self) -> dict[str, Any]:
        """What else the internal request has of these fields."""
        return {**super().shared(), "truncation": truncation(self.truncate_prompt_tokens, self.truncation_side)}


SAMPLING_NAMES = {field.name for field in fields(Sampling)} & SamplingFields.model_fields.keys()


class GenerateRequest(SamplingFields, GenerateConstraints, DocumentFields):
    """POST /generate."""

    prompt: PromptField
    max_tokens: MaxTokens | None = Field(None, description=ALL_THAT_FIT)
    model: Text | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives beside each token.")
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Likewise, of the prompt.")
    add_special_tokens: bool = Field(True, description="To a prompt that is text, as the tokenizer does.")
    return_progress: bool = Field(False, description="With stream: events while a long prompt is read.")

    def lowered(self) -> GenerationRequest:
        return GenerationRequest(
            input=[
                Prompt(
                    given=self.prompt,
                    add_special_tokens=self.add_special_tokens,
                    documents=self.wanted_documents() if self.asks_for(DocumentFields) else None,
                )
            ],
            sampling=self.sampling(default_max_tokens=DEFAULT_MAX_TOKENS),
            output=self.output(
                logprobs=self.logprobs,
                prompt_logprobs=self.prompt_logprobs,
                report_progress=self.stream and self.return_progress,
            ),
            model=self.model,
            constraint=self.wanted_grammar() if self.asks_for(GenerateConstraints) else None,
            **self.shared(),
        )


class MapRequest(RequestBody):
    """POST /rope/map."""

    path: ClassVar[str] = ""

    length: int = Field(
        ge=2, le=INT32_MAX, description="Tokens of the prompt; more than the server takes may be asked."
    )
    rope: RopeFields | None = Field(None, description="As in a request; without it the server's own method.")


def asks_for_reply(add_generation_prompt: bool | None, continue_final_message: bool) -> bool:
    """Whether the chat template is to open a reply; to go on with the last message is the contrary of it."""
    if add_generation_prompt and continue_final_message:
        raise InvalidRequest(
            "'continue_final_message' goes on with the last message and 'add_generation_prompt' opens a new one: give "
            "one of them",
            param="continue_final_message",
        )
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt
