"""What our own endpoints answer, for the OpenAPI document; OpenAI's are in `openai_replies`.

Endpoints build plain dicts; tests hold them to these models. An object has the fields named here and no others: a
client that was generated from the document meets no surprise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Ending = Literal["stop", "length", "abort"]


class ReplyBody(BaseModel):
    """A JSON object of a reply."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ReplyBody):
    """What went wrong, in words and for programs: `param` is the request's field, `code` the reason."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(ReplyBody):
    """The shape of every error of the endpoints described here, and of a stream that has begun."""

    error: ErrorDetail


# --- /generate --------------------------------------------------------------------------------------------------------


class TokenLogprob(ReplyBody):
    """A token and its log-probability; −9999 stands for minus infinity."""

    token_id: Count
    token: str
    logprob: float


class ScoredToken(TokenLogprob):
    """A token of the reply, and the most likely ones in its place."""

    top: list[TokenLogprob]


class TokenUsage(ReplyBody):
    """Tokens of one request; `cached_tokens` of the prompt came from the prefix cache.

    Of the output, `drafted_tokens` were guessed ahead of their step, and `accepted_tokens` of these were right.
    """

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count
    drafted_tokens: Count
    accepted_tokens: Count


class PhaseTimings(ReplyBody):
    """Seconds in the queue, from there to the first token, and from there to the last."""

    queue_s: Seconds
    prefill_s: Seconds
    decode_s: Seconds


class DocumentUsage(ReplyBody):
    """A document that was read on its own: its tokens, and how many of them were cached."""

    tokens: Count
    cached_tokens: Count


class PromptLogprob(ReplyBody):
    """The log-probability of a token of the prompt, or of a likely one in its place; an unknown rank is null."""

    logprob: float
    rank: Annotated[int, Field(ge=1)] | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One a token of the prompt, by token id; null for the first."""


class GenerateEnd(ReplyBody):
    """The last event of a stream, before [DONE]."""

    id: str
    finish_reason: Ending
    usage: TokenUsage
    rope: dict[str, Any] = Field(description="The position method, resolved.")
    documents: list[DocumentUsage] = Field(default_factory=list)
    timings: PhaseTimings | None


class GenerateReply(GenerateEnd):
    """A whole reply. `logprobs` are there where the request asks for them."""

    text: str
    token_ids: list[Count]
    logprobs: list[ScoredToken] = Field(default_factory=list)
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class GeneratePiece(ReplyBody):
    """What one step adds; `index` counts the tokens sent before it."""

    index: Count
    text: str
    token_ids: list[Count]
    logprobs: list[ScoredToken] = Field(default_factory=list)
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class PrefillProgress(ReplyBody):
    """Tokens of the prompt, and how many of them are read; `processed` includes `cached`."""

    total: Count
    cached: Count
    processed: Count


class GenerateProgress(ReplyBody):
    """An event while a long prompt is read, with `return_progress`."""

    progress: PrefillProgress


# --- everything else -------------------------------------------------------------------------------------------------


class ModelCard(ReplyBody):
    """The model, how many tokens it takes, and how positions are read."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    root: str = Field(description="The name that replies have.")
    parent: None
    type: Literal["base"]
    capabilities: dict[str, bool] = Field(description="As Mistral's API tells them.")
    max_model_len: Count
    default_sampling_params: dict[str, float] = Field(description="What holds where a request does not say.")
    train_length: Count
    rope: dict[str, Any]
    rope_per_request: bool
    rope_methods: list[str]


class ModelList(ReplyBody):
    """The model, under each of its names."""

    object: Literal["list"]
    data: list[ModelCard]


class MethodOffer(ReplyBody):
    """A position method that the model takes: the parameters that it reads, and how they resolve."""

    name: str
    summary: str
    use: str
    takes: list[str]
    parameters: dict[str, Any]
    warning: str | None


class MethodRefusal(ReplyBody):
    """A position method that the model does not take."""

    name: str
    reason: str


class MethodsReply(ReplyBody):
    """The position methods that the model takes and refuses, and the one that holds where a request does not say."""

    default: dict[str, Any]
    per_request: bool
    max_model_len: Count
    train_length: Count
    methods: list[MethodOffer]
    refused: list[MethodRefusal]


class MapReply(ReplyBody):
    """`rows[i][j]`: the distance at which token `positions[i]` sees token `positions[j]`, j ≤ i; −1: it does not."""

    length: Count
    positions: list[Count]
    rows: list[list[float]]
    farthest: float
    train_length: Count
    rope: dict[str, Any]
    warning: str | None


class TokenizeReply(ReplyBody):
    """`token_strs` are there where the request asks for them."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] = Field(default_factory=list)


class RenderReply(ReplyBody):
    """The prompt that a body becomes."""

    request_id: str
    model: str
    token_ids: list[Count]


class RenderReplies(RootModel[list[RenderReply]]):
    """The prompts that a body of /v1/completions becomes, one for each of its prompts."""


class DetokenizeReply(ReplyBody):
    """The text, special tokens included."""

    prompt: str


class TokenizerInfoReply(ReplyBody):
    """What tokenizer_config.json holds; fields beside these are the model's own."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None = None


class HealthReply(ReplyBody):
    """The check has passed: the process is alive (/live), or takes requests (/health)."""

    status: Literal["ok"]


class VersionReply(ReplyBody):
    """The version of the server's package."""

    version: str


class ReadyReply(ReplyBody):
    """The model is loaded, and requests are taken."""

    status: Literal["ready"]
    model: str
