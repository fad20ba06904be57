"""A request as the engine sees it: token ids in, token ids out, and how far its K and V are computed.

    EngineRequest (with its SamplingParams), as a caller hands it over ─ Sequence, as the engine runs it ─ TokenOutput

Values are validated by the API. Stop *strings* are not here: the engine knows no text. The API finds them and aborts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from prerope.cache.attention.selection import selects_from
from prerope.cache.blocks.documents import DocumentSpan, longest_readings
from prerope.cache.blocks.manager import BlockTable, PrefixHasher
from prerope.cache.blocks.states import SequenceState
from prerope.cache.tier import Fetch
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED
from prerope.server.engine.outputs import FinishReason, Timings, TokenLogprobs, TokenOutput
from prerope.server.engine.sampling.mask import Grammar, Matcher
from prerope.server.errors import RequestError

if TYPE_CHECKING:
    from prerope.server.engine.sampling.standing import Standing
    from prerope.server.engine.speculation import Drafter


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token, and when to end.

    Attributes:
        max_tokens: tokens to generate at most; 0 only together with `prompt_logprobs`.
        min_tokens: end-of-sequence and stop ids are not sampled before so many tokens, and no stop string ends within.
        temperature, top_k: 0 is greedy; 0 keeps all.
        repetition_penalty: over prompt and output (CTRL, Keskar 2019); 1 is off.
        presence_penalty, frequency_penalty: over the output (OpenAI); 0 is off.
        logit_bias: token id → added to its logit before anything else.
        allowed_token_ids: no other token is drawn, as far as a grammar leaves a choice.
        bad_token_ids: sequences of tokens that are not drawn one after another, likewise.
        seed: makes this request's draws reproducible, whatever else is in the batch.
        logprobs: None, or how many alternatives to return beside each sampled token (0 is the token alone).
        prompt_logprobs: the same for every prompt token but the first, from token `prompt_logprobs_start` on; rows
            that are scored are computed, not taken from the prefix cache.
        grammar: what the output has to match; see `server.engine.sampling.mask` for how it meets the rest.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    allowed_token_ids: TokenIds[int] | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


UNKNOWN = -1
"""Stands in `token_ids` for a token that a step in flight samples. No embedding has it."""

PRIORITY_STEP_S, MAX_PRIORITY = 30.0, 10
"""A step of priority counts as so many seconds of waiting, and ten are the most: who has waited for longer than that
passes all that come after, however urgent."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a caller hands to the engine.

    Attributes:
        positions: the resolved position method; None is the deployment's.
        cache_salt: prefixes are shared only among requests with the same salt.
        priority: lower runs first: a head start, or a handicap, of `PRIORITY_STEP_S` a step.
        report_progress: also yield an output, without tokens, after each prefill chunk.
        deadline: when it is aborted, in seconds of `time.monotonic()`.
        documents: parts of the prompt that are read on their own, in order.
        speculation: whether drafts of its output may be verified; they change no token.
    """

    request_id: str
    prompt_token_ids: TokenIds[int]
    sampling: SamplingParams
    positions: ModelPositions | None = None
    cache_salt: str = ""
    priority: int = 0
    report_progress: bool = False
    deadline: float = math.inf
    documents: tuple[DocumentSpan, ...] = ()
    speculation: bool = True


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine. There are no phases: only `num_computed_tokens` catching up with `token_ids`.

    Attributes:
        token_ids: prompt and output so far; the last `num_pending` of them are UNKNOWN.
        num_pending: tokens that steps in flight sample: none or one, and two while a step is launched.
        pending_place: where the last of them is among the tokens of its step.
        num_computed_tokens: how many of them have K and V in the cache once all steps launched have run; 0 again after
            a preemption.
        num_processed_tokens: prompt tokens of which that was so when a step was last collected.
        block_table: blocks of the cache, in order.
        standing: what it asks of every draw, once one was made on the host.
        matcher: how far the output has come in its grammar, where it has one.
        deadline: the request's, or the deployment's where that comes first.
        state: the slots of its state, where layers keep one beside K and V; None before it is admitted.
        reader: reads the document that this sequence has come to, where that has not been read yet.
        fetch: blocks of its beginning or its documents that a tier is reading; it is not admitted before they are here.
        drafter: says what may come next, once it decodes.
        num_drafted, num_accepted: tokens that were drafted, and those of them that came true.
        documents_found: of each document that was copied, how many of its tokens were in the cache at the first try.
        longest_readings: see `cache.blocks.documents`. cached_of_documents: what outputs tell.
    """

    request: EngineRequest
    positions: ModelPositions
    hasher: PrefixHasher
    generator: torch.Generator | None
    token_ids: list[int]
    num_prompt_tokens: int
    matcher: Matcher | None = None
    deadline: float = math.inf
    num_pending: int = 0
    pending_place: int = 0
    num_computed_tokens: int = 0
    num_processed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: BlockTable = field(default_factory=BlockTable)
    state: SequenceState | None = None
    reader: Sequence | None = None
    fetch: Fetch | None = None
    drafter: Drafter | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    documents_found: dict[DocumentSpan, int] = field(default_factory=dict)
    longest_readings: list[int] = field(default_factory=list)
    cached_of_documents: tuple[int, ...] = ()
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs_sent: bool = False
    standing: Standing | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    scheduled_at: float | None = None
    first_token_at: float | None = None

    @classmethod
    def from_request(
        cls, request: EngineRequest, positions: ModelPositions, block_size: int, timeout: float | None
    ) -> Sequence:
        """A request that has just come, read by these positions; timeout: the deployment's, in seconds."""
        ids, sampling, generator = list(request.prompt_token_ids), request.sampling, None
        if sampling.seed is not None:
            generator = torch.Generator().manual_seed(sampling.seed % 2**64)
        chooses = UNBOUNDED if positions.select is None else selects_from(positions.select, len(ids))
        return cls(
            request=request,
            positions=positions,
            hasher=PrefixHasher(block_size, positions, request.cache_salt, request.documents, chooses),
            generator=generator,
            token_ids=ids,
            num_prompt_tokens=len(ids),
            matcher=None if sampling.grammar is None else sampling.grammar.matcher(),
            deadline=min(request.deadline, math.inf if timeout is None else time.monotonic() + timeout),
            longest_readings=longest_readings(request.documents) if request.documents else [],
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def selects_from(self) -> int:
        """The first row that may leave far keys out."""
        return self.hasher.selects_from

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Output tokens that are known."""
        return self.num_output_tokens - self.num_pending

    @property
    def ending(self) -> bool:
        """Its last token is pending: no step follows. That `max_tokens` is within every limit, `limits` saw to."""
        return self.num_pending > 0 and self.num_output_tokens >= self.request.sampling.max_tokens

    @property
    def chosen_on_host(self) -> bool:
        """Whether its next token, or what is told of it, takes more than a draw from its logits.

        Otherwise the draw is made where the logits are, and the step after it may be launched before it is known.
        """
        sampling = self.request.sampling
        return (
            self.matcher is not None
            or sampling.has_penalties
            or bool(sampling.logit_bias)
            or sampling.allowed_token_ids is not None
            or bool(sampling.bad_token_ids)
            or self.num_output_tokens < sampling.min_tokens
            or sampling.logprobs is not None
            or sampling.prompt_logprobs is not None
        )

    @property
    def waits_for_mask(self) -> bool:
        """Whether what may come next is still being computed."""
        return self.matcher is not None and not self.matcher.ready.done()

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens whose K and V are still to be computed; 1 is a decode step."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def decoding(self) -> bool:
        num_tokens = len(self.token_ids)
        return num_tokens > self.num_prompt_tokens and num_tokens - self.num_computed_tokens == 1

    @property
    def num_more_drafts(self) -> int:
        """The most that are of use behind its next token."""
        return self.request.sampling.max_tokens - self.num_output_tokens - 1

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is served first and preempted last."""
        return (self.arrived_at + PRIORITY_STEP_S * self.priority, self.arrived_at)

    @property
    def priority(self) -> int:
        """The request's, within what anybody may have."""
        return max(-MAX_PRIORITY, min(self.request.priority, MAX_PRIORITY))

    @property
    def first_scored_row(self) -> int:
        """The first row whose logits are wanted: that of the last known token, or one that scores a prompt token."""
        sampling = self.request.sampling
        if sampling.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens:
            return len(self.token_ids) - 1
        # Row i scores token i + 1. What was scored before a preemption is not scored again.
        return max(sampling.prompt_logprobs_start, len(self.prompt_logprobs), 1) - 1

    def num_logits(self, start: int, count: int) -> int:
        """How many of the last of `count` rows from `start` on want logits."""
        return start + count - min(max(start, self.first_scored_row), start + count)

    @property
    def num_reusable_tokens(self) -> int:
        """Tokens at the beginning that a cached prefix may stand for: nobody wants their logits."""
        return min(self.first_scored_row, len(self.token_ids) - 1)

    def expect(self, place: int) -> None:
        """A step was launched that samples its next token, as number `place` of that step's tokens."""
        self.token_ids.append(UNKNOWN)
        self.num_pending += 1
        self.pending_place = place

    def append(self, token_id: int) -> None:
        """Take a sampled token in: the first that is pending, if any."""
        if self.num_pending:
            self.token_ids[-self.num_pending] = token_id
            self.num_pending -= 1
        else:
            self.token_ids.append(token_id)
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()

    def finish_reason(self, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends after `token_id`, the last token that is known; None where it goes on."""
        sampling, num_generated = self.request.sampling, self.num_generated_tokens
        if self.matcher is not None and (token_id in eos_token_ids or self.matcher.finished):
            return FinishReason.STOP
        ends = token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos)
        if ends and num_generated >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_generated >= sampling.max_tokens else None

    def output(
        self,
        token_ids: tuple[int, ...] = (),
        *,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        finish_reason: FinishReason | None = None,
        failure: RequestError | None = None,
    ) -> TokenOutput:
        """An event for this request's caller; prompt log-probabilities go with the first one that has them whole."""
        prompt_logprobs = None
        ready = len(self.prompt_logprobs) == self.num_prompt_tokens and not self.prompt_logprobs_sent
        if ready and (token_ids or finish_reason):
            prompt_logprobs, self.prompt_logprobs_sent = tuple(self.prompt_logprobs), True
        return TokenOutput(
            token_ids=token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens + sum(self.documents_found.values()),
            num_processed_tokens=self.num_processed_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            num_drafted_tokens=self.num_drafted,
            num_accepted_tokens=self.num_accepted,
            document_cached_tokens=self._cached_of_documents() if token_ids or finish_reason else (),
            timings=self._timings() if token_ids or finish_reason else None,
            failure=failure,
        )

    def _cached_of_documents(self) -> tuple[int, ...]:
        """Of each, its tokens that were in the cache: once a token was sampled that is known, and stays."""
        spans, cached, found = self.request.documents, self.num_cached_tokens, self.documents_found
        if len(self.cached_of_documents) < len(spans):
            self.cached_of_documents = tuple(span.within(cached) + found.get(span, 0) for span in spans)
        return self.cached_of_documents

    def _timings(self) -> Timings:
        now = time.monotonic()
        scheduled = now if self.scheduled_at is None else self.scheduled_at
        first = now if self.first_token_at is None else self.first_token_at
        return Timings(scheduled - self.arrived_at, first - scheduled, now - first)
