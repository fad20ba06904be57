"""What callers may know of a loaded engine (what it is, and its statistics), and what it refuses a request for.

Each limit of a request is one function and is checked once, before the request is queued; whoever queues trusts that.
Those of a text, vocabulary and length, are `api.requests.reading.ModelText`'s. Errors name the limit, the value given
and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prerope.cache.blocks.documents import DocumentSpan, longest_readings
from prerope.server.errors import TOO_LONG, ConfigurationError, DeadlineExceeded, InvalidRequest, QueueFull

if TYPE_CHECKING:
    from prerope.cache.tier import TierStats
    from prerope.rope.model import ModelPositions
    from prerope.server.config import EngineConfig
    from prerope.server.engine.memory.sizing import CacheSize
    from prerope.server.engine.sequence import Sequence
    from prerope.server.models.model import Model


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


def model_info(model: Model, config: EngineConfig, positions: ModelPositions, size: CacheSize) -> ModelInfo:
    return ModelInfo(
        max_model_len=size.max_model_len,
        train_length=positions.methods[positions.main].train_length,
        vocab_size=model.vocab_size,
        num_cache_tokens=size.num_blocks * config.block_size,
        block_size=config.block_size,
        eos_token_ids=model.eos_token_ids,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        positions=positions,
        recurrent=bool(model.states),
    )


@dataclass(slots=True)
class Counters:
    """What an engine counts as it steps: totals, and the time of its steps, the last of which ended at `last_end`."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    last_step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    last_end: float = 0.0


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


def check_documents(spans: Several[DocumentSpan], num_tokens: int, max_tokens: int, info: ModelInfo) -> None:
    """InvalidRequest where a prompt of so many tokens and the reader of its longest document do not fit the cache.

    Or where a model's recurrent layers have all that stands before a token in one state, which cannot be copied there.
    """
    reading = longest_readings(spans)[0]
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


def check_sequences(config: EngineConfig, num_sequences: int, num_prompt_tokens: int) -> None:
    """InvalidRequest where an empty queue has no room for a request (by its tokens: of several sequences)."""
    max_requests, max_tokens = config.max_queued_requests, config.max_queued_tokens
    if num_sequences > max_requests or (num_sequences > 1 and num_prompt_tokens > max_tokens):
        raise InvalidRequest(
            f"the request has {num_sequences} sequences (prompts times choices) and {num_prompt_tokens} prompt tokens "
            f"in all: the queue takes {max_requests} sequences (MAX_QUEUED_REQUESTS) and {max_tokens} tokens "
            "(MAX_QUEUED_TOKENS); send smaller requests",
            code="too_many_sequences",
        )


def check_room(config: EngineConfig, stats: EngineStats, num_prompt_tokens: int, num_sequences: int) -> None:
    """QueueFull where a request's sequences, whose prompts have `num_prompt_tokens` together, have no room behind those
    that wait; beside what `check_sequences` raises."""
    check_sequences(config, num_sequences, num_prompt_tokens)
    max_requests, max_tokens = config.max_queued_requests, config.max_queued_tokens
    if stats.num_waiting + num_sequences > max_requests:
        reason = f"{stats.num_waiting} requests are waiting and {num_sequences} more would pass "
        reason += f"MAX_QUEUED_REQUESTS, {max_requests}"
    elif stats.num_waiting and stats.num_waiting_tokens + num_prompt_tokens > max_tokens:
        reason = f"{stats.num_waiting_tokens} prompt tokens are waiting and {num_prompt_tokens} more would pass "
        reason += f"MAX_QUEUED_TOKENS, {max_tokens}"
    else:
        return
    seconds = retry_after_s(stats)
    raise QueueFull(f"the queue is full: {reason}; try again in about {seconds} s", retry_after_s=seconds)


def retry_after_s(stats: EngineStats) -> int:
    """Seconds until what waits and what runs is read, at the measured rate; at least 1."""
    remaining = stats.num_waiting_tokens + stats.num_running_tokens
    return max(1, math.ceil(remaining / (stats.prefill_tokens_per_s or ASSUMED_PREFILL_RATE)))


def too_late(sequence: Sequence, now: float) -> DeadlineExceeded:
    """For a sequence without a token at `now`, in seconds of `time.monotonic()`."""
    return DeadlineExceeded(
        f"the request's time was over after {now - sequence.arrived_at:.1f} s, before its first token: "
        f"{sequence.num_processed_tokens} of {sequence.num_prompt_tokens} prompt tokens were read; allow more time "
        "(timeout_s, REQUEST_TIMEOUT_S), shorten the prompt, or try again when less is waiting",
        code="deadline_exceeded",
    )
