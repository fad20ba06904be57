"""llguidance's matchers as the engine knows them, their masks computed beside the engine's steps.

What comes next after a token takes microseconds in most grammars and a good part of a second in some that a client may
write. So a mask is begun on a thread as soon as its token is known, and the engine runs the rows whose masks are there.
llguidance lets the interpreter's lock go meanwhile. Rows whose masks are quick do not queue behind others: those have
threads of their own, which leave the cores to the engine's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from prerope.server.machine.threads import step_aside
from prerope.server.structured.unique.follow import Part
from prerope.server.structured.unique.mask import Differing, vocabulary

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

QUICK_S = 0.002
"""A matcher whose last mask took longer is a slow one."""

NUM_QUICK = 2
"""Threads for quick masks. Slow ones have one, and are not to take more than a core."""

MAX_REASON_CHARS = 300


class TokenMatcher:
    """llguidance's matcher as the engine's `Matcher`: one thread at a time, the engine's or that of a mask."""

    __slots__ = ("_accepting", "_differing", "_failure", "_finished", "_inner", "_mask", "_slow", "_tokenizer")

    def __init__(
        self,
        copy: Callable[[], LLMatcher],
        tokenizer: LLTokenizer,
        differing: Differing | None = None,
        *,
        slow: bool = False,
    ) -> None:
        """copy: makes llguidance's, at the beginning. differing: what is taken out of its masks, if anything."""
        self._tokenizer, self._differing = tokenizer, differing
        self._slow = slow
        self._failure = ""
        self._accepting = self._finished = False
        try:
            self._inner = copy()
            self._accepting, self._finished = self._inner.is_accepting(), self._inner.is_stopped()
        except BaseException as error:
            self._failure = failure_of(error)
        self._mask = None if slow else self._begin()  # a slow one is begun when its sequence runs

    @property
    def begun(self) -> bool:
        return self._mask is not None

    @property
    def ready(self) -> Future[bytes]:
        if self._mask is None:
            self._mask = self._begin()
        return self._mask

    def mask(self) -> bytes:
        return self.ready.result()

    def accept(self, token_id: int) -> None:
        self.ready.result()
        if not self._failure:
            try:
                self._consume(token_id)
            except BaseException as error:
                self._failure = failure_of(error)
        self._mask = None if self._failure or self._finished else self._begin()

    def _consume(self, token_id: int) -> None:
        if not self._inner.consume_token(token_id) and not self._inner.is_error():
            self._failure = "a token was drawn that it forbids"
        if self._inner.is_error():
            self._failure = shorten(self._inner.get_error())
        elif self._differing is not None:
            self._differing.accept(token_id)
        self._accepting, self._finished = self._inner.is_accepting(), self._inner.is_stopped()

    @property
    def accepting(self) -> bool:
        return self._accepting

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def failure(self) -> str:
        return self._failure

    def _begin(self) -> Future[bytes]:
        return threads(self._slow).submit(self._compute)

    def _compute(self) -> bytes:
        began = time.perf_counter()
        if not self._failure:
            try:
                mask = mask_aside(self._inner, self._tokenizer) if self._slow else self._inner.compute_bitmask()
                took_s = time.perf_counter() - began
                if self._differing is not None:  # Python's own, which waits for its lock besides
                    began = time.thread_time()
                    mask = self._differing.allowed(self._inner, mask)
                    took_s += time.thread_time() - began
                self._slow = took_s > QUICK_S
                return mask
            except BaseException as error:
                self._failure = failure_of(error)
        return b"\xff" * -(-self._tokenizer.vocab_size // 8)  # whatever is drawn: the reply ends there


class CompiledGrammar:
    """A grammar over one tokenizer's tokens. Safe to share: a matcher is a copy.

    Attributes:
        num_bytes: what it takes of memory.
    """

    __slots__ = ("_lock", "_parts", "_prototype", "_slow", "_tokenizer", "num_bytes")

    def __init__(
        self,
        prototype: LLMatcher,
        tokenizer: LLTokenizer,
        num_bytes: int = 0,
        *,
        slow: bool = False,
        parts: Sequence[Part] = (),
    ) -> None:
        """parts: the JSON documents within, where values must differ in one of them."""
        self._prototype, self._parts = prototype, parts
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # llguidance's objects may be used by one thread at a time
        self._slow = slow
        self.num_bytes = num_bytes

    def matcher(self) -> TokenMatcher:
        differing = Differing(self._parts, vocabulary(self._tokenizer)) if self._parts else None
        return TokenMatcher(self._copy, self._tokenizer, differing, slow=self._slow)

    def prefix(self) -> Prefix:
        return Prefix(self._copy, self._tokenizer)

    def _copy(self) -> LLMatcher:
        with self._lock:
            return self._prototype.deep_copy()


class Prefix:
    """Tells whether the reply's text up to a place is complete by the grammar; places come in rising order. Where
    llguidance gives up none is, and the reply ends by the grammar alone."""

    def __init__(self, copy: Callable[[], LLMatcher], tokenizer: LLTokenizer) -> None:
        """copy: makes llguidance's, at the beginning."""
        self._copy = copy
        self._tokenizer = tokenizer
        self._inner: LLMatcher | None = None
        self._num_read = 0
        self._given_up = False

    def complete(self, text: str) -> bool:
        """Whether `text`, the reply so far, could be the whole reply. Work is for what is new since the last call."""
        if self._given_up:
            return False
        try:
            if self._inner is None or len(text) < self._num_read:
                self._inner, self._num_read = self._copy(), 0
            new = self._tokenizer.greedy_tokenize(text[self._num_read :])
            self._num_read = len(text)
            return bool(self._inner.consume_tokens(new) and self._inner.is_accepting())
        except BaseException as error:
            self._given_up = bool(failure_of(error))
            return False


@cache
def threads(slow: bool) -> ThreadPoolExecutor:
    """Those that compute masks: slow ones, or the others."""
    return ThreadPoolExecutor(1 if slow else NUM_QUICK, thread_name_prefix="slow-mask" if slow else "mask")


def mask_aside(matcher: LLMatcher, tokenizer: LLTokenizer) -> bytes:
    """What `compute_bitmask` gives, by a thread that steps aside for the engine's.

    It is none of Python's: one that steps aside with the interpreter's lock in its hands keeps all others from it.
    llguidance gives its threads work only where there are two masks to compute, hence an empty grammar's.
    """
    from llguidance import LLMatcher
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

    masks = allocate_token_bitmask(2, tokenizer.vocab_size)
    fill_next_token_bitmask_par(_executor(), [(matcher, 0), (LLMatcher(tokenizer, "", log_level=0), 1)], masks)
    mask: bytes = masks[0].tobytes()
    return mask


@cache
def _executor() -> LLExecutor:
    """One native thread, which has its priority from the thread that starts it."""
    from llguidance import LLExecutor

    def start() -> LLExecutor:
        step_aside()
        return LLExecutor(num_threads=1)

    with ThreadPoolExecutor(1) as starter:
        return starter.submit(start).result()


def failure_of(error: BaseException) -> str:
    """What llguidance raised, as a failure of one reply. Its panics are no `Exception`, and must not end the engine.

    Raised again where it is no word of the library's but the end of a thread or of the program.
    """
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        raise error
    return shorten(f"{type(error).__name__}: {error}")


def shorten(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"
