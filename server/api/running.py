"""From the internal request to running generations: the one path that every generating endpoint takes.

    running = await start(service, read, "cmpl", arrived)
    replies = await read_all(request, running.generations)            whole
    async with in_turn(running.generations) as pieces: …              as a stream

Everything that can be refused is refused in `start`, before a stream has begun: all sequences of a request run, or
none. What a request may ask for beside the limits of `server.engine.limits` is checked here.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.api.beams import BeamSearch, check_search
from prerope.server.api.chat.parts import ChatReply, Part
from prerope.server.api.chat.reasoning import BEGIN, ReasoningReader
from prerope.server.api.chat.tool_calls import ChatReader, TextReader, reader_of
from prerope.server.api.chat.tools import ToolUse
from prerope.server.api.fairness import current_hold
from prerope.server.api.requests.body import in_words_of
from prerope.server.api.requests.documents import TokenizedPrompt
from prerope.server.api.requests.internal import Chat, GenerationRequest
from prerope.server.api.requests.reading import Prepared, Read
from prerope.server.api.requests.structured import compiled
from prerope.server.api.stream.generation import Generation, Piece, Reply
from prerope.server.engine.limits import check_documents, check_vocabulary, max_tokens_that_fit
from prerope.server.engine.outputs import FinishReason
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.errors import InvalidRequest
from prerope.server.service import Service
from prerope.server.structured.matcher import CompiledGrammar

SEEDS = 2**63

NO_SEED = -1
"""What llama.cpp, Ollama, vLLM and the pages before them write where each reply is to be drawn anew."""

GREEDY_BELOW = 1e-4
"""A temperature this low draws the best token anyway, and one much lower would overflow the logits."""

LEAST_TOP_P = 1e-6
"""A top-p this low keeps the best token alone."""

TAIL = 8
"""Tokens at the end of a prompt that tell whether the reply begins within thoughts."""

N = TypeVar("N", int, float)


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
        search = BeamSearch(service, request, request_id, arrived, shown, engine_requests)
        for prompt, params in choices[:: request.n]:  # one search finds all replies to a prompt
            searched += await search.replies(prompt, params, len(searched))
    generations = searched or admit(service, request_id, choices, request, arrived=arrived, shown_special_ids=shown)
    thinking = isinstance(request.input, Chat) and _thinks(service, prepared.prompts[0].ids)
    return Running(request_id, request, generations, use, thinking)


async def checked(service: Service, read: Read[Any]) -> list[tuple[TokenizedPrompt, SamplingParams]]:
    """Each sequence of a request as it is to run, or a RequestError. Asks for no room, in the queue or elsewhere."""
    with in_words_of(read.body):
        return await _checked(service, *read.ready)


async def _checked(
    service: Service, request: GenerationRequest, prepared: Prepared
) -> list[tuple[TokenizedPrompt, SamplingParams]]:
    grammar = None if prepared.constraint is None else await compiled(service, prepared.constraint)
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
        if prompt.documents:
            check_documents(prompt.documents, len(prompt.ids), max_tokens, info)
        bad = prepared.bad_token_ids
        for index in range(request.n):
            params = sampling_params(service, request, max_tokens, index=index, grammar=grammar, bad_token_ids=bad)
            if request.beams:
                check_search(request.beams.width, prompt, params)
            choices.append((prompt, params))
    return choices


def _thinks(service: Service, ids: Sequence[int]) -> bool:
    """Whether a prompt ends within thoughts: some templates begin them."""
    end = service.tokenizer.decode(list(ids[-TAIL:]), skip_special_tokens=False)
    return end.rstrip().endswith(BEGIN)


def new_id(prefix: str) -> str:
    """The id of a reply, unique here and elsewhere."""
    return f"{prefix}-{uuid.uuid4().hex}"


def positions_of(service: Service, rope: RopeSpec | None) -> ModelPositions | None:
    """The position method that a request chose; None is the deployment's."""
    if rope is None:
        return None
    if not service.settings.rope_per_request:
        raise InvalidRequest(
            "'rope' is not allowed: this server reads positions one way for all requests; "
            "ROPE_PER_REQUEST=true lets a request choose",
            param="rope",
        )
    return service.engine.resolve_positions(rope)


