"""What callers may know of a loaded engine: the model's limits, and counters."""

from __future__ import annotations

from dataclasses import dataclass

from rope.model_positions import ModelPositions


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a caller may know of the loaded model. Lengths in tokens."""

    max_model_len: int
    train_length: int
    vocab_size: int
    num_cache_tokens: int
    eos_token_ids: frozenset[int]
    dtype: str
    device: str
    positions: ModelPositions


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is before a new request: waiting sequences, and tokens still to be computed of them and of running ones."""

    num_waiting: int
    num_waiting_tokens: int
    num_running_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters are totals. Free blocks can be allocated now; cached ones hold a known prefix.

    num_running_tokens and num_waiting_tokens are those whose K and V are still to be computed.
    """

    num_running: int
    num_running_tokens: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    last_step_s: float
    prefill_tokens_per_s: float
