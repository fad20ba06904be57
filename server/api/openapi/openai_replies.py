"""What OpenAI's completions and chats answer here, for the OpenAPI document; see `replies`."""

from __future__ import annotations

from typing import Annotated, Literal

from prerope.server.api.openapi.replies import Count, Ending, PromptLogprobs, ReplyBody
from pydantic import Field

ChatEnding = Literal["stop", "length", "abort", "tool_calls"]


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
