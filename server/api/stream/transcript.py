"""The text of one sequence and the tokens it is made of, released together.

    tokens   | Hello | ,   |  wor | ld  | ST  | OP |        stop = "STOP"
    starts   0       5     6      10    12    14
    text     H e l l o ,   w o r l d|S T O P            the cut: 12; tokens that start at or past it are cut as well

While a suffix may still turn out to begin a stop string it is held back, and so are the tokens that begin in it.
The concatenation of what is released is the same whether it is read piece by piece or at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prerope.server.engine.outputs import TokenLogprobs
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
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """From the third on they are `TextStream`'s."""
        shown: dict[str, Any] = {"skip_special_tokens": skip_special_tokens, "shown_special_ids": shown_special_ids}
        self._text = TextStream(tokenizer, stop, include_stop, may_stop=may_stop, **shown)
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
        """What was held back, now that no more tokens come."""
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
