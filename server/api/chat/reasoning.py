"""Tells what a model thinks, between <think> and </think> at the beginning of a reply, from what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prerope.server.api.chat.parts import Part, ReasoningPart, without_begun_mark
from prerope.server.api.chat.tool_calls import ChatReader

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"

TAIL = 8
"""Tokens at the end of a prompt that tell whether the reply begins within thoughts."""


def ends_within_thoughts(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt does: some templates begin them."""
    return tokenizer.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False).rstrip().endswith(BEGIN)


class ReasoningReader:
    """Thoughts go out as they come; what follows them is read by another reader."""

    def __init__(self, inner: ChatReader, *, thinking: bool = False) -> None:
        """thinking: the prompt ends within thoughts already, as some templates write it."""
        self._inner = inner
        self._thinking: bool | None = thinking or None  # None: not known yet
        self._buffer = ""
        self._after_mark = False  # line ends after a mark belong to neither side

    @property
    def num_calls(self) -> int:
        return self._inner.num_calls

    def push(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""
        if self._after_mark:
            text = text.lstrip("\n")
            self._after_mark = not text
        if self._thinking is False:
            return self._inner.push(text) if text else []
        self._buffer += text
        if self._thinking is None and not self._begin():
            return []
        return self._thoughts() if self._thinking else self._answer("")

    def finish(self, *, cut: bool = False) -> list[Part]:
        """The parts that were held back, at the end of the reply: thoughts that were cut short stay thoughts."""
        held, self._buffer = self._buffer, ""
        if cut:
            held = without_begun_mark(held, END if self._thinking else BEGIN)
        last = self._inner.finish
        if self._thinking:
            return [ReasoningPart(held), *last(cut=cut)] if held else last(cut=cut)
        return [*self._inner.push(held), *last(cut=cut)] if held else last(cut=cut)

    def _begin(self) -> bool:
        """Whether it is known by now if the reply begins with thoughts."""
        start = self._buffer.lstrip()
        if start.startswith(BEGIN):
            self._thinking, self._buffer = True, self._past_mark(start[len(BEGIN) :])
        elif not BEGIN.startswith(start):
            self._thinking = False
        return self._thinking is not None

    def _thoughts(self) -> list[Part]:
        thought, end, rest = self._buffer.partition(END)
        if end:
            self._thinking, self._buffer = False, ""
            parts: list[Part] = [ReasoningPart(thought)] if thought else []
            return parts + self._answer(self._past_mark(rest))
        held = next((n for n in range(min(len(END) - 1, len(thought)), 0, -1) if END.startswith(thought[-n:])), 0)
        certain, self._buffer = thought[: len(thought) - held], thought[len(thought) - held :]
        return [ReasoningPart(certain)] if certain else []

    def _past_mark(self, text: str) -> str:
        rest = text.lstrip("\n")
        self._after_mark = not rest
        return rest

    def _answer(self, text: str) -> list[Part]:
        text, self._buffer = self._buffer + text, ""
        return self._inner.push(text) if text else []
