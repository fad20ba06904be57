"""What the engine needs to know of a deployment: values only. They are filled from `server.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prerope.rope.spec import LayerMethods, RopeSpec

if TYPE_CHECKING:
    from prerope.server.settings import Settings

Quantization = Literal["none", "int8"]
Speculation = Literal["auto", "off"]

STEP_LIMITS = {"cpu": (64, 512), "cuda": (256, 2048)}
"""Sequences and tokens of one step where nobody set them, by type of device. A step has a cost of its own that more
rows share; what more rows cost is how long the others wait for their next token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One deployment.

    Attributes:
        dtype: of weights and activations: auto, bfloat16, float16 or float32.
        device: auto, cpu, cuda or cuda:N.
        weight_quantization: none, or int8: linear layers hold int8 weights, on the CPU.
        rope: the position method that requests get unless they choose their own.
        rope_layers: what `auto` is in some layers.
        rope_per_request: whether they may.
        max_model_len: tokens of prompt and output together; None derives it from the method and the cache.
        max_num_seqs: sequences in one step at most.
        max_batched_tokens: token budget of one step, shared by prefill chunks and decode steps.
        by_device: which of the two nobody set, so that `on` sets them by the device.
        stream_gap_s: seconds between two tokens of a stream that prefill chunks beside it are sized for; None: none.
        block_size: tokens a cache block holds.
        kv_cache_memory: bytes for keys, values and the states of recurrent layers; None sizes it from free memory.
        state_cache_memory: bytes for states of recurrent layers; None takes a share of what the cache has.
        gpu_memory_utilization: share of a GPU's memory that the process may use.
        kv_cache_dtype: auto is the dtype of the activations.
        prefix_caching: keep finished blocks for later prompts with the same beginning.
        max_queued_requests, max_queued_tokens: waiting requests and their prompt tokens before a 429.
        cache_dir: where built kernels are kept; None builds them anew each time.
        request_timeout_s: a request older than this is aborted; None never.
        tier_dir, tier_bytes: where blocks are kept beyond the cache and the process, and how much of them.
        tier_memory: bytes of host memory for blocks beyond the cache.
        cuda_graphs: on a GPU, launch decode steps as graphs.
        speculation: auto: verify drafts of a sequence's next tokens, made of its past, where that is faster.
        overlap: launch a step before the tokens of the one before it are read; None: on a GPU.
    """

    dtype: str = "auto"
    device: str = "auto"
    weight_quantization: Quantization = "none"
    rope: RopeSpec = field(default_factory=RopeSpec)
    rope_layers: LayerMethods = field(default_factory=dict)
    rope_per_request: bool = True
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 512
    by_device: frozenset[str] = frozenset()
    stream_gap_s: float | None = 0.5
    block_size: int = 16
    kv_cache_memory: int | None = None
    state_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_000_000
    cache_dir: Path | None = None
    request_timeout_s: float | None = None
    tier_dir: Path | None = None
    tier_bytes: int = 10 * 2**30
    tier_memory: int = 0
    cuda_graphs: bool = True
    speculation: Speculation = "auto"
    overlap: bool | None = None

    @classmethod
    def of(cls, settings: Settings) -> EngineConfig:
        """What the engine needs of all settings."""
        shared = {one.name for one in fields(cls)} & type(settings).model_fields.keys()
        by_device = frozenset(
            name for name in ("max_num_seqs", "max_batched_tokens") if getattr(settings, name) is None
        )
        own = {name: getattr(settings, name) for name in shared - by_device}
        return cls(
            by_device=by_device,
            rope=settings.rope_spec(),
            block_size=settings.kv_block_size,
            tier_dir=settings.cache_tier_dir,
            tier_bytes=settings.cache_tier_size,
            tier_memory=settings.cache_tier_memory,
            **own,
        )

    def on(self, device_type: str) -> EngineConfig:
        """With what nobody set as the device would have it, and one limit beside the other as it must be."""
        num_seqs, tokens = STEP_LIMITS.get(device_type, STEP_LIMITS["cpu"])
        if "max_batched_tokens" not in self.by_device:
            num_seqs = min(num_seqs, self.max_batched_tokens)
        if "max_num_seqs" not in self.by_device:
            tokens = max(tokens, self.max_num_seqs)
        return replace(
            self,
            by_device=frozenset(),
            max_num_seqs=num_seqs if "max_num_seqs" in self.by_device else self.max_num_seqs,
            max_batched_tokens=tokens if "max_batched_tokens" in self.by_device else self.max_batched_tokens,
        )
