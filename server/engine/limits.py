"""Why a request is not run: it can never fit, there is no room for it now, or its time is over.

Errors name the limit, the value given and the remedy. Nothing here reads what a step changes.
"""

from __future__ import annotations

import math

from prerope.cache.blocks.documents import largest_reading
from prerope.server.config import EngineConfig
from prerope.server.engine.info import Backlog, ModelInfo
from prerope.server.engine.sequence import EngineRequest, Sequence
from prerope.server.errors import DeadlineExceeded, InvalidRequest, QueueFull

ASSUMED_PREFILL_RATE = 1000.0
"""Tokens a second for Retry-After, until a prefill has been measured."""


def check_fits(request: EngineRequest, info: ModelInfo) -> None:
    """InvalidRequest for what can never run: no tokens, unknown ones, or more than the model or the cache takes."""
    ids, max_tokens = request.prompt_token_ids, request.sampling.max_tokens
    if not ids:
        raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt", code="empty_prompt")
    low, high = min(ids), max(ids)
    if low < 0 or high >= info.vocab_size:
        raise InvalidRequest(
            f"token id {low if low < 0 else high} in the prompt is outside the vocabulary: ids go from 0 to "
            f"{info.vocab_size - 1}",
            param="prompt",
            code="bad_token_id",
        )
    reading = largest_reading(request.documents, 0)
    if reading and len(ids) + max_tokens + reading > info.num_cache_tokens:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens, max_tokens is {max_tokens}, and the longest document, read on its own "
            f"behind the prefix, takes {reading} tokens meanwhile, together {len(ids) + max_tokens + reading}: the "
            f"cache holds {info.num_cache_tokens}; shorten or split it, or raise KV_CACHE_MEMORY",
            param="documents",
            code="context_length_exceeded",
        )
    limits = (
        (info.max_model_len, "the limit is {}", "MAX_MODEL_LEN"),
        (info.num_cache_tokens, "the cache holds {}", "KV_CACHE_MEMORY"),
    )
    for limit, said, setting in limits:
        if len(ids) + max_tokens > limit:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}, together {len(ids) + max_tokens}: "
                f"{said.format(limit)}; shorten either, or raise {setting}",
                param="prompt" if len(ids) >= limit else "max_tokens",
                code="context_length_exceeded",
            )


def check_room(
    config: EngineConfig, backlog: Backlog, num_prompt_tokens: int, num_sequences: int, prefill_rate: float
) -> None:
    """Room for a request's sequences, whose prompts have `num_prompt_tokens` together, behind those that wait.

    QueueFull where a limit is passed; InvalidRequest where it would be in an empty queue, too. (By its tokens a single
    prompt never is: alone it may wait.) `prefill_rate` in tokens a second, 0 until it has been measured.
    """
    max_requests, max_tokens = config.max_queued_requests, config.max_queued_tokens
    if num_sequences > max_requests or (num_sequences > 1 and num_prompt_tokens > max_tokens):
        raise InvalidRequest(
            f"the request has {num_sequences} sequences (prompts times choices) and {num_prompt_tokens} prompt tokens "
            f"in all: the queue takes {max_requests} sequences (MAX_QUEUED_REQUESTS) and {max_tokens} tokens "
            "(MAX_QUEUED_TOKENS); send smaller requests",
            code="too_many_sequences",
        )
    if backlog.num_waiting + num_sequences > max_requests:
        reason = f"{backlog.num_waiting} requests are waiting and {num_sequences} more would pass "
        reason += f"MAX_QUEUED_REQUESTS, {max_requests}"
    elif backlog.num_waiting and backlog.num_waiting_tokens + num_prompt_tokens > max_tokens:
        reason = f"{backlog.num_waiting_tokens} prompt tokens are waiting and {num_prompt_tokens} more would pass "
        reason += f"MAX_QUEUED_TOKENS, {max_tokens}"
    else:
        return
    seconds = retry_after_s(backlog, prefill_rate)
    raise QueueFull(f"the queue is full: {reason}; try again in about {seconds} s", retry_after_s=seconds)


def retry_after_s(backlog: Backlog, prefill_rate: float) -> int:
    """Seconds until what waits and what runs is read, at `prefill_rate` tokens a second; at least 1."""
    remaining = backlog.num_waiting_tokens + backlog.num_running_tokens
    return max(1, math.ceil(remaining / (prefill_rate or ASSUMED_PREFILL_RATE)))


def too_late(sequence: Sequence, now: float) -> DeadlineExceeded:
    """For a sequence without a token at `now`, in seconds of `time.monotonic()`."""
    return DeadlineExceeded(
        f"the request's time was over after {now - sequence.arrived_at:.1f} s, before its first token: "
        f"{sequence.num_processed_tokens} of {sequence.num_prompt_tokens} prompt tokens were read; allow more time "
        "(timeout_s, REQUEST_TIMEOUT_S), shorten the prompt, or try again when less is waiting",
        code="deadline_exceeded",
    )
