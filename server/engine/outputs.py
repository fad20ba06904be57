"""What the engine hands back, step by step, and the stream in which one request gets it. The API makes text of it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any

from prerope.server.errors import ClientGone, RequestError

ALTERNATIVE = struct.Struct("=if")


class FinishReason(StrEnum):
    """Why a sequence ended. `stop`: end-of-sequence or a stop id; `length`: max_tokens or the model's length."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability (natural, of the unpenalised, untempered distribution) of one token and its alternatives.

    packed: the alternatives, each an id and a log-probability in four bytes. (As objects they would take more memory
    than the token's keys and values.)
    """

    token_id: int
    logprob: float
    packed: bytes = b""

    @property
    def top(self) -> list[tuple[int, float]]:
        """(token id, logprob), best first."""
        return list(ALTERNATIVE.iter_unpack(self.packed))


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request: in the queue, then to the first token, then to the end, or until now."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One event of one request.

    Attributes:
        token_ids: the new tokens; empty in a prefill-progress event.
        logprobs: one per new token when asked for.
        prompt_logprobs: once, with the first event after the prefill: one per prompt token, the first is None.
        num_prompt_tokens, num_cached_tokens, num_processed_tokens: the prompt, how much of it came from the
            prefix cache, and how much is computed so far (cached included).
        finish_reason: set on the last event.
        document_cached_tokens: of each document that is read on its own, how many of its tokens were in the cache.
        num_drafted_tokens, num_accepted_tokens: of the output until now; see `server.engine.speculation`.
        timings: until now, with every event that has tokens or ends the request: its reader may end it there.
        failure: on the last event of a request that failed alone; its caller gets the error.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_processed_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    document_cached_tokens: tuple[int, ...] = ()
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    failure: RequestError | None = None


MAX_UNREAD = 4096
"""Outputs that wait for a reader who is slower than the engine; past that, the request is aborted."""


class OutputStream(AsyncGenerator[TokenOutput, None]):
    """The outputs of one request. Closing it early, started or not, aborts the request within a step."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._items: asyncio.Queue[TokenOutput | RequestError] = asyncio.Queue()
        self._ended = False

    def put(self, item: TokenOutput | RequestError) -> None:
        """Hand an item over. A reader that lets more than `MAX_UNREAD` pile up gets an error after those."""
        self._items.put_nowait(item)
        if self._items.qsize() > MAX_UNREAD and isinstance(item, TokenOutput) and item.finish_reason is None:
            self._items.put_nowait(
                ClientGone(f"{MAX_UNREAD} outputs were not read: the reader is too slow", code="reader_too_slow")
            )
            self._abort()

    async def asend(self, _value: None) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, RequestError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def athrow(
        self, typ: Any, val: BaseException | object = None, _tb: TracebackType | None = None
    ) -> TokenOutput:
        self._close()
        raise val if isinstance(val, BaseException) else typ

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort()
