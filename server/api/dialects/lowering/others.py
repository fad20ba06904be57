"""/generate as TGI's and SGLang's clients write it, told from ours by their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from prerope.server.api.requests.body import Other, RequestBody, Text
from prerope.server.api.requests.constraints import (
    JsonSchemaOrText,
    lark_grammar,
    only_one,
    optional_schema,
    regex_grammar,
    schema_grammar,
)
from prerope.server.api.requests.fields import LogitBias, Stop
from prerope.server.api.requests.foreign import DIALECT, Foreign, ignored, refused
from prerope.server.api.requests.internal import GenerationRequest, Output, Prompt, Sampling, Truncation
from prerope.server.api.requests.schemas import GenerateRequest, prompts_of
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText
from pydantic import Field, PrivateAttr, model_validator

DEFAULT_TGI_TOKENS = 100
DEFAULT_SGLANG_TOKENS = 128


class TgiParameters(RequestBody):
    """TGI's `parameters`."""

    path: ClassVar[str] = "parameters."
    foreign: ClassVar[Mapping[str, Foreign]] = {
        **DIALECT,
        **refused("one model without adapters is served", ("adapter_id",)),
        **refused("the prompt's tokens are told by 'prompt_logprobs' of /v1/completions", ("decoder_input_details",)),
        "watermark": Foreign("replies are not marked"),
        "best_of": Foreign("'best_of' of /v1/completions draws several and keeps the likeliest", harmless=(1,)),
        "typical_p": Foreign("use 'top_p'", harmless=(1, 1.0)),
        "num_return_sequences": Foreign("'n' of /v1/completions asks for several", harmless=(1,)),
    }
    synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_new_tokens"),
        "min_tokens": "min_new_tokens",
    }

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(None, ge=0, le=10)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    min_new_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    max_time: float | None = Field(None, gt=0, description="Seconds.")
    seed: int | None = None
    stop: Stop = Field(default_factory=list)
    stop_sequences: Stop = Field(default_factory=list)
    truncate: int | None = Field(None, ge=1, description="Tokens of the prompt that are read: the last ones.")
    details: bool = False
    return_full_text: bool = False
    top_n_tokens: int | None = Field(None, ge=0, le=20)
    grammar: dict[str, Any] | None = None


class TgiRequest(RequestBody):
    """POST /generate and /generate_stream of text-generation-inference, and what huggingface_hub sends to `/`."""

    foreign: ClassVar[Mapping[str, Foreign]] = {**DIALECT, **ignored("model", "options")}  # of the hub's own caches

    inputs: Text
    parameters: TgiParameters = Field(default_factory=TgiParameters)
    stream: bool = False

    def lowered(self) -> GenerationRequest:
        given = self.parameters
        sampled = given.do_sample or any(v is not None for v in (given.temperature, given.top_k, given.top_p))
        return GenerationRequest(
            input=[Prompt(given=self.inputs, param="inputs")],
            sampling=Sampling(
                max_tokens=given.max_new_tokens,
                default_max_tokens=DEFAULT_TGI_TOKENS,
                temperature=(1.0 if given.temperature is None else given.temperature) if sampled else 0.0,
                top_k=given.top_k or 0,
                top_p=1.0 if given.top_p is None else given.top_p,
                repetition_penalty=given.repetition_penalty or 1.0,
                min_p=given.min_p or 0.0,
                frequency_penalty=given.frequency_penalty or 0.0,
                presence_penalty=given.presence_penalty or 0.0,
                logit_bias=given.logit_bias,
                min_tokens=given.min_new_tokens,
                ignore_eos=given.ignore_eos,
                stop=given.stop or given.stop_sequences,
                seed=given.seed,
            ),
            output=Output(logprobs=given.top_n_tokens or 0),
            truncation=None if given.truncate is None else Truncation(num_tokens=given.truncate),
            constraint=_tgi_grammar(given.grammar),
            timeout_s=given.max_time,
        )


def _tgi_grammar(given: dict[str, Any] | None) -> GrammarText | None:
    match given:
        case None:
            return None
        case {"type": "json" | "json_schema", "value": dict(schema)}:
            return schema_grammar(schema.get("schema", schema), "parameters.grammar")
        case {"type": "regex", "value": str(pattern)}:
            return GrammarText("regex", pattern, "parameters.grammar")
    raise InvalidRequest("'parameters.grammar' is {type: json or regex, value: …}", param="parameters.grammar")


