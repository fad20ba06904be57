"""From a request over HTTP to running generations: the one way that every generating endpoint takes.

    body_of ─ Read: the body, checked, lowered and tokenised ─ start ─ Running: generations

    async def endpoint(read: Annotated[Read[Body], Depends(body_of(Body))], request: Request, service: ReadyService):
        running = await start(service, read, "cmpl", arrived)
        replies = await read_all(request, running.generations)            whole
        async with in_turn(running.generations) as pieces: …              as a stream

Small bodies are read where they came, larger ones by a worker. What reading takes grows with the body, by a client's
choice of what is in it up to ten microseconds a byte, and most of it with the interpreter's lock held: on the event
loop or a thread it would stop every stream.

Everything that can be refused is refused in `start`, before a stream has begun: all sequences of a request run, or
none. What a request may ask for beside the limits of `server.engine.limits` is checked here.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.api.beams import BeamSearch, check_search
from prerope.server.api.chat.reasoning import ends_within_thoughts
from prerope.server.api.chat.tools import ToolUse
from prerope.server.api.fairness import TooLong, current_hold, cut_off, turn
from prerope.server.api.openai.schemas import CompletionRequest
from prerope.server.api.requests.body import COMPRESSED, JSON, RequestBody, current_report, in_words_of, kind_of_body
from prerope.server.api.requests.constraints import compiled
from prerope.server.api.requests.documents import TokenizedPrompt
from prerope.server.api.requests.internal import Chat, GenerationRequest
from prerope.server.api.requests.reading import Prepared, Read, read_body
from prerope.server.api.requests.schemas import GenerateRequest
from prerope.server.api.requests.task import Pieces, ReadTask
from prerope.server.api.stream.generation import Generation, while_connected
from prerope.server.engine.limits import check_documents, check_sequences
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.errors import InvalidRequest
from prerope.server.service import Service
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.workers.lanes import INLINE_BYTES, LARGE_BODY, SMALL_BODY

log = structlog.get_logger(__name__)

B = TypeVar("B", bound=RequestBody)

INLINE_ITEMS, INLINE_DIGITS = 160, 1024
"""Beside `INLINE_BYTES`, of a body that is read on the event loop, in two or three milliseconds: a worker takes ten. A
message or a prompt costs for its being there, and tokenizers take long over long numbers."""

OF_TEXT = (CompletionRequest, GenerateRequest)
"""What no chat template has a part in."""

DIGITS = b"0123456789"


async def ready_service(request: Request) -> Service:  # async: FastAPI sends plain functions to a thread
    """The service of an endpoint that needs the model: EngineUnavailable, saying why, unless requests are taken."""
    service: Service = request.app.state.service
    service.engine.require_ready()
    return service


ReadyService = Annotated[Service, Depends(ready_service)]

SMALL_BYTES = 256 * 2**10
"""Bodies up to this size do not wait for larger ones."""


def body_of(
    model: type[B], completed: Callable[[Service, bytes], Pieces] = lambda _, raw: (raw,)
) -> Callable[[Request, ReadyService], Awaitable[Read[B]]]:
    """A dependency: the request's body as a `model`, and what follows from it. Raises what `read_body` raises.

    completed: adds to a body what the server knows of it, which may be much more: it is put together where it is read.
    """

    async def read(request: Request, service: ReadyService) -> Read[B]:
        async with service.bodies.body(request) as came:
            _check_kind(request)
            pieces = completed(service, came)
            raw = _little(pieces) if service.reads_inline or issubclass(model, OF_TEXT) else None
            if raw is None:
                return await _read_by_worker(model, pieces, request, service)
            async with turn():
                try:
                    return cut_off(lambda: read_body(model, raw, service.text))
                except (TooLong, MemoryError):  # such as a chat template that goes round in circles for some chats
                    service.reads_inline = False
                    log.warning(
                        "a little body took long or much memory to read, so all are read by workers from now on"
                    )
            return await _read_by_worker(model, pieces, request, service)

    return read


async def _read_by_worker(model: type[B], pieces: Pieces, request: Request, service: Service) -> Read[B]:
    lane = SMALL_BODY if sum(map(len, pieces)) <= SMALL_BYTES else LARGE_BODY
    report = current_report()
    work = service.workers.run(ReadTask(model, pieces, report.strict), lane.name, line=current_hold().line)
    result: Read[B] = await while_connected(request, work)
    for name in result.ignored:
        report.ignore(name)
    return result


def _little(pieces: Pieces) -> bytes | None:
    """The body, where reading it takes no longer than to ask a worker."""
    if sum(map(len, pieces)) > INLINE_BYTES:
        return None
    raw = b"".join(pieces)
    num_items, num_digits = raw.count(b'"') // 2 + raw.count(b"{"), len(raw) - len(raw.translate(None, DIGITS))
    return raw if num_items <= INLINE_ITEMS and num_digits <= INLINE_DIGITS else None


def _check_kind(request: Request) -> None:
    """JSON, not compressed. What browsers send is to be called so, too: pages of other sites may send text unasked, but
    not this type. Others, such as `curl -d`, need not say what it is."""
    kind, by_browser = kind_of_body(request.headers), "origin" in request.headers or "sec-fetch-site" in request.headers
    if kind == COMPRESSED or (by_browser and kind != JSON):
        complaint = {"type": "dict_type", "loc": ("body",), "msg": "The body must be a JSON object.", "input": None}
        raise RequestValidationError([complaint])


SEEDS = 2**63

NO_SEED = -1
"""What llama.cpp, Ollama, vLLM and the pages before them write where each reply is to be drawn anew."""

GREEDY_BELOW = 1e-4
"""A temperature this low draws the best token anyway, and one much lower would overflow the logits."""

LEAST_TOP_P = 1e-6
"""A top-p this low keeps the best token alone."""

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
    thinking = isinstance(request.input, Chat) and ends_within_thoughts(service.tokenizer, prepared.prompts[0].ids)
    return Running(request_id, request, generations, use, thinking)


async def checked(service: Service, read: Read[Any]) -> list[tuple[TokenizedPrompt, SamplingParams]]:
    """Each sequence of a request as it is to run, or a RequestError. Asks for no room, in the queue or elsewhere."""
    with in_words_of(read.body):
        return await _checked(service, *read.ready)


async def _checked(
    service: Service, request: GenerationRequest, prepared: Prepared
) -> list[tuple[TokenizedPrompt, SamplingParams]]:
    prompts, choices = prepared.prompts, list[tuple[TokenizedPrompt, SamplingParams]]()
    _check_sequences(service, request, [len(one.ids) for one in prompts])
    grammar = None if prepared.constraint is None else await compiled(service, prepared.constraint)
    of_all = sampling_params(service, request, prepared, grammar)
    info, sampling = service.engine.info, request.sampling
    for prompt in prompts:
        if prompt.documents and request.output.prompt_logprobs is not None:
            raise InvalidRequest(
                "log-probabilities of the prompt are not there for documents that were read on their own: leave them "
                "out, or set document_attention to 'full'",
                param="documents",
            )
        max_tokens = service.text.max_tokens_that_fit(len(prompt.ids), sampling.max_tokens, sampling.default_max_tokens)
        if prompt.documents:
            check_documents(prompt.documents, len(prompt.ids), max_tokens, info)
        if of_all.min_tokens > max_tokens:
            raise InvalidRequest(
                f"'min_tokens' is {of_all.min_tokens}, more than the {max_tokens} tokens to generate at most "
                "(max_tokens)",
                param="min_tokens",
            )
        for index in range(request.n):  # each draws from a seed of its own
            seed = None if of_all.seed is None else (of_all.seed + index) % SEEDS
            params = replace(of_all, max_tokens=max_tokens, seed=seed)
            if request.beams:
                check_search(request.beams.width, prompt, params)
            choices.append((prompt, params))
    return choices


def _check_sequences(service: Service, request: GenerationRequest, lengths: Sequence[int]) -> None:
    """Refuse, before they are made, more sequences than an empty queue takes. lengths: of the prompts.

    A search has its beams there at once, however many replies it finds, and prompts are searched one after the other.
    """
    choices = 1 if request.beams else request.n
    count = max(choices * len(lengths), request.beams.width if request.beams else 0)
    if count > 1:  # for a single one there is always room
        check_sequences(service.engine.engine.config, count, choices * sum(lengths))


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
    service: Service, request: GenerationRequest, prepared: Prepared, grammar: CompiledGrammar | None
) -> SamplingParams:
    """The engine's parameters, as all choices of a request have them but for `max_tokens` and their seeds."""
    fields, output = request.sampling, request.output
    defaults = service.sampling_defaults
    temperature = _or_default(fields.temperature, defaults.temperature)
    return SamplingParams(
        max_tokens=0,
        min_tokens=fields.min_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=max(_or_default(fields.top_p, defaults.top_p), LEAST_TOP_P),
        top_k=max(_or_default(fields.top_k, defaults.top_k), 0),
        min_p=_or_default(fields.min_p, defaults.min_p),
        repetition_penalty=_or_default(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
        stop_token_ids=frozenset(fields.stop_token_ids),
        allowed_token_ids=prepared.allowed_token_ids,
        bad_token_ids=prepared.bad_token_ids,
        ignore_eos=fields.ignore_eos,
        seed=None if fields.seed == NO_SEED else fields.seed,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        grammar=grammar,
    )


def _or_default(value: N | None, default: N) -> N:
    return default if value is None else value


def prefix_salt(service: Service, tenant: str, cache_salt: str) -> str:
    """The salt within which prefixes are shared: the key's and the request's. `tenant`: a digest of a fixed length."""
    return f"{tenant}{cache_salt}" if service.settings.prefix_sharing == "key" else cache_salt


def _priority(service: Service, priority: int) -> int:
    """The priority that a request asks for; InvalidRequest where it may not choose one."""
    allowed = service.settings.priority_per_request
    if priority and not (not service.settings.asks_for_key if allowed is None else allowed):
        raise InvalidRequest(
            "'priority' is not allowed: with API keys, requests are served in the order in which they come; "
            "PRIORITY_PER_REQUEST=true lets a request choose its place",
            param="priority",
            code="priority_not_allowed",
        )
    return priority


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
