"""The one internal request: what every dialect lowers its body to, and all that `running.start` knows of a client.

    body of a dialect ─ lowered() ─ GenerationRequest ─ running.start ─ Running: generations, pieces, parts of a chat
                                                                             │
    reply of a dialect ─────────────────────── printed by the dialect ───────┘

A dialect is an adapter of two halves: from its fields to these, and from pieces to its own shapes. Nothing here
is validated but by the dialect, whose names an error has to use; what depends on the model is checked in
`server.api.running`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prerope.rope.spec import RopeSpec
from prerope.server.api.chat.messages import Message
from prerope.server.api.chat.tool_choice import ToolChoice
from prerope.server.api.chat.tools import Tool
from prerope.server.api.requests.documents import DocumentReading, Documents
from prerope.server.structured.text import GrammarText


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Text or token ids to continue. `param` is what the dialect calls it; `documents` stand before it."""

    given: str | list[int]
    documents: Documents | None = None
    add_special_tokens: bool = True
    param: str = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """How a prompt is cut: to so many tokens, −1 for as many as fit; `side` is the end at which tokens are removed."""

    num_tokens: int
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages for the model's chat template, and the tools that a reply may or must call.

    Attributes:
        documents: beside those that messages hold, as templates take them.
        reading: of all of these documents.
        leaves_out_oldest: where they do not fit, the oldest messages are not read.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    separate_reasoning: bool = True
    documents: Sequence[Mapping[str, Any]] = ()
    reading: DocumentReading = field(default_factory=DocumentReading)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    leaves_out_oldest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when a reply ends, by the names of OpenAI and vLLM.

    None is the model's own default (`server.service.SamplingDefaults`), and neutral where it has none.

    Attributes:
        max_tokens: as asked; None leaves it to `default_max_tokens`.
        default_max_tokens: the dialect's own limit where none is asked; None: all that fits.
    """

    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    ignore_eos: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Which fields a reply has beside its text.

    Attributes:
        logprobs: None, or how many alternatives beside each token of the reply (0: the token alone).
        prompt_logprobs: the same of the prompt.
        include_stop: the text ends with the stop string that ended it.
        skip_special_tokens: special tokens are no text.
        report_progress: pieces without text while a long prompt is read.
    """

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop: bool = False
    skip_special_tokens: bool = True
    report_progress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """A beam search in place of draws: how many beginnings are gone on with, and how much length weighs."""

    width: int
    length_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request of any dialect: `n` replies to each prompt, or to one chat.

    Attributes:
        beams: how replies are searched for, where they are not drawn.
        model: the name that the client wrote, if it wrote one.
        constraint: what the text of each reply has to match.
        rope: the position method, where the request chooses one.
        timeout_s: seconds from the request's arrival.
        speculation: whether drafts of the reply may be verified; they change no token.
    """

    input: Sequence[Prompt] | Chat
    model: str | None = None
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    beams: Beams | None = None
    output: Output = field(default_factory=Output)
    constraint: GrammarText | None = None
    truncation: Truncation | None = None
    rope: RopeSpec | None = None
    cache_salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    speculation: bool = True
