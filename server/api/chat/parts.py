"""What a reply in a chat is made of, in no dialect's words: text, thoughts, and calls of functions with their
arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of the reply's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """The beginning of a call; calls of a reply are numbered by `index`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """A piece of the arguments (the text of a JSON object) of call `index`."""

    index: int
    text: str


Part = TextPart | ReasoningPart | CallPart | ArgumentsPart


@dataclass(slots=True)
class Call:
    """A whole call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ChatReply:
    """The parts of one reply, put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> ChatReply:
        reply = cls()
        for part in parts:
            match part:
                case TextPart(text):
                    reply.text += text
                case ReasoningPart(text):
                    reply.reasoning += text
                case CallPart(_, call_id, name):
                    reply.calls.append(Call(call_id, name))
                case ArgumentsPart(index, text):
                    reply.calls[index].arguments += text
        return reply


class PartsWriter:
    """The parts that a reader of calls makes, until they are taken.

    Attributes:
        num_calls: calls so far.
        skipping: the call at hand is one more than may be, and leaves nothing.
    """

    def __init__(self, new_id: Callable[[], str], *, parallel: bool) -> None:
        """parallel: more than one call may be made."""
        self.num_calls = 0
        self.skipping = False
        self._words = False
        self._new_id = new_id
        self._parallel = parallel
        self._parts: list[Part] = []

    def text(self, text: str) -> None:
        if text:
            self._words = True
            self._parts.append(TextPart(text))

    def before_cut(self, held: str, *marks: str) -> str:
        """The end of a text that was cut, without the beginning of a mark. (A `<` alone after words begins none.)"""
        return without_begun_mark(held, *marks, least=2 if self._words and not self.num_calls else 1)

    def start_call(self, name: str) -> None:
        self.skipping = not self._parallel and self.num_calls > 0
        if not self.skipping:
            self._parts.append(CallPart(self.num_calls, self._new_id(), name))
            self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun last."""
        if text and not self.skipping:
            self._parts.append(ArgumentsPart(self.num_calls - 1, text))

    def take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts


def overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may begin the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def without_begun_mark(text: str, *marks: str, least: int = 1) -> str:
    """A text that was cut, without the beginning of a mark at its end, if that has so many characters."""
    begun = max(overlap(text, mark) for mark in marks)
    return text[: len(text) - begun].rstrip() if begun >= least else text
