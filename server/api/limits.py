"""From token ids and sampling fields to running generations. Every limit that needs the model is checked here.

Either all sequences of a request are submitted or none: a refusal in the middle aborts those before it.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence

from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.api.auth.allowance import current_lease
from prerope.server.api.requests.documents import TokenizedPrompt
from prerope.server.api.requests.internal import GenerationRequest, Sampling
from prerope.server.api.requests.prompts import check_token_ids
from prerope.server.api.stream.generation import Generation
from prerope.server.engine.sampling.params import SamplingParams
from prerope.server.engine.sequence import EngineRequest
from prerope.server.errors import InvalidRequest
from prerope.server.service import Service
from prerope.server.structured.matcher import CompiledGrammar

SEEDS = 2**63

GREEDY_BELOW = 1e-4
"""A temperature this low draws the best token anyway, and one much lower would overflow the logits."""


def new_id(prefix: str) -> str:
    """The id of a reply, unique here and elsewhere."""
    return f"{prefix}-{uuid.uuid4().hex}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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


def max_tokens_that_fit(service: Service, num_prompt_tokens: int, sampling: Sampling) -> int:
    """Tokens to generate: as asked, or refused; when nothing is asked, the default (None: all that fit), capped."""
    asked, default = sampling.max_tokens, sampling.default_max_tokens
    max_model_len = service.engine.info.max_model_len
    room = max_model_len - num_prompt_tokens
    if asked is None and room >= 1:
        return room if default is None else min(default, room)
    if asked is not None and asked <= room:
        return asked
    wanted = "leaves no room to generate" if asked is None else f"max_tokens is {asked}"
    raise InvalidRequest(
        f"the prompt has {plural(num_prompt_tokens, 'token')} and {wanted}: prompt and output together may have "
        f"{plural(max_model_len, 'token')}; shorten the prompt, lower max_tokens or raise MAX_MODEL_LEN",
        param="prompt" if room < 1 else "max_tokens",
        code="context_length_exceeded",
    )


def sampling_params(
    service: Service,
    request: GenerationRequest,
    max_tokens: int,
    *,
    index: int = 0,
    grammar: CompiledGrammar | None = None,
) -> SamplingParams:
    """The engine's parameters of one choice; the choices of one request draw from seeds of their own."""
    fields, output = request.sampling, request.output
    if fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {fields.min_tokens}, more than the {max_tokens} tokens to generate at most (max_tokens)",
            param="min_tokens",
        )
    check_token_ids(service, fields.stop_token_ids, "stop_token_ids")
    check_token_ids(service, list(fields.logit_bias), "logit_bias")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        temperature=0.0 if fields.temperature < GREEDY_BELOW else fields.temperature,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
        stop_token_ids=frozenset(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos,
        seed=None if fields.seed is None else (fields.seed + index) % SEEDS,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        grammar=grammar,
    )


def prefix_salt(service: Service, tenant: str, cache_salt: str) -> str:
    """Within which prefixes are shared: the key's and the request's own. `tenant` is a digest, of one length."""
    return f"{tenant}{cache_salt}" if service.settings.prefix_sharing == "key" else cache_salt


async def admit(
    service: Service,
    request_id: str,
    prompts: Sequence[tuple[TokenizedPrompt, SamplingParams]],
    request: GenerationRequest,
    *,
    arrived: float,
    shown_special_ids: frozenset[int] = frozenset(),
) -> list[Generation]:
    """Submit one sequence for each pair of prompt and parameters. `arrived` is of `time.perf_counter()`."""
    positions = positions_of(service, request.rope)
    service.engine.check_queue(sum(len(prompt.ids) for prompt, _ in prompts), len(prompts))
    lease = current_lease()
    lease.hold(len(prompts))
    deadline = math.inf
    if request.timeout_s is not None:
        deadline = time.monotonic() - (time.perf_counter() - arrived) + request.timeout_s
    generations: list[Generation] = []
    try:
        for index, (prompt, sampling) in enumerate(prompts):
            sequence = EngineRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=prompt.ids,
                sampling=sampling,
                positions=positions,
                cache_salt=prefix_salt(service, lease.tenant, request.cache_salt),
                priority=request.priority,
                report_progress=request.output.report_progress,
                deadline=deadline,
                documents=prompt.documents,
            )
            generations.append(Generation(service, sequence, request.sampling.stop, arrived, shown_special_ids))
            lease.close_at_end(generations[-1])
    except BaseException:
        for generation in generations:
            await generation.aclose()
        raise
    return generations
