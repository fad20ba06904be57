"""The engine: requests in, tokens out, one `step()` at a time. Synchronous and single-threaded.

    add → waiting → schedule() → [(sequence, num_new_tokens)] → launch: Batch → Model.forward → sample
                                                                collect: tokens → TokenOutput

Where steps overlap, a step is launched before the tokens of the one before it are collected: the device has its next
work while the host reads, tells and schedules. What the device does not know yet of a step it takes from the step
before; sequences whose next token takes more than that (`Sequence.chosen_on_host`) are collected at once.

Knows token ids only: text, HTTP and metrics are the caller's.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.blocks.documents import filled_from, next_copied
from prerope.cache.storage import KVStorage
from prerope.cache.tier import TierStats
from prerope.cache.transfer import send
from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.byte_cache import ByteCache
from prerope.server.config import EngineConfig
from prerope.server.engine.documents import DocumentReader
from prerope.server.engine.graphs.decode import DecodeGraphs
from prerope.server.engine.limits import Counters, EngineStats, GraphStats, model_info, too_late
from prerope.server.engine.memory.sizing import CacheSize
from prerope.server.engine.outputs import FinishReason, TokenLogprobs, TokenOutput
from prerope.server.engine.sampling.mask import advance, wait_for_masks
from prerope.server.engine.scheduler import Scheduler
from prerope.server.engine.selection import check_request
from prerope.server.engine.sequence import EngineRequest, Sequence
from prerope.server.engine.step import Scheduled, Step, Verification, chunks_of, finish_launch
from prerope.server.engine.tiers import Tiers
from prerope.server.errors import InvalidRequest, RequestError
from prerope.server.models.model import Chunk, Model, build_batch, resolve
from prerope.server.ranks.orders import tell_copy, tell_end, tell_step
from torch import Tensor

MAX_RESOLVED_BYTES = 32 * 2**20


class Engine:
    """One model, one cache, one scheduler."""

    def __init__(self, model: Model, config: EngineConfig, positions: ModelPositions, size: CacheSize) -> None:
        self.model, self.ranks, self._alone = model, model.raw.ranks, model.raw.ranks.alone
        self.config = config
        self.storage = KVStorage(
            [layer.shape for layer in model.layers],
            size.num_blocks,
            config.block_size,
            size.dtype,
            model.device,
            model.states,
            size.num_states,
            bounded=config.rope.select is not None,
        )
        # A recurrent state that has read a wrong draft cannot be taken back, so such models do not speculate.
        self.scheduler = Scheduler.of(config, size, speculates=config.speculation != "off" and not model.states)
        self.info = model_info(model, config, positions, size)
        on_gpu = model.device.type == "cuda"
        self._overlap = on_gpu if config.overlap is None else config.overlap
        self._sample_on_device = on_gpu or self._overlap
        # A step's CPU time leaves out what else the machine does. On a device, or of several ranks, it is not known.
        self._steps_take_cpu_time = not (on_gpu or self._overlap) and self._alone
        self.graphs: DecodeGraphs | None = None
        self._no_graphs = "they are for a GPU, and captured when an engine is loaded"
        self.tiers: Tiers | None = None
        self._in_flight: Step | None = None
        self._plan: list[Scheduled] = []
        self._state_bytes = size.state_bytes
        self.resolved: ByteCache[RopeSpec, ModelPositions] = ByteCache(MAX_RESOLVED_BYTES)
        self._counters = Counters()
        self._told_at = 0  # so many blocks in use are told to the storage

    def take_graphs(self, graphs: DecodeGraphs | str) -> None:
        """Decode steps are replayed from now on, or, where it is a reason, are not."""
        self.graphs, self._no_graphs = (None, graphs) if isinstance(graphs, str) else (graphs, "")

    # --- requests ---

    def resolve_positions(self, spec: RopeSpec) -> ModelPositions:
        """A request's own position method; the same object for the same spec. Raises InvalidRequest."""
        if spec == self.config.rope:
            return self.info.positions
        check_request(spec, self.config.rope)
        found = self.resolved.get(spec)
        if found is None:
            found = resolve(
                self.model, spec, self.info.max_model_len, partial(InvalidRequest, param="rope", code="bad_rope")
            )
            self.resolved.put(spec, found, found.max_bytes)
        return found

    def add(self, request: EngineRequest) -> None:
        """Queue a request that is within all limits: its caller has seen to that, once, by `engine.limits`."""
        sampling = request.sampling
        assert 0 < len(request.prompt_token_ids) <= self.info.max_model_len - sampling.max_tokens
        positions = request.positions or self.info.positions
        sequence = Sequence.from_request(request, positions, self.config.block_size, self.config.request_timeout_s)
        if self.tiers is not None:
            self.tiers.ask(sequence)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> TokenOutput | None:
        """Forget a request and release its blocks now; its last output, or None where there is no such request."""
        sequence = self.scheduler.remove(request_id)
        return sequence.output(finish_reason=FinishReason.ABORT) if sequence else None

    def abort_all(self, reason: RequestError) -> list[tuple[str, TokenOutput]]:
        """Abort everything: what has generated something ends with that, and the rest fails with `reason`."""
        return [(sequence.request_id, self._cut(sequence, reason)) for sequence in self.scheduler.sequences]

    def close(self) -> None:
        """Write what the tiers are still to get, and let the other ranks end."""
        if self.tiers is not None:
            self.tiers.tier.close()
        if not self._alone:
            tell_end(self.ranks)

    def has_work(self) -> bool:
        """Whether `step` has something to do: sequences, or a step that is still to be collected."""
        return self.scheduler.has_work() or self._in_flight is not None

    # --- the step ---

    def step(self) -> list[tuple[str, TokenOutput]]:
        """Launch a step and collect it, or the one before it; (request id, output) of every request that has news."""
        began = time.monotonic()
        cpu_began = time.thread_time() if self._steps_take_cpu_time else None
        outputs = self._abort_expired(began)
        sequences = self.scheduler.sequences
        if any(sequence.matcher is not None for sequence in sequences):
            wait_for_masks(sequences)
        if self.tiers is not None:
            self.tiers.take_in(self.scheduler.waiting.values())
        before, plan = self._in_flight, self.scheduler.schedule()
        self._plan = plan
        copies = self.scheduler.take_copies()  # also where there are no rows
        for copy in copies:
            if not self._alone:
                tell_copy(self.ranks, copy.slots)
            self.copy(copy.slots)
        self._in_flight = self._launch(plan, before, began, cpu_began) if plan else None
        if before is not None:
            outputs += self._collect(before)
        if self._in_flight is not None and not (self._overlap and self._in_flight.may_stay):
            now, self._in_flight = self._in_flight, None
            outputs += self._collect(now)
        idle = not plan and not copies and before is None and self.scheduler.has_work()
        if self.tiers is not None and idle:
            self.tiers.wait()
        return outputs

    def _abort_expired(self, now: float) -> list[tuple[str, TokenOutput]]:
        expired = [sequence for sequence in self.scheduler.sequences if now >= sequence.deadline]
        return [(sequence.request_id, self._cut(sequence, too_late(sequence, now))) for sequence in expired]

    def _cut(self, sequence: Sequence, reason: RequestError) -> TokenOutput:
        self.scheduler.remove(sequence.request_id)
        failure = None if sequence.num_generated_tokens else reason
        return sequence.output(finish_reason=FinishReason.ABORT, failure=failure)

    @torch.inference_mode()
    def _launch(self, plan: list[Scheduled], before: Step | None, began: float, cpu_began: float | None) -> Step:
        if (num_touched := self.scheduler.cache.pool.num_touched) >= self._told_at:
            self._told_at = self.storage.expect(num_touched)
        logits = self._forward(plan, None if before is None else before.arrival.tokens)
        on_device, ends = self._sample_on_device, self.info.eos_token_ids
        return finish_launch(plan, logits, ends, on_device=on_device, began=began, cpu_began=cpu_began)

    def _forward(self, plan: list[Scheduled], sampled: Tensor | None) -> Tensor:
        """Logits of the plan's rows; `sampled` are the tokens of the step in flight, if there is one."""
        chunks = chunks_of(plan, self.config.block_size, single=self.model.device.type != "cpu")
        if self._alone:
            return self.compute(chunks, sampled)
        tell_step(self.ranks, chunks)
        return self.compute(chunks, sampled, handed_on=any(chunk.pending_place is not None for chunk in chunks))

    # --- what all ranks do ---

    def compute(self, chunks: list[Chunk], sampled: Tensor | None, *, handed_on: bool = False) -> Tensor:
        """Logits of the chunks' rows. handed_on: rank 0 alone knows all ids, on the device."""
        batch = build_batch(chunks, self.config.block_size, self.model.device, sampled)
        if handed_on:
            self.ranks.hand_on(batch.input_ids)
        logits = None if self.graphs is None else self.graphs.logits(batch)
        return self.model.forward(batch, self.storage) if logits is None else logits

    @torch.inference_mode()
    def copy(self, slots: NDArray[np.int64]) -> None:
        """K and V of all layers from slots [0] to slots [1]."""
        self.storage.copy(*send(slots, self.model.device))

    def _collect(self, step: Step) -> list[tuple[str, TokenOutput]]:
        """What a step's tokens mean for its sequences, those left out that have finished or gone since its launch."""
        outputs: list[tuple[str, TokenOutput]] = []
        filled: list[tuple[int, bytes]] = []
        tokens = iter(step.arrival.wait())
        for one in step.scheduled:
            token = next(tokens) if one.samples else None
            outputs += self._collect_rows(one, token, step.scored.get(one.sequence), filled)
            if one.drafts and token is not None:
                outputs += self._verify(one, token, step.verifications[one.sequence], filled)
        if self.tiers is not None:
            self.tiers.keep(filled)
        rows = step.rows
        seconds = self._end_step(step, rows.num_prefilled)
        own_s = seconds if step.cpu_began is None else time.thread_time() - step.cpu_began
        self.scheduler.learn(rows, seconds, own_s)
        return outputs

    def _end_step(self, step: Step, num_prefilled: int) -> float:
        """Count a step that is over; its seconds, which begin when the step before it ends, where steps overlap."""
        counters, now = self._counters, time.monotonic()
        seconds = now - max(step.began, counters.last_end)
        counters.num_steps += 1
        counters.last_step_s, counters.last_end = seconds, now
        if num_prefilled >= 64 and seconds > 0:  # a rate that a few tokens would distort
            more = num_prefilled / seconds - counters.prefill_tokens_per_s
            counters.prefill_tokens_per_s += more * (0.2 if counters.prefill_tokens_per_s else 1)
        return seconds

    def _collect_rows(
        self, one: Scheduled, token: int | None, scored: TokenLogprobs | None, filled: list[tuple[int, bytes]]
    ) -> list[tuple[str, TokenOutput]]:
        """The outputs of one sequence's rows without drafts. New blocks that they filled are added to `filled`."""
        sequence, stop = one.sequence, one.stop
        processed = min(stop, sequence.num_prompt_tokens)
        self._counters.prompt_tokens += max(0, processed - one.start)
        if not self.scheduler.holds(sequence):
            return []
        sequence.num_processed_tokens = processed
        if one.cached:
            documents = sequence.request.documents
            first = filled_from(documents, one.start) if documents else one.start
            known = self.scheduler.cache.remember(sequence, first, stop)
            # Behind a document that was copied, only the very same prompt could use it.
            filled += known if not documents or stop <= next_copied(documents, 0, stop) else ()
        if isinstance(sequence, DocumentReader):
            return sequence.progress()
        if token is not None:
            return [self._take(sequence, token, scored)]
        if stop == sequence.num_tokens:
            return [self._finish(sequence, (), None, FinishReason.LENGTH)]
        return [(sequence.request_id, sequence.output())] if sequence.request.report_progress else []

    @torch.inference_mode()
    def _verify(
        self, one: Scheduled, token: int, verification: Verification, filled: list[tuple[int, bytes]]
    ) -> list[tuple[str, TokenOutput]]:
        """What follows `token`, as far as the drafts are what was chosen; K and V of the others are written over."""
        outputs: list[tuple[str, TokenOutput]] = []
        sequence = one.sequence
        self._counters.num_drafts += 1
        self._counters.drafted_tokens += len(one.drafts)
        for number, draft in enumerate(one.drafts):
            if token != draft or not self.scheduler.holds(sequence):
                break
            found = verification.next()
            if found is None:  # its row is computed again once its mask is there, so this draft has brought nothing
                break
            sequence.num_accepted += 1
            self._counters.accepted_tokens += 1
            sequence.num_computed_tokens += 1
            token, scored = found
            outputs += self._collect_rows(one.behind(number), token, scored, filled)
        verification.end()
        if self.scheduler.holds(sequence):
            self.scheduler.cache.trim(sequence)
        return outputs

    def _take(self, sequence: Sequence, token: int, scored: TokenLogprobs | None) -> tuple[str, TokenOutput]:
        """A sampled token, and whether the sequence ends with it."""
        sequence.append(token)
        self._counters.generation_tokens += 1
        matcher = sequence.matcher
        if matcher is not None and (failure := advance(matcher, token, self.info.eos_token_ids)):
            self.scheduler.remove(sequence.request_id)
            return sequence.request_id, sequence.output(finish_reason=FinishReason.ABORT, failure=failure)
        logprobs = None if scored is None else (scored,)
        reason = sequence.finish_reason(token, self.info.eos_token_ids)
        if reason is not None:
            return self._finish(sequence, (token,), logprobs, reason)
        return sequence.request_id, sequence.output((token,), logprobs=logprobs)

    def _finish(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        scored: tuple[TokenLogprobs, ...] | None,
        reason: FinishReason,
    ) -> tuple[str, TokenOutput]:
        output = sequence.output(token_ids, logprobs=scored, finish_reason=reason)
        self.scheduler.remove(sequence.request_id)
        return sequence.request_id, output

    # --- what callers watch ---

    def stats(self) -> EngineStats:
        scheduler, counters = self.scheduler, self._counters
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
            state_bytes=self._state_bytes,
            num_steps=counters.num_steps,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            num_drafts=counters.num_drafts,
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=counters.accepted_tokens,
            prefix_queried_tokens=cache.queried_tokens,
            prefix_hit_tokens=cache.hit_tokens,
            tiers=TierStats() if self.tiers is None else replace(self.tiers.tier.stats),
            graphs=GraphStats(why_none=self._no_graphs) if self.graphs is None else self.graphs.stats,
            last_step_s=counters.last_step_s,
            prefill_tokens_per_s=counters.prefill_tokens_per_s,
        )

    @property
    def under_way(self) -> dict[str, int]:
        """The step that was scheduled last, in numbers for people. For any thread.

        longest: how many tokens its longest sequence has by then.
        """
        plan = self._plan
        return {
            "step": self._counters.num_steps + 1,
            "sequences": len(plan),
            "rows": sum([one.num_rows for one in plan]),
            "prompt_rows": sum([one.num_new_tokens for one in plan if one.num_new_tokens > 1]),
            "longest": max([one.stop for one in plan], default=0),
        }

    def check_integrity(self) -> None:
        """Assert that blocks, tables and sequences agree."""
        self.scheduler.check_integrity()
