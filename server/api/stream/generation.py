"""One sequence from the engine as a stream of pieces of text: the one home of detokenizing, stop strings and timing.

/generate, completions and chat differ only in how they print pieces. A generation that is closed early, by a stop
string or because its reader went away, is aborted in the engine and frees its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from prerope.server.api.requests.internal import GenerationRequest
from prerope.server.api.stream.transcript import Token, Transcript
from prerope.server.engine.output_stream import OutputStream
from prerope.server.engine.outputs import FinishReason, Timings, TokenLogprobs, TokenOutput
from prerope.server.engine.sequence import EngineRequest
from prerope.server.metrics import Metrics
from prerope.server.service import Service
from prerope.server.structured.matcher import CompiledGrammar


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt is read, in tokens; `processed` includes `cached`."""

    total: int
    cached: int
    processed: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one sequence. Tokens that a stop string cut from the reply were generated, and count.

    drafted_tokens and accepted_tokens: see `server.engine.speculation`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine step adds to a reply; `finish_reason` is set on the last piece and only there."""

    text: str = ""
    tokens: Sequence[Token] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    progress: Progress | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Reply:
    """All pieces of one generation, put together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: FinishReason = FinishReason.ABORT

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens.extend(piece.tokens)
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason


class Generation:
    """An async iterator of pieces, from the outputs of one sequence.

    Attributes:
        usage: grows as pieces arrive.
        timings: set with the last piece.
        rope: the position method, resolved.
        stopped_by_string, stop_string: set with the last piece.
        documents: of each that is read on its own, its tokens and how many of them were cached; set at the end.
    """

    def __init__(
        self,
        service: Service,
        sequence: EngineRequest,
        outputs: OutputStream,
        request: GenerationRequest,
        arrived: float,
        shown_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        """outputs: of the sequence, submitted. arrived: `time.perf_counter()` when the HTTP request came.
        shown_special_ids: see `TextStream`."""
        self.prompt_token_ids = sequence.prompt_token_ids
        self.rope = (sequence.positions or service.engine.info.positions).describe()
        self.usage = Usage(prompt_tokens=len(sequence.prompt_token_ids))
        self.timings: Timings | None = None
        self._spans = sequence.documents
        self.documents: list[dict[str, int]] = []
        grammar, stop, output = sequence.sampling.grammar, request.sampling.stop, request.output
        may_stop = grammar.prefix().complete if stop and isinstance(grammar, CompiledGrammar) else None
        self._transcript = Transcript(
            service.tokenizer,
            stop,
            shown_special_ids,
            may_stop,
            include_stop=output.include_stop,
            skip_special_tokens=output.skip_special_tokens,
        )
        self._stopwatch = _Stopwatch(service.metrics, arrived)
        self._outputs = outputs
        self._engine_timings: Timings | None = None
        self._ended = False

    @property
    def stopped_by_string(self) -> bool:
        """Whether a stop string has ended it."""
        return self._transcript.stopped

    @property
    def stop_string(self) -> str | None:
        """Which one it was."""
        return self._transcript.stop_string

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Piece:
        while not self._ended:
            output = await anext(self._outputs)
            self._count(output)
            piece = self._piece(output)
            if piece.finish_reason is not None:
                found = zip(self._spans, output.document_cached_tokens, strict=False)
                self.documents = [{"tokens": span.stop - span.start, "cached_tokens": cached} for span, cached in found]
                self._end(piece.finish_reason)
                await self._outputs.aclose()  # after a stop string the engine would go on
            if piece != Piece():  # else everything is held back
                return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort if still running. Safe at any time: never started, or while another task waits for a piece."""
        if not self._ended:
            self._end(FinishReason.ABORT)
        await self._outputs.aclose()

    async def reply(self) -> Reply:
        """Read to the end."""
        reply = Reply()
        async for piece in self:
            reply.add(piece)
        return reply

    def _piece(self, output: TokenOutput) -> Piece:
        text, tokens = self._transcript.push(output.token_ids, output.logprobs)
        reason = FinishReason.STOP if self._transcript.stopped else output.finish_reason
        if reason is not None:
            rest, rest_tokens = self._transcript.finish()
            text, tokens = text + rest, tokens + rest_tokens
            if self._transcript.stopped:  # what was held back may complete a stop string as it ends
                reason = FinishReason.STOP
        progress = None
        if not output.token_ids and reason is None:
            progress = Progress(output.num_prompt_tokens, output.num_cached_tokens, output.num_processed_tokens)
        return Piece(text, tuple(tokens), output.prompt_logprobs, progress, reason)

    def _count(self, output: TokenOutput) -> None:
        self._engine_timings = output.timings or self._engine_timings
        if output.token_ids:
            self._stopwatch.tokens_came()
        self.usage = Usage(
            prompt_tokens=output.num_prompt_tokens,
            completion_tokens=self.usage.completion_tokens + len(output.token_ids),
            cached_tokens=output.num_cached_tokens,
            drafted_tokens=output.num_drafted_tokens,
            accepted_tokens=output.num_accepted_tokens,
        )

    def _end(self, reason: FinishReason) -> None:
        self._ended = True
        self.timings = self._engine_timings or self._stopwatch.timings()
        self._stopwatch.stop(reason, self.usage, self._engine_timings)


class _Stopwatch:
    """Latencies of one sequence as its client sees them, for the metrics."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._first: float | None = None
        self._last = arrived

    def tokens_came(self) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._metrics.observe_first_token(now - self._arrived)
        else:
            self._metrics.observe_inter_token(now - self._last)
        self._last = now

    def timings(self) -> Timings:
        """Where the engine gave none, since the sequence ended before its first token: all of it counts as prefill."""
        first = self._last if self._first is None else self._first
        return Timings(queue_s=0.0, prefill_s=first - self._arrived, decode_s=self._last - first)

    def stop(self, reason: FinishReason, usage: Usage, timings: Timings | None) -> None:
        self._metrics.observe_finished(
            reason,
            e2e_s=time.perf_counter() - self._arrived,
            prompt_tokens=usage.prompt_tokens,
            generation_tokens=usage.completion_tokens,
            timings=timings,
        )