class SglangSampling(RequestBody):
    """SGLang's `sampling_params`."""

    path: ClassVar[str] = "sampling_params."
    foreign: ClassVar[Mapping[str, Foreign]] = {
        **DIALECT,
        **ignored("spaces_between_special_tokens", "stream_interval"),
        **ignored("stop_str_max_len", "stop_regex_max_len"),  # what its own server works out
        **ignored("custom_params"),  # read by a logit processor, of which there is none
        "stop_regex": Foreign("give 'stop' strings, or a 'regex' that the whole reply matches"),
        "structural_tag": Foreign("give a 'json_schema', a 'regex' or an 'ebnf'"),
    }

    synonyms: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_new_tokens",
        "min_tokens": "min_new_tokens",
        "seed": "sampling_seed",
    }

    max_new_tokens: int | None = Field(None, ge=0)
    min_new_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(-1, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: LogitBias = Field(default_factory=dict)
    n: int = Field(1, ge=1, le=1)
    json_schema: JsonSchemaOrText | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    sampling_seed: int | None = None


class SglangRequest(RequestBody):
    """POST /generate of SGLang: `text` or `input_ids`, and `sampling_params`."""

    foreign: ClassVar[Mapping[str, Foreign]] = {
        **DIALECT,
        **ignored("rid", "return_text_in_logprobs", "log_metrics", "stream_interval", "priority", "session_id"),
        **ignored("background", "conversation_id", "extra_key", "routed_dp_rank", "data_parallel_rank", "model"),
        **refused("this server reads and writes text only", ("image_data", "video_data", "audio_data")),
        **refused("token ids and text are read, nothing else", ("input_embeds",)),
        "token_ids_logprob": Foreign("ask for 'top_logprobs_num'"),
        **refused("one model without adapters is served", ("lora_path",)),
        **refused("hidden states are not told", ("return_hidden_states",)),
    }

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SglangSampling = Field(default_factory=SglangSampling)
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1)
    top_logprobs_num: int = Field(0, ge=0, le=20)
    _is_list: bool = PrivateAttr(False)

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequest("give 'text' or 'input_ids', one of the two", param="text")
        self._is_list = isinstance(self.text, list) or isinstance((self.input_ids or [0])[0], list)
        if self._is_list and self.stream:
            raise InvalidRequest("several prompts are not streamed: send one, or 'stream': false", param="stream")
        return self

    @property
    def is_list(self) -> bool:
        """Whether the reply is a list, one of each prompt."""
        return self._is_list

    @property
    def scores_prompt(self) -> bool:
        return self.return_logprob and self.logprob_start_len >= 0

    def lowered(self) -> GenerationRequest:
        param = "input_ids" if self.text is None else "text"
        prompts = prompts_of(getattr(self, param), param)
        names = (f"{param}[{index}]" if self.is_list else param for index in range(len(prompts)))
        given = self.sampling_params
        constraint = only_one(
            [
                optional_schema(given.json_schema, "sampling_params.json_schema"),
                regex_grammar(given.regex, "sampling_params.regex"),
                lark_grammar(given.ebnf, "sampling_params.ebnf"),
            ]
        )
        return GenerationRequest(
            input=[Prompt(given=one, param=name) for one, name in zip(prompts, names, strict=True)],
            sampling=Sampling(
                max_tokens=given.max_new_tokens,
                default_max_tokens=DEFAULT_SGLANG_TOKENS,
                min_tokens=given.min_new_tokens,
                temperature=given.temperature,
                top_p=given.top_p,
                top_k=max(given.top_k, 0),
                min_p=given.min_p,
                frequency_penalty=given.frequency_penalty,
                presence_penalty=given.presence_penalty,
                repetition_penalty=given.repetition_penalty,
                stop=given.stop,
                stop_token_ids=given.stop_token_ids,
                logit_bias=given.logit_bias,
                ignore_eos=given.ignore_eos,
                seed=given.sampling_seed,
            ),
            output=Output(
                logprobs=self.top_logprobs_num if self.return_logprob else None,
                prompt_logprobs=self.top_logprobs_num if self.scores_prompt else None,
                include_stop=given.no_stop_trim,
                skip_special_tokens=given.skip_special_tokens,
            ),
            constraint=constraint,
        )


class AnyGenerateRequest(GenerateRequest):
    """A body of /generate: ours, or TGI's or SGLang's, told by their fields."""

    others: ClassVar[Sequence[Other]] = (
        Other(TgiRequest, frozenset({"inputs"})),
        Other(SglangRequest, frozenset({"text", "input_ids", "sampling_params"}), without=frozenset({"prompt"})),
    )
