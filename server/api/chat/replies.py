"""The reply of a chat, told apart into text, thoughts and tool calls: whole, or piece by piece."""

from __future__ import annotations

from prerope.server.api.chat.parts import ChatReply, Part
from prerope.server.api.chat.reasoning import ReasoningReader
from prerope.server.api.chat.tool_calls import ChatReader, TextReader, reader_of
from prerope.server.api.requests.internal import Chat
from prerope.server.api.running import Running
from prerope.server.api.stream.generation import Piece, Reply
from prerope.server.engine.outputs import FinishReason


def reader_for(running: Running) -> ChatReader:
    """A new reader for the text of one choice of a chat: it tells text from tool calls, and thoughts from both."""
    chat, use = running.request.input, running.tools
    inner = TextReader() if use is None else reader_of(use)
    separate = isinstance(chat, Chat) and chat.separate_reasoning
    return ReasoningReader(inner, thinking=running.thinking) if separate else inner


def chat_reply(running: Running, reply: Reply) -> ChatReply:
    """A whole reply of a chat."""
    reader = reader_for(running)
    return ChatReply.of([*reader.push(reply.text), *_last_parts(reader, reply.finish_reason)])


def parts_of(piece: Piece, reader: ChatReader) -> list[Part]:
    """What a piece of a stream adds to a chat's reply that `reader` reads."""
    parts = reader.push(piece.text)
    return parts if piece.finish_reason is None else [*parts, *_last_parts(reader, piece.finish_reason)]


def _last_parts(reader: ChatReader, reason: FinishReason) -> list[Part]:
    return reader.finish(cut=reason is not FinishReason.STOP)
