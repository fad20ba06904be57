"""From the tokens of sequences to text, piece by piece, for as long as the client is there.

    OutputStream ─ Transcript: text, stop strings ─ Generation: pieces, usage, timing ─┬─ read_all: whole replies
                                                                                       └─ turns: pieces as they come

This is the one home of detokenizing, stop strings and timing; endpoints differ only in how they print pieces. Whoever
reads closes: when a reader ends for any reason (done, refused, a stop string, the client gone) its sequences are
aborted in the engine and their blocks are free.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from prerope.server.api.requests.internal import GenerationRequest
from prerope.server.engine.async_engine import OutputStream
from prerope.server.engine.outputs import FinishReason, Timings, TokenLogprobs, TokenOutput
from prerope.server.engine.sequence import EngineRequest
from prerope.server.errors import ClientGone
from prerope.server.metrics import Metrics
from prerope.server.service import Service
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a reply: `start` is where its text begins in the reply, in characters."""

    token_id: int
    start: int
    logprobs: TokenLogprobs | None = None


class Transcript:
    """Turns token ids into released text and tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        shown_special_ids: frozenset[int] = frozenset(),
        may_stop: Callable[[str], bool] | None = None,
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """From the third on they are `TextStream`'s."""
        shown: dict[str, Any] = {"skip_special_tokens": skip_special_tokens, "shown_special_ids": shown_special_ids}
        self._text = TextStream(tokenizer, stop, include_stop, may_stop=may_stop, min_tokens=min_tokens, **shown)
        # Without stop strings nothing can be cut, and the text itself tells where tokens start.
        self._uncut = TextStream(tokenizer, **shown) if stop else None
        self._num_uncut = 0
        self._num_released = 0
        self._held: deque[Token] = deque()

    @property
    def stopped(self) -> bool:
        """A stop string was found; tokens after it are not part of the reply."""
        return self._text.stopped

    @property
    def stop_string(self) -> str | None:
        """Which one it was."""
        return self._text.stop_string

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> tuple[str, list[Token]]:
        """Take new tokens; return the text and the tokens that are now sure to be in the reply."""
        text = ""
        for index, token_id in enumerate(token_ids):
            if self.stopped:
                break
            self._held.append(Token(token_id, self._num_uncut, logprobs[index] if logprobs else None))
            text += self._advance(token_id)
        return text, self._release(everything=self._uncut is None)

    def finish(self) -> tuple[str, list[Token]]:
        """The text and tokens that were held back, now that no more tokens come."""
        text = self._text.finish()
        self._num_released += len(text)
        return text, self._release(everything=not self.stopped)

    def _advance(self, token_id: int) -> str:
        text = self._text.push([token_id])
        self._num_released += len(text)
        self._num_uncut += len(text if self._uncut is None else self._uncut.push([token_id]))
        return text

    def _release(self, *, everything: bool) -> list[Token]:
        released = []
        while self._held and (everything or self._held[0].start < self._num_released):
            released.append(self._held.popleft())
        return released


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
        self.rope = (sequence.positions or service.engine.info.positions).described
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
            request.sampling.min_tokens,
            include_stop=output.include_stop,
            skip_special_tokens=output.skip_special_tokens,
        )
        self._stopwatch = _Stopwatch(service.metrics, arrived)
        self._outputs = outputs
        self._engine_timings: Timings | None = None
        self._ended = False

    @property
    def stop_string(self) -> str | None:
        """The one that has ended it."""
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
            self._metrics.ttft.observe(now - self._arrived)
        else:
            self._metrics.itl.observe(now - self._last)
        self._last = now

    def timings(self) -> Timings:
        """Where the engine gave none, since the sequence ended before its first token: all of it counts as prefill."""
        first = self._last if self._first is None else self._first
        return Timings(queue_s=0.0, prefill_s=first - self._arrived, decode_s=self._last - first)

    def stop(self, reason: FinishReason, usage: Usage, timings: Timings | None) -> None:
        """timings: the engine's, None where the sequence ended before its first token."""
        metrics, num_tokens = self._metrics, usage.completion_tokens
        metrics.finished[reason].inc()
        metrics.e2e.observe(time.perf_counter() - self._arrived)
        metrics.prompt.observe(usage.prompt_tokens)
        metrics.generation.observe(num_tokens)
        if timings is None:
            return
        metrics.queue.observe(timings.queue_s)
        metrics.prefill.observe(timings.prefill_s)
        metrics.decode.observe(timings.decode_s)
        if num_tokens > 1:
            metrics.tpot.observe(timings.decode_s / (num_tokens - 1))


T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; ClientGone, and the work is cancelled, when the client leaves. The body must be read."""
    gone = asyncio.create_task(client_gone(request))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection before the reply was complete")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def client_gone(request: Request) -> None:
    """Returns once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_all(request: Request, generations: Sequence[Generation]) -> list[Reply]:
    """Every generation, to its end. Raises ClientGone, and aborts them all, when the client leaves before that."""
    gone = asyncio.create_task(client_gone(request))
    replies = [asyncio.create_task(generation.reply()) for generation in generations]
    work = asyncio.gather(*replies)
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone("the client closed the connection before the reply was complete")
        return work.result()
    finally:
        await close_all([gone, work, *replies], generations)


async def close_all(tasks: Sequence[asyncio.Future[Any]], generations: Sequence[Generation]) -> None:
    """Abort first: that waits for nothing, so it is done even where this task is being cancelled."""
    for generation in generations:
        await generation.aclose()
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.gather(*tasks, return_exceptions=True)
