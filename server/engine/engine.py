"""The engine: requests in, tokens out, one `step()` at a time. Synchronous and single-threaded.

    add → waiting → schedule() → [(sequence, num_new_tokens)] → Batch → Model.forward → sample → TokenOutput

Knows token ids only: text, HTTP and metrics are the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cache.manager import KVCacheManager
from cache.native import prepare
from cache.prefix import PrefixHasher
from cache.storage import KVStorage
from rope.model_positions import ModelPositions, resolve_model
from rope.reading import MethodError
from rope.spec import RopeSpec
from server.engine.batch import Chunk, build_batch
from server.engine.config import EngineConfig
from server.engine.info import Backlog, EngineStats, ModelInfo
from server.engine.model import Model, load_model
from server.engine.outputs import FinishReason, TokenLogprobs, TokenOutput
from server.engine.probe import probe
from server.engine.refusals import check_fits, check_room, retry_after_s, too_late
from server.engine.sampler import logprobs, sample, score_prompt
from server.engine.scheduler import Scheduled, Scheduler
from server.engine.sequence import EngineRequest, Sequence
from server.engine.sizing import CacheSize, size_cache
from server.errors import ConfigurationError, InvalidRequest, RequestError

if TYPE_CHECKING:
    from server.checkpoint import Checkpoint


MAX_RESOLVED_SPECS = 256


class Engine:
    """One model, one cache, one scheduler."""

    def __init__(self, model: Model, config: EngineConfig, positions: ModelPositions, size: CacheSize) -> None:
        self.model = model
        self.config = config
        self.storage = KVStorage(
            [layer.shape for layer in model.layers], size.num_blocks, config.block_size, size.dtype, model.device
        )
        cache = KVCacheManager(size.num_blocks, config.block_size, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(
            cache, max_num_seqs=config.max_num_seqs, max_batched_tokens=config.max_batched_tokens
        )
        self.info = ModelInfo(
            max_model_len=size.max_model_len,
            train_length=positions.methods[positions.main].train_length,
            vocab_size=model.vocab_size,
            num_cache_tokens=cache.num_tokens,
            eos_token_ids=model.eos_token_ids,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            positions=positions,
        )
        self._positions: dict[RopeSpec, ModelPositions] = {}
        self._num_steps = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._last_step_s = 0.0
        self._prefill_tokens_per_s = 0.0

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, config: EngineConfig, report: Callable[[str], None] = lambda _: None
    ) -> Engine:
        """Weights, probe, cache. Raises ConfigurationError; `report` gets a line as each stage begins."""
        if config.max_num_seqs > config.max_batched_tokens:
            raise ConfigurationError(
                f"MAX_NUM_SEQS is {config.max_num_seqs}: it must be at most MAX_BATCHED_TOKENS "
                f"({config.max_batched_tokens}), since every running sequence takes a token of each step"
            )
        report(prepare(config.cache_dir))
        model = load_model(checkpoint, config.dtype, config.device, report, config.weight_quantization)
        report("checking the model against transformers' own forward")
        error = probe(model)
        report(f"the check passed: relative difference {error:.1e}")
        size = size_cache(model, config)
        positions = _resolve(model, config.rope, size.max_model_len, ConfigurationError)
        for warning in positions.warnings():
            report(f"warning: {warning}")
        described = ", ".join(f"{key} {value}" for key, value in positions.describe().items())
        report(
            f"{described}; max_model_len {size.max_model_len}; cache of {size.num_blocks * config.block_size} tokens, "
            f"{size.num_bytes / 2**30:.2f} GiB"
        )
        return cls(model, config, positions, size)

    # --- requests ---

    def resolve_positions(self, spec: RopeSpec) -> ModelPositions:
        """A request's own position method; the same object for the same spec. Raises InvalidRequest."""
        if spec == self.config.rope:
            return self.info.positions
        if spec not in self._positions:
            if len(self._positions) >= MAX_RESOLVED_SPECS:
                self._positions.clear()
            self._positions[spec] = _resolve(self.model, spec, self.info.max_model_len, _bad_rope)
        return self._positions[spec]

    def add(self, request: EngineRequest) -> None:
        """Queue a request, or refuse with InvalidRequest what can never run."""
        self.check(request)
        sampling = request.sampling
        positions = request.positions or self.info.positions
        generator, timeout = None, self.config.request_timeout_s
        if sampling.seed is not None:
            generator = torch.Generator().manual_seed(sampling.seed % 2**64)
        self.scheduler.add(
            Sequence(
                request=request,
                positions=positions,
                hasher=PrefixHasher(self.config.block_size, positions, request.cache_salt),
                generator=generator,
                token_ids=list(request.prompt_token_ids),
                num_prompt_tokens=len(request.prompt_token_ids),
                matcher=None if sampling.grammar is None else sampling.grammar.matcher(),
                deadline=min(request.deadline, math.inf if timeout is None else time.monotonic() + timeout),
            )
        )

    def check(self, request: EngineRequest) -> None:
        """InvalidRequest for what can never run. Reads nothing that a step changes, so any thread may call it."""
        check_fits(request, self.info)

    def check_queue(self, backlog: Backlog, num_prompt_tokens: int, num_sequences: int = 1) -> None:
        """Room for a request's sequences; see `refusals.check_room`. Reads nothing that a step changes but the rate."""
        check_room(self.config, backlog, num_prompt_tokens, num_sequences, self._prefill_tokens_per_s)

    def retry_after_s(self, backlog: Backlog) -> int:
        """Seconds until what waits and what runs is read, at the measured prefill rate; at least 1."""
        return retry_after_s(backlog, self._prefill_tokens_per_s)

    def abort(self, request_id: str) -> TokenOutput | None:
        """Forget a request and release its blocks now; its last output, or None where there is no such request."""
        sequence = self.scheduler.remove(request_id)
        return sequence.output(finish_reason=FinishReason.ABORT) if sequence else None

    def abort_all(self, reason: RequestError) -> list[tuple[str, TokenOutput]]:
        """Abort everything: what has generated something ends with that, and the rest fails with `reason`."""
        return [(sequence.request_id, self._cut(sequence, reason)) for sequence in self.scheduler.sequences]

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    # --- the step ---

    def step(self) -> list[tuple[str, TokenOutput]]:
        """Run one step; (request id, output) of every request that has news."""
        began = time.monotonic()
        outputs = self._abort_expired(began)
        plan = self.scheduler.schedule()
        if plan:
            logits = self._forward(plan)
            outputs += self._update(plan, logits)
        self._measure(plan, time.monotonic() - began)
        return outputs

    def _abort_expired(self, now: float) -> list[tuple[str, TokenOutput]]:
        expired = [sequence for sequence in self.scheduler.sequences if now >= sequence.deadline]
        return [(sequence.request_id, self._cut(sequence, too_late(sequence, now))) for sequence in expired]

    def _cut(self, sequence: Sequence, reason: RequestError) -> TokenOutput:
        self.scheduler.remove(sequence.request_id)
        failure = None if sequence.num_output_tokens else reason
        return sequence.output(finish_reason=FinishReason.ABORT, failure=failure)

    def _forward(self, plan: list[Scheduled]) -> Tensor:
        chunks = []
        for sequence, count in plan:
            start = sequence.num_computed_tokens
            tokens = sequence.token_ids[start : start + count]
            num_logits = sequence.num_logits(count)
            chunks.append(Chunk(tokens, start, sequence.block_table, sequence.positions, num_logits))
        return self.model.forward(build_batch(chunks, self.config.block_size, self.model.device), self.storage)

    def _update(self, plan: list[Scheduled], logits: Tensor) -> list[tuple[str, TokenOutput]]:
        outputs: list[tuple[str, TokenOutput]] = []
        sampling_rows: list[int] = []
        sampled: list[Sequence] = []
        row = 0
        for sequence, count in plan:
            start = sequence.num_computed_tokens
            last = start + count == sequence.num_tokens
            num_logits = sequence.num_logits(count)
            if sequence.sampling.prompt_logprobs is not None:
                score_prompt(sequence, start + count - num_logits, logits[row : row + num_logits])
            sequence.num_computed_tokens += count
            self.scheduler.cache.remember(sequence, start)
            self._prompt_tokens += max(0, min(start + count, sequence.num_prompt_tokens) - start)
            row += num_logits
            if last and sequence.sampling.max_tokens > sequence.num_output_tokens:
                sampling_rows.append(row - 1)
                sampled.append(sequence)
            elif last:
                outputs.append(self._finish(sequence, (), None, FinishReason.LENGTH))
            elif sequence.request.report_progress:
                outputs.append((sequence.request_id, sequence.output()))
        return outputs + self._sample(logits[sampling_rows], sampled)

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> list[tuple[str, TokenOutput]]:
        if not sequences:
            return []
        # Log-probabilities are of the raw logits: keep those rows, since sampling changes its own.
        raw = {
            s.request_id: logits[i : i + 1].clone() for i, s in enumerate(sequences) if s.sampling.logprobs is not None
        }
        tokens = sample(logits, sequences, self.info.eos_token_ids)
        outputs = []
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
            self._generation_tokens += 1
            if failure := self._follow(sequence, token):
                outputs.append(failure)
                continue
            num_top = sequence.sampling.logprobs
            scored = None if num_top is None else tuple(logprobs(raw[sequence.request_id], [token], num_top))
            reason = self._finish_reason(sequence, token)
            if reason is None:
                outputs.append((sequence.request_id, sequence.output((token,), logprobs=scored)))
            else:
                outputs.append(self._finish(sequence, (token,), scored, reason))
        return outputs

    def _follow(self, sequence: Sequence, token: int) -> tuple[str, TokenOutput] | None:
        """Advance the grammar; the request's last output where the grammar cannot go on."""
        matcher = sequence.matcher
        if matcher is None:
            return None
        if token not in self.info.eos_token_ids:
            matcher.accept(token)
        if not matcher.failure:
            return None
        self.scheduler.remove(sequence.request_id)
        failure = InvalidRequest(
            f"the output cannot follow its grammar any further: {matcher.failure}", code="grammar_failed"
        )
        return sequence.request_id, sequence.output(finish_reason=FinishReason.ABORT, failure=failure)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.sampling
        if sequence.matcher is not None and (token in self.info.eos_token_ids or sequence.matcher.finished):
            return FinishReason.STOP
        ends = sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids | self.info.eos_token_ids
        if token in ends and sequence.num_output_tokens >= sampling.min_tokens:
            return FinishReason.STOP
        full = sequence.num_output_tokens >= sampling.max_tokens or sequence.num_tokens >= self.info.max_model_len
        return FinishReason.LENGTH if full else None

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

    def _measure(self, plan: list[Scheduled], seconds: float) -> None:
        self._num_steps += 1
        self._last_step_s = seconds
        prefilled = sum(count for _, count in plan if count > 1)
        if prefilled >= 64 and seconds > 0:  # a rate that a few tokens would distort
            rate = prefilled / seconds
            self._prefill_tokens_per_s += (rate - self._prefill_tokens_per_s) * (
                0.2 if self._prefill_tokens_per_s else 1
            )

    def stats(self) -> EngineStats:
        scheduler, pool = self.scheduler, self.scheduler.cache.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_running_tokens=sum(s.num_remaining_tokens for s in scheduler.running.values()),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=sum(s.num_remaining_tokens for s in scheduler.waiting.values()),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queried_tokens=scheduler.cache.queried_tokens,
            prefix_hit_tokens=scheduler.cache.hit_tokens,
            last_step_s=self._last_step_s,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
        )

    def check_integrity(self) -> None:
        """Assert that blocks, tables and sequences agree."""
        self.scheduler.cache.check_integrity(self.scheduler.sequences)


def _bad_rope(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="rope", code="bad_rope")


def _resolve(model: Model, spec: RopeSpec, max_model_len: int, error: Callable[[str], Exception]) -> ModelPositions:
    try:
        return resolve_model(spec, model.rotaries, max_model_len)
    except MethodError as reason:
        raise error(str(reason)) from reason
