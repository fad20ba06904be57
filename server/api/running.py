"""From the internal request to running generations: the one path that every generating endpoint takes.

    running = await start(service, read, "cmpl", arrived)
    replies = await read_all(request, running.generations)            whole
    async with in_turn(running.generations) as pieces: …              as a stream

Everything that can be refused is refused in `start`, before a stream has begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prerope.server.api.beams import BeamSearch
from prerope.server.api.chat.parts import ChatReply, Part
from prerope.server.api.chat.reasoning import BEGIN, ReasoningReader
from prerope.server.api.chat.tool_calls import ChatReader, TextReader, reader_of
from prerope.server.api.chat.tools import ToolUse
from prerope.server.api.limits import admit, new_id, sampling_params
from prerope.server.api.requests.documents import TokenizedPrompt
from prerope.server.api.requests.internal import Chat, GenerationRequest
from prerope.server.api.requests.reading import Read
from prerope.server.api.requests.structured import compiled
from prerope.server.api.stream.generation import Generation, Piece, Reply
from prerope.server.engine.limits import check_documents, max_tokens_that_fit
from prerope.server.engine.outputs import FinishReason
from prerope.server.engine.sampling.params import SamplingParams
from prerope.server.errors import InvalidRequest
from prerope.server.service import Service

TAIL = 8
"""Tokens at the end of a prompt that tell whether the reply begins within thoughts."""


@dataclass(frozen=True, slots=True)
class Running:
    """A request that was admitted. Its generations are numbered prompt by prompt: choice i is of prompt i ÷ n.
    thinking: replies begin within thoughts.

    Whoever gets one reads its generations through `read_all` or `in_turn`, which close them.
    """

    id: str
    request: GenerationRequest
    generations: list[Generation]
    tools: ToolUse | None = None
    thinking: bool = False

    def reader(self) -> ChatReader:
        """A new reader for the text of one choice of a chat: it tells text from tool calls."""
        use = self.tools
        inner = TextReader() if use is None else reader_of(use)
        return ReasoningReader(inner, thinking=self.thinking) if self.separates_reasoning else inner

    @property
    def separates_reasoning(self) -> bool:
        return isinstance(self.request.input, Chat) and self.request.input.separate_reasoning

    def chat_reply(self, reply: Reply) -> ChatReply:
        """A whole reply of a chat."""
        reader = self.reader()
        return ChatReply.of([*reader.push(reply.text), *_last_parts(reader, reply.finish_reason)])


def parts_of(piece: Piece, reader: ChatReader) -> list[Part]:
    """What a piece of a stream adds to a chat's reply that `reader` reads."""
    parts = reader.push(piece.text)
    return parts if piece.finish_reason is None else [*parts, *_last_parts(reader, piece.finish_reason)]


def _last_parts(reader: ChatReader, reason: FinishReason) -> list[Part]:
    return reader.finish(cut=reason is not FinishReason.STOP)


async def start(service: Service, read: Read[Any], prefix: str, arrived: float) -> Running:
    """Admit a request: all of its sequences or, with a RequestError, none.

    prefix: of the reply's id. arrived: `time.perf_counter()` when the HTTP request came.
    """
    (request, prepared), request_id = read.ready, new_id(prefix)
    use = prepared.tools
    choices = await checked(service, read)
    shown = frozenset[int]() if use is None else frozenset(use.marks.values())
    searched = list[Generation]()
    if request.beams:
        search = BeamSearch(service, request, request_id, arrived, shown)
        for prompt, params in choices[:: request.n]:  # one search finds all replies to a prompt
            searched += await search.replies(prompt, params, len(searched))
    generations = searched or admit(service, request_id, choices, request, arrived=arrived, shown_special_ids=shown)
    thinking = isinstance(request.input, Chat) and _thinks(service, prepared.prompts[0].ids)
    return Running(request_id, request, generations, use, thinking)


async def checked(service: Service, read: Read[Any]) -> list[tuple[TokenizedPrompt, SamplingParams]]:
    """Each sequence of a request as it is to run, or a RequestError. Asks for no room, in the queue or elsewhere."""
    request, prepared = read.ready
    grammar = await compiled(service, prepared.constraint)
    choices = []
    info, asked, default = service.engine.info, request.sampling.max_tokens, request.sampling.default_max_tokens
    for prompt in prepared.prompts:
        if prompt.documents and request.output.prompt_logprobs is not None:
            raise InvalidRequest(
                "log-probabilities of the prompt are not there for documents that were read on their own: leave them "
                "out, or set document_attention to 'full'",
                param="documents",
            )
        max_tokens = max_tokens_that_fit(info, len(prompt.ids), asked, default)
        check_documents(prompt.documents, len(prompt.ids), max_tokens, info)
        bad = prepared.bad_token_ids
        for index in range(request.n):
            params = sampling_params(service, request, max_tokens, index=index, grammar=grammar, bad_token_ids=bad)
            choices.append((prompt, params))
    return choices


def _thinks(service: Service, ids: Sequence[int]) -> bool:
    """Whether a prompt ends within thoughts: some templates begin them."""
    end = service.tokenizer.decode(list(ids[-TAIL:]), skip_special_tokens=False)
    return end.rstrip().endswith(BEGIN)
