"""What callers may know of a loaded engine (its limits and its statistics), and what a request is refused by.

Each limit of a request is one function: vocabulary, length, room in the queue, time. Each is checked once, before a
request is queued; whoever queues trusts that. Errors name the limit, the value given and the remedy. Only `take_stats`
reads what a step changes. Imports no torch by itself: workers check by these limits, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prerope.cache.blocks.documents import DocumentSpan, largest_reading
from prerope.server.errors import ConfigurationError, DeadlineExceeded, InvalidRequest, QueueFull

if TYPE_CHECKING:
    from prerope.cache.tier import TierStats
    from prerope.rope.model import ModelPositions
    from prerope.server.config import EngineConfig
    from prerope.server.engine.scheduler import Scheduler
    from prerope.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a caller may know of the loaded model. Lengths in tokens.

    recurrent: layers keep a state of the whole sequence beside keys and values.
    """

    max_model_len: int
    train_length: int
    vocab_size: int
    num_cache_tokens: int
    block_size: int
    eos_token_ids: frozenset[int]
    dtype: str
    device: str
    positions: ModelPositions
    recurrent: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is before a new request: waiting sequences, and tokens still to be computed of them and of running ones."""

    num_waiting: int
    num_waiting_tokens: int
    num_running_tokens: int = 0


@dataclass(slots=True)
class Counters:
    """What an engine counts as it steps: totals, and the time of its steps."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    last_step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    _last_end: float = 0.0

    def end_step(self, began: float, num_prefilled: int) -> float:
        """A step launched at `began` is over. Returns its seconds: where steps overlap, they begin when the one before
        it ends."""
        now = time.monotonic()
        seconds = now - max(began, self._last_end)
        self.num_steps += 1
        self.last_step_s, self._last_end = seconds, now
        if num_prefilled >= 64 and seconds > 0:  # a rate that a few tokens would distort
            more = num_prefilled / seconds - self.prefill_tokens_per_s
            self.prefill_tokens_per_s += more * (0.2 if self.prefill_tokens_per_s else 1)
        return seconds


@dataclass(frozen=True, slots=True)
class GraphStats:
    """CUDA graphs of decode steps: how many there are, and for how many kinds of step none could be captured.

    why_none: why there are none, or none for the first such kind; empty where nothing is amiss.
    """

    num_captured: int = 0
    num_refused: int = 0
    why_none: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters are totals. Free blocks can be allocated now; cached ones hold a known prefix.

    num_states and the two after it count slots for states of recurrent layers, likewise; state_bytes is all of them.

    num_running_tokens and num_waiting_tokens are those whose K and V are still to be computed. num_drafts are rows of
    drafts, of one sequence in one step each; drafted and accepted tokens are their members.
    """

    num_running: int
    num_running_tokens: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_states: int
    num_free_states: int
    num_cached_states: int
    state_bytes: int
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    num_drafts: int
    drafted_tokens: int
    accepted_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    tiers: TierStats
    graphs: GraphStats
    last_step_s: float
    prefill_tokens_per_s: float


def take_stats(
    scheduler: Scheduler, counters: Counters, tiers: TierStats, graphs: GraphStats, state_bytes: int
) -> EngineStats:
    cache, pool = scheduler.cache, scheduler.cache.pool
    states = None if cache.states is None else cache.states.pool
    return EngineStats(
        num_running=len(scheduler.running),
        num_running_tokens=sum([s.num_remaining_tokens for s in scheduler.running.values()]),
        num_waiting=len(scheduler.waiting),
        num_waiting_tokens=sum([s.num_remaining_tokens for s in scheduler.waiting.values()]),
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_states=0 if states is None else states.num_blocks,
        num_free_states=0 if states is None else states.num_free,
        num_cached_states=0 if states is None else states.num_cached,
        state_bytes=state_bytes,
        num_steps=counters.num_steps,
        num_preemptions=scheduler.num_preemptions,
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        num_drafts=counters.num_drafts,
        drafted_tokens=counters.drafted_tokens,
        accepted_tokens=counters.accepted_tokens,
        prefix_queried_tokens=cache.queried_tokens,
        prefix_hit_tokens=cache.hit_tokens,
        tiers=tiers,
        graphs=graphs,
        last_step_s=counters.last_step_s,
        prefill_tokens_per_s=counters.prefill_tokens_per_s,
    )


TOO_LONG = "context_length_exceeded"
"""The code of a refusal for want of room in the model's length."""

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
        code=TOO_LONG,
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
            code=TOO_LONG,
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
