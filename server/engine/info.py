"""What callers may know of a loaded engine: the model's limits, and counters."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prerope.cache.tier import TierStats
from prerope.rope.model import ModelPositions

if TYPE_CHECKING:
    from prerope.server.engine.scheduler import Scheduler


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
