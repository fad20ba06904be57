"""From token ids and sampling fields to running generations, all sequences of a request or none.

What a request may ask for beside the limits of `server.engine.limits` is checked here.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import TypeVar

from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.api.auth.allowance import current_hold
from prerope.server.api.requests.documents import TokenizedPrompt
from prerope.server.api.requests.internal import GenerationRequest
from prerope.server.api.stream.generation import Generation
from prerope.server.engine.limits import check_vocabulary
from prerope.server.engine.sampling.params import SamplingParams
from prerope.server.engine.sequence import EngineRequest
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

N = TypeVar("N", int, float)


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
    """Within which prefixes are shared: the key's and the request's own. `tenant` is a digest, of one length."""
    return f"{tenant}{cache_salt}" if service.settings.prefix_sharing == "key" else cache_salt


def _priority(service: Service, asked: int) -> int:
    """As asked, or refused."""
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
