"""What a reply in a chat is made of, in no dialect's words: text, thoughts, and calls of functions with their
arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TextPart:
    """More of the text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A call begins; calls of a reply are numbered by `index`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """More of the arguments (the text of a JSON object) of call `index`."""

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
