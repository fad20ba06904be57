"""Prometheus metrics: vLLM's names where vLLM has one, so that its dashboards and autoscalers work; ours as `prerope:`.

Endpoints observe finished requests; gauges and totals of the engine are read from its statistics at each scrape. Each
app has a registry of its own. Knows the engine's numbers, not its workings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from prerope.server.engine.outputs import FinishReason
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prerope.server.byte_cache import CacheStats
    from prerope.server.engine.limits import EngineStats, GraphStats, ModelInfo

LATENCY_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
"""Seconds: to the first token. vLLM's, with its tail cut to what a person would wait."""
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
"""Seconds: between tokens."""
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
"""Seconds: a whole request, or one phase of it."""
COUNT_BUCKETS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
"""Tokens of a request."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "another method"
"""What stands for all other words in labels, logs and replies: a client may send any."""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What a scrape needs of the engine; without `stats` and `info` while it loads or once it is dead.

    caches: those that clients can fill, by name. angle_bytes: what is kept of angles from step to step.
    """

    state: str
    stats: EngineStats | None
    info: ModelInfo | None
    caches: Mapping[str, CacheStats] = field(default_factory=dict)
    angle_bytes: int = 0


class Metrics:
    """One app's metrics: a histogram or counter each, observed where the number is known.

    Attributes:
        ttft, itl, tpot, e2e: seconds to the first token, between two tokens, a token after the first, of a request.
        queue, prefill, decode: seconds of a request's phases.
        prompt, generation: tokens of a request.
        finished: by finish reason.
        http: by method, handler (the route's template, never the raw path) and status.
    """

    def __init__(self, model_name: str, snapshot: Callable[[], EngineSnapshot]) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        seconds = REQUEST_BUCKETS
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", LATENCY_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a request.", TOKEN_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", seconds)
        self.queue = histogram("request_queue_time_seconds", "Waiting, before the first step.", seconds)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", seconds)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", seconds)
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", COUNT_BUCKETS)
        self.generation = histogram("request_generation_tokens", "Generated tokens of a request.", COUNT_BUCKETS)
        success = Counter(
            "vllm:request_success", "Requests that finished.", ["model_name", "finished_reason"], registry=self.registry
        )
        # Shown from the start, so that a rate over it begins at zero.
        self.finished = {reason: success.labels(model_name, reason) for reason in FinishReason}
        self.http = Counter(
            "prerope:http_requests", "HTTP replies.", ["method", "handler", "status"], registry=self.registry
        )
        self.registry.register(EngineCollector(model_name, snapshot))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def render(self) -> bytes:
        """The exposition format, for /metrics."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Reads the engine at scrape time. While there is none to read, only its state is shown."""

    def __init__(self, model_name: str, snapshot: Callable[[], EngineSnapshot]) -> None:
        self._model_name = model_name
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # nothing to check for duplicates, and the engine is not there yet when this is registered

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield self._gauge("prerope:engine_ready", "1 once the model is loaded and serving.", snapshot.state == "ready")
        if snapshot.info is not None:
            yield self._method_info(snapshot.info)
            yield self._cache_info(snapshot.info)
            yield self._gauge("prerope:max_model_len", "Tokens of prompt and output.", snapshot.info.max_model_len)
        if snapshot.stats is not None:
            yield from self._gauges(snapshot.stats)
            yield from self._counters(snapshot.stats)
            yield self._graph_info(snapshot.stats.graphs)
            yield self._gauge("prerope:angle_bytes", "Of angles, kept from step to step.", snapshot.angle_bytes)
        yield from self._caches(snapshot.caches)

    def _caches(self, caches: Mapping[str, CacheStats]) -> Iterator[Metric]:
        labels = ["model_name", "cache"]
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        for kind, name, text, value in (
            (gauge, "bytes", "What a cache holds.", attrgetter("num_bytes")),
            (gauge, "max_bytes", "The most that a cache holds.", attrgetter("max_bytes")),
            (gauge, "entries", "What a cache holds, counted.", attrgetter("num_entries")),
            (counter, "hits", "What was found in a cache.", attrgetter("hits")),
            (counter, "misses", "What was looked for in a cache and not found.", attrgetter("misses")),
            (counter, "evictions", "What a cache had no more room for.", attrgetter("evictions")),
        ):
            family = kind(f"prerope:cache_{name}", text, labels=labels)
            for cache, stats in caches.items():
                family.add_metric([self._model_name, cache], value(stats))
            yield family

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        used = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the current steps.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences in the queue.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", used),
            ("prerope:num_tokens_waiting", "Prompt tokens in the queue.", stats.num_waiting_tokens),
            ("prerope:num_blocks", "Cache blocks in all.", stats.num_blocks),
            ("prerope:num_blocks_free", "Cache blocks that can be allocated.", stats.num_free_blocks),
            ("prerope:num_blocks_cached", "Cache blocks kept for later prompts.", stats.num_cached_blocks),
            ("prerope:num_states", "Slots for states of recurrent layers in all.", stats.num_states),
            ("prerope:num_states_free", "Slots for states that can be taken.", stats.num_free_states),
            ("prerope:num_states_cached", "States kept for later prompts.", stats.num_cached_states),
            ("prerope:state_bytes", "What all slots for states take.", stats.state_bytes),
            ("prerope:tier_bytes", "What CACHE_TIER_DIR holds.", stats.tiers.num_bytes),
            ("prerope:cuda_graphs", "CUDA graphs of decode steps.", stats.graphs.num_captured),
            ("prerope:cuda_graphs_refused", "Kinds of decode step without one.", stats.graphs.num_refused),
            ("prerope:last_step_seconds", "Duration of the last step.", stats.last_step_s),
            ("prerope:prefill_tokens_per_second", "Measured prefill speed.", stats.prefill_tokens_per_s),
        ):
            yield self._gauge(name, text, value)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("vllm:num_preemptions", "Sequences put back into the queue for want of blocks.", stats.num_preemptions),
            ("vllm:prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("vllm:spec_decode_num_drafts", "Times that tokens of a sequence were guessed ahead.", stats.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed ahead.", stats.drafted_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Those of them that were right.", stats.accepted_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queried_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("prerope:tier_blocks_read", "Cache blocks read from CACHE_TIER_DIR or memory.", stats.tiers.num_read),
            (
                "prerope:tier_blocks_read_from_memory",
                "Of these, from CACHE_TIER_MEMORY.",
                stats.tiers.num_read_from_memory,
            ),
            ("prerope:tier_blocks_written", "Cache blocks written to CACHE_TIER_DIR.", stats.tiers.num_written),
            (
                "prerope:tier_blocks_dropped",
                "Cache blocks not written.",
                stats.tiers.num_dropped_writes,
            ),
            ("prerope:tier_write_failures", "Writes to CACHE_TIER_DIR that failed.", stats.tiers.num_failed_writes),
            ("prerope:tier_files_damaged", "Damaged files that were deleted.", stats.tiers.num_damaged),
            ("prerope:steps", "Engine steps.", stats.num_steps),
        ):
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model_name], float(value))
        return family

    def _method_info(self, info: ModelInfo) -> Metric:
        """The deployment's position method and its parameters, as labels."""
        labels = {key: str(value) for key, value in info.positions.described.items() if not isinstance(value, dict)}
        family = InfoMetricFamily("prerope:position_method", "How positions are read.", labels=["model_name"])
        family.add_metric([self._model_name], labels)
        return family

    def _cache_info(self, info: ModelInfo) -> Metric:
        """Blocks and their size as labels of a gauge, as routers that predict prefix hits read them."""
        labels = {
            "model_name": self._model_name,
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_cache_tokens // info.block_size),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "Tokens in a cache block, and blocks.", labels=[*labels])
        family.add_metric([*labels.values()], 1)
        return family

    def _graph_info(self, graphs: GraphStats) -> Metric:
        """Whether decode steps are CUDA graphs, and why not, as labels."""
        labels = {"state": "on" if graphs.num_captured else "off", "reason": graphs.why_none}
        family = InfoMetricFamily("prerope:cuda_graphs_state", "Are decode steps CUDA graphs.", labels=["model_name"])
        family.add_metric([self._model_name], labels)
        return family
