"""The limits of a request, each in one function: vocabulary, length, room in the queue, time.

Each is checked once, before a request is queued; whoever queues trusts that. Errors name the limit, the value given
and the remedy. Nothing here reads what a step changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from typing import TYPE_CHECKING

from prerope.cache.blocks.documents import DocumentSpan, largest_reading
from prerope.server.errors import ConfigurationError, DeadlineExceeded, InvalidRequest, QueueFull

if TYPE_CHECKING:  # workers, which import no torch, check by these limits too
    from prerope.server.config import EngineConfig
    from prerope.server.engine.info import Backlog, ModelInfo
    from prerope.server.engine.sequence import Sequence

ASSUMED_PREFILL_RATE = 1000.0
"""Tokens a second for Retry-After, until a prefill has been measured."""


def check_ranks(config: EngineConfig, size: int) -> None:
    """ConfigurationError for what several ranks cannot do."""
    import torch  # here, as workers import this module and have none

    if config.tier_dir is not None or config.tier_memory:
        raise ConfigurationError(
            f"TENSOR_PARALLEL_SIZE is {size}, but CACHE_TIER_DIR and CACHE_TIER_MEMORY keep the blocks of one "
            "process; leave them unset, or use TENSOR_PARALLEL_SIZE=1"
        )
    if config.device.startswith("cuda:"):
        raise ConfigurationError(
            f"TENSOR_PARALLEL_SIZE is {size}, but DEVICE is {config.device}, one GPU; use DEVICE=cuda, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if config.device in ("auto", "cuda") and 0 < (found := torch.cuda.device_count()) < size:
        raise ConfigurationError(
            f"TENSOR_PARALLEL_SIZE is {size}, but torch sees {found} GPUs; lower it, or use DEVICE=cpu"
        )


def check_vocabulary(token_ids: Several[int], vocab_size: int, param: str) -> None:
    """InvalidRequest unless every id is in the model's vocabulary. `param` names the request's field."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index, wrong = next((i, token) for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        shown = str(wrong) if abs(wrong) < 10**20 else "beyond 20 digits"
        raise InvalidRequest(
            f"'{param}[{index}]' is {shown}; the model's token ids go from 0 to {vocab_size - 1}",
            param=param,
            code="bad_token_id",
        )


def max_tokens_that_fit(info: ModelInfo, num_prompt_tokens: int, asked: int | None, default: int | None) -> int:
    """Tokens to generate: as asked, or refused; where nothing is asked, the default (None: all that fit), capped."""
    room = info.max_model_len - num_prompt_tokens
    if asked is None and room >= 1:
        return room if default is None else min(default, room)
    if asked is not None and asked <= room:
        return asked
    wanted = "leaves no room to generate" if asked is None else f"max_tokens is {asked}"
    raise InvalidRequest(
        f"the prompt has {_plural(num_prompt_tokens, 'token')} and {wanted}: prompt and output together may have "
        f"{_plural(info.max_model_len, 'token')}; shorten the prompt, lower max_tokens or raise MAX_MODEL_LEN",
        param="prompt" if room < 1 else "max_tokens",
        code="context_length_exceeded",
    )


def check_documents(spans: Several[DocumentSpan], num_tokens: int, max_tokens: int, info: ModelInfo) -> None:
    """InvalidRequest where a prompt of so many tokens and the reader of its longest document do not fit the cache.

    Or where a model's recurrent layers have all that stands before a token in one state, which cannot be copied there.
    """
    reading = largest_reading(spans, 0)
    if reading and info.recurrent:
        raise InvalidRequest(
            "'documents' cannot be read on their own by this model: its recurrent layers keep one state of all that "
            "was read, so a document's keys and values are no use without it; put the documents into the prompt",
            param="documents",
            code="unsupported",
        )
    total = num_tokens + max_tokens + reading
    if reading and total > info.num_cache_tokens:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens, max_tokens is {max_tokens}, and the longest document, read on its "
            f"own behind the prefix, takes {reading} tokens meanwhile, together {total}: the cache holds "
            f"{info.num_cache_tokens}; shorten or split it, or raise KV_CACHE_MEMORY",
            param="documents",
            code="context_length_exceeded",
        )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