def sampling_params(
    service: Service,
    request: GenerationRequest,
    max_tokens: int,
    *,
    index: int = 0,
    grammar: CompiledGrammar | None = None,
    bad_token_ids: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """The engine's parameters of one choice; the choices of one request draw from seeds of their own."""
    fields, output = request.sampling, request.output
    if fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {fields.min_tokens}, more than the {max_tokens} tokens to generate at most (max_tokens)",
            param="min_tokens",
        )
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        check_vocabulary(list(getattr(fields, name) or ()), service.engine.info.vocab_size, name)
    defaults = service.sampling_defaults
    temperature = _given(fields.temperature, defaults.temperature)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=max(_given(fields.top_p, defaults.top_p), LEAST_TOP_P),
        top_k=max(_given(fields.top_k, defaults.top_k), 0),
        min_p=_given(fields.min_p, defaults.min_p),
        repetition_penalty=_given(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
        stop_token_ids=frozenset(fields.stop_token_ids),
        allowed_token_ids=None if fields.allowed_token_ids is None else tuple(fields.allowed_token_ids),
        bad_token_ids=bad_token_ids,
        ignore_eos=fields.ignore_eos,
        seed=None if fields.seed in (None, NO_SEED) else (fields.seed + index) % SEEDS,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        grammar=grammar,
    )


def _given(asked: N | None, default: N) -> N:
    return default if asked is None else asked


def prefix_salt(service: Service, tenant: str, cache_salt: str) -> str:
    """The salt within which prefixes are shared: the key's and the request's. `tenant`: a digest of a fixed length."""
    return f"{tenant}{cache_salt}" if service.settings.prefix_sharing == "key" else cache_salt


def _priority(service: Service, asked: int) -> int:
    """The priority that a request asks for; InvalidRequest where it may not choose one."""
    allowed = service.settings.priority_per_request
    if asked and not (not service.settings.asks_for_key if allowed is None else allowed):
        raise InvalidRequest(
            "'priority' is not allowed: with API keys, requests are served in the order in which they come; "
            "PRIORITY_PER_REQUEST=true lets a request choose its place",
            param="priority",
            code="priority_not_allowed",
        )
    return asked


def admit(
    service: Service,
    request_id: str,
    prompts: Sequence[tuple[TokenizedPrompt, SamplingParams]],
    request: GenerationRequest,
    *,
    arrived: float,
    shown_special_ids: frozenset[int] = frozenset(),
) -> list[Generation]:
    """Submit one sequence for each pair of prompt and parameters. `arrived` is of `time.perf_counter()`."""
    hold = current_hold()
    hold.count(len(prompts))
    sequences = engine_requests(service, request_id, prompts, request, arrived=arrived)
    generations = [
        Generation(service, sequence, outputs, request, arrived, shown_special_ids)
        for sequence, outputs in zip(sequences, service.engine.submit(sequences), strict=True)
    ]
    hold.close_at_end(generations)
    return generations


def engine_requests(
    service: Service,
    request_id: str,
    prompts: Sequence[tuple[TokenizedPrompt, SamplingParams]],
    request: GenerationRequest,
    *,
    arrived: float,
) -> list[EngineRequest]:
    """One sequence for each pair of prompt and parameters, as the engine takes them."""
    positions = positions_of(service, request.rope)
    deadline = math.inf
    if request.timeout_s is not None:
        deadline = time.monotonic() - (time.perf_counter() - arrived) + request.timeout_s
    salt = prefix_salt(service, current_hold().tenant, request.cache_salt)
    return [
        EngineRequest(
            request_id=f"{request_id}-{index}",
            prompt_token_ids=prompt.ids,
            sampling=sampling,
            positions=positions,
            cache_salt=salt,
            priority=_priority(service, request.priority),
            report_progress=request.output.report_progress,
            deadline=deadline,
            documents=prompt.documents,
            speculation=request.speculation,
        )
        for index, (prompt, sampling) in enumerate(prompts)
    ]
