"""What the endpoints answer, for the OpenAPI document. Endpoints build plain dicts; tests hold them to these models.

An object has the fields named here and no others: a client that was generated from the document meets no surprise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Ending = Literal["stop", "length", "abort"]
ChatEnding = Literal["stop", "length", "abort", "tool_calls"]


class ReplyBody(BaseModel):
    """A JSON object of a reply."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ReplyBody):
    """Why, in words and for machines: `param` is the request's field, `code` the reason."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(ReplyBody):
    """Every error of every endpoint, and of a stream that has begun."""

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
    """Of a token of the prompt, or of a likely one in its place; the rank is null where it is not among those."""

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
    """While a long prompt is read, with `return_progress`."""

    progress: PrefillProgress


# --- OpenAI -----------------------------------------------------------------------------------------------------------


class PromptTokensDetails(ReplyBody):
    """How much of the prompts came from the prefix cache."""

    cached_tokens: Count


class CompletionTokensDetails(ReplyBody):
    """Tokens that were guessed ahead of their step, and were right or not; a wrong one costs time and nothing else."""

    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class OpenAIUsage(ReplyBody):
    """Tokens of the whole request; a prompt is counted once, whatever its number of choices."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(ReplyBody):
    """One entry a token in each list; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionChunkChoice(ReplyBody):
    """The next piece of one choice; `finish_reason` comes with the last."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ending | None
    token_ids: list[Count] = Field(default_factory=list, description="With return_token_ids.")
    prompt_token_ids: list[Count] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionChoice(CompletionChunkChoice):
    """One choice, whole."""

    finish_reason: Ending


class OpenAIHead(ReplyBody):
    """What all objects of one OpenAI reply repeat."""

    id: str
    created: Count
    model: str


class CompletionReply(OpenAIHead):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class CompletionChunk(OpenAIHead):
    """One event; with `include_usage` the last has the usage and no choices, and the others a null."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: OpenAIUsage | None = None


class ChatTokenLogprob(ReplyBody):
    """A token, its bytes and its log-probability."""

    token: str
    bytes: list[Annotated[int, Field(ge=0, le=255)]]
    logprob: float


class ChatScoredToken(ChatTokenLogprob):
    """A token of the reply, and the most likely ones in its place."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(ReplyBody):
    """One entry a token."""

    content: list[ChatScoredToken]
    refusal: None


class ToolFunction(ReplyBody):
    """A function that is to be called; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class ToolCallReply(ReplyBody):
    """One call."""

    id: str
    type: Literal["function"]
    function: ToolFunction


class ChatMessage(ReplyBody):
    """What the model answers; `tool_calls` are there where it calls tools, and `content` may be null then."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallReply] = Field(default_factory=list)
    reasoning_content: str = Field("", description="What the model thought, where it wrote thoughts.")


class ChatChoice(ReplyBody):
    """One choice, whole."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnding
    token_ids: list[Count] = Field(default_factory=list, description="With return_token_ids.")


class ChatReply(OpenAIHead):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: OpenAIUsage
    prompt_token_ids: list[Count] = Field(default_factory=list, description="With return_token_ids.")
    prompt_logprobs: PromptLogprobs | None = None


class ToolFunctionDelta(ReplyBody):
    """The name comes with the first event of a call, the arguments piece by piece."""

    name: str = ""
    arguments: str


class ToolCallDelta(ReplyBody):
    """What one event adds to the call with this index."""

    index: Count
    id: str = ""
    type: Literal["function"] = "function"
    function: ToolFunctionDelta


class ChatDelta(ReplyBody):
    """What one event adds to the message: first the role, then text or calls; nothing with the finish reason."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None
    tool_calls: list[ToolCallDelta] = Field(default_factory=list)
    reasoning_content: str = Field("", description="What the model thought, where it wrote thoughts.")


class ChatChunkChoice(ReplyBody):
    """The next piece of one choice."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnding | None
    token_ids: list[Count] = Field(default_factory=list, description="With return_token_ids.")


class ChatChunk(OpenAIHead):
    """One event; with `include_usage` the last has the usage and no choices, and the others a null."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None
    prompt_token_ids: list[Count] = Field(default_factory=list, description="In the first, with return_token_ids.")


# --- the others -------------------------------------------------------------------------------------------------------


class ModelCard(ReplyBody):
    """The model, how many tokens it takes, and how positions are read."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    root: str = Field(description="The name that replies have.")
    parent: None
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
    """What the model takes, and what the server reads by where a request does not say."""

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
    """The prompt that a chat becomes."""

    request_id: str
    model: str
    token_ids: list[Count]


class DetokenizeReply(ReplyBody):
    """The text, special tokens included."""

    prompt: str


class TokenizerInfoReply(ReplyBody):
    """What tokenizer_config.json holds; fields beside these are the model's own."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None = None


class HealthReply(ReplyBody):
    """It is as asked."""

    status: Literal["ok"]


class VersionReply(ReplyBody):
    """Of the server's package."""

    version: str


class ReadyReply(ReplyBody):
    """Requests are taken."""

    status: Literal["ready"]
    model: str
