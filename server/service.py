"""What endpoints need of one running app: its settings, engine, tokenizer, model name and metrics.

The engine and the tokenizer load on the engine's thread; until then endpoints refuse with a 503.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import structlog
from prerope.cache.attention.dispatch import angle_bytes
from prerope.server.api.chat.trial import TemplateTrial, is_tame
from prerope.server.api.fairness import BODIES, BodyRoom
from prerope.server.api.requests.reading import ModelText
from prerope.server.byte_cache import ByteCache, CacheStats
from prerope.server.config import EngineConfig
from prerope.server.engine.async_engine import AsyncEngine
from prerope.server.engine.life import EngineState
from prerope.server.errors import EngineUnavailable
from prerope.server.log import place_of
from prerope.server.metrics import EngineSnapshot, Metrics
from prerope.server.models.checkpoint import checkpoint_name, resolve_checkpoint
from prerope.server.ranks.processes import Followers
from prerope.server.sampling_defaults import EMBEDDED, SamplingDefaults, sampling_defaults
from prerope.server.settings import Settings
from prerope.server.structured.grammars import Grammars
from prerope.server.workers.lanes import LANES, SMALL_BODY
from prerope.server.workers.pool import Workers
from prerope.server.workers.world import World

if TYPE_CHECKING:
    from prerope.server.engine.engine import Engine
    from prerope.server.models.checkpoint import Checkpoint
    from prerope.server.ranks.group import Ranks
    from prerope.server.tokenizer import Tokenizer

SECRETS = {"api_key", "api_key_file", "metrics_key"}
"""Settings that no other process needs."""

log = structlog.get_logger(__name__)

MAX_CONVERSATION_BYTES = 64 * 2**20


class Kept(NamedTuple):
    """A response of /v1/responses, as JSON. given: the items that it answers. head: it without its `output`."""

    given: bytes
    output: bytes
    head: bytes


@dataclass(slots=True)
class Service:
    """Everything an endpoint may use; one for each app, at `app.state.service`.

    Attributes:
        served_names: what clients may call the model; replies use the first.
        sampling_defaults: how tokens are chosen where a request does not say; known once the model is loaded.
        conversations: of Responses that may be gone on with, by tenant and the response's id.
        tokenizer, text: the model's; there once the engine is ready.
        leaving: routers are to send nobody any more, though whoever comes is served.
        reads_inline: little bodies are read on the event loop, where the chat template may be run there.
        followers: the other ranks, where there are any; begun here, unless whoever starts the server has begun them.
    """

    settings: Settings
    served_names: tuple[str, ...] = field(init=False)
    engine: AsyncEngine = field(init=False)
    metrics: Metrics = field(init=False)
    workers: Workers = field(init=False)
    grammars: Grammars = field(init=False)
    conversations: ByteCache[tuple[str, str], Kept] = field(init=False)
    bodies: BodyRoom = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    text: ModelText = field(init=False)
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    followers: Followers | None = None
    leaving: bool = False
    reads_inline: bool = False
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.served_names = self.settings.served_names or (checkpoint_name(self.settings.model_id),)
        self.engine = AsyncEngine(self._load, self.settings.step_timeout_s, self._tell_of_step)
        self.metrics = Metrics(self.model_name, self._snapshot)
        self.workers = Workers(lambda: World(self.text), LANES)
        self.grammars = Grammars(lambda: self.tokenizer, self.workers)
        self.conversations = ByteCache(MAX_CONVERSATION_BYTES)
        self.bodies = BodyRoom(BODIES * self.settings.max_body_bytes)

    @property
    def model_name(self) -> str:
        """What replies call the model."""
        return self.served_names[0]

    @property
    def seconds_up(self) -> float:
        return time.monotonic() - self._started

    def require_open(self) -> None:
        """Raises EngineUnavailable, saying why, unless routers are to send requests."""
        self.engine.require_ready()
        if self.leaving:
            raise EngineUnavailable("The server is about to shut down.", code=str(EngineState.DRAINING))

    def _tell_of_step(self, late: bool) -> None:
        if not late:
            log.warning("the step that did not end has ended: requests are taken again")
            return
        log.error(
            "a step of the engine does not end: /health, /ready and /live are 503 (STEP_TIMEOUT_S)",
            seconds=round(self.engine.seconds_in_step),
            **self.engine.engine.under_way,
            at=place_of(self.engine.thread_id),
        )

    def report(self, stage: str) -> None:
        """One line of progress while loading. Called on the engine's thread."""
        self.engine.stage = stage
        log.info(stage, seconds=round(self.seconds_up, 1))

    async def start_workers(self) -> None:
        """Begin with their zygote now, and find out whether the chat template can be run, and where."""
        await self.workers.start()
        found = await self.workers.run(TemplateTrial(), SMALL_BODY.name)
        self.tokenizer.template_fault = found.unusable
        self.reads_inline = found.quick
        if (said := found.unusable or found.refusal) and self.tokenizer.hf.chat_template:
            log.warning("one word of a chat was tried", refused=said)

    def _load(self) -> Engine:
        """Runs on the engine's thread."""
        size = self.settings.tensor_parallel_size
        if size > 1:
            self.followers = self.followers or Followers(size)
            self.followers.watch(self.engine.lose)
        from prerope.server.engine.limits import check_ranks
        from prerope.server.engine.loading import in_words, load_engine
        from prerope.server.log import route_transformers_log
        from prerope.server.models.end_tokens import describe
        from prerope.server.structured.compile import prepare_tables
        from prerope.server.tokenizer import Tokenizer

        route_transformers_log()
        settings, config = self.settings, EngineConfig.of(self.settings)
        if size > 1:
            check_ranks(config, size)
        checkpoint = resolve_checkpoint(settings.model_id, settings.revision, self.report, cache_dir=settings.cache_dir)
        ranks = self._join(checkpoint)
        self.report(f"Loading the tokenizer of {checkpoint.name}")
        with in_words(checkpoint.name):
            tokenizer = Tokenizer.load(checkpoint)
            _ = tokenizer.max_chars_per_token  # computed once, here rather than on the event loop
            self.report(describe(tokenizer.end_tokens, tokenizer.hf))
            if settings.generation_config == "auto":
                self.sampling_defaults = (
                    EMBEDDED if settings.model_id is None else sampling_defaults(checkpoint, self.report)
                )
            prepare_tables(tokenizer)  # here too
        engine = load_engine(checkpoint, config, self.report, tokenizer.eos_token_ids, ranks)
        self.tokenizer, self.reads_inline = tokenizer, is_tame(tokenizer)
        self.text = ModelText(
            tokenizer=tokenizer,
            served_names=self.served_names,
            any_name=settings.served_model_name is None,
            max_model_len=engine.info.max_model_len,
            vocab_size=engine.info.vocab_size,
        )
        return engine

    def _join(self, checkpoint: Checkpoint) -> Ranks:
        """Start those that compute the model with this process, if any do."""
        from prerope.server.models.model import choose_device
        from prerope.server.ranks.group import ALONE, Ranks

        if self.followers is None:
            return ALONE
        settings, on_gpus = self.settings, choose_device(self.settings.device).type == "cuda"
        known = settings.model_dump(mode="json", exclude=SECRETS, exclude_none=True)
        folder = self.followers.begin({"settings": known, "checkpoint": asdict(checkpoint), "on_gpus": on_gpus})
        self.report(f"waiting for {settings.tensor_parallel_size - 1} other ranks")
        ranks = Ranks.join(folder, 0, settings.tensor_parallel_size, on_gpus=on_gpus)
        ranks.lost = self.followers.loss
        return ranks

    def close(self) -> None:
        """End what computes with this process."""
        if self.followers is not None:
            self.followers.close()

    def _snapshot(self) -> EngineSnapshot:
        state = self.engine.state
        alive = state in (EngineState.READY, EngineState.HUNG, EngineState.DRAINING)
        return EngineSnapshot(
            state=str(state),
            stats=self.engine.stats() if alive else None,
            info=self.engine.info if alive else None,
            caches=self._caches(alive=alive),
            angle_bytes=angle_bytes(self.engine.engine.model.device) if alive else 0,
        )

    def _caches(self, *, alive: bool) -> dict[str, CacheStats]:
        """Statistics of the caches that clients can fill, by name."""
        resolved = {"rope methods": self.engine.engine.resolved.stats()} if alive else {}
        return resolved | {
            "grammars": self.grammars.kept.stats(),
            "refused grammars": self.grammars.refused.stats(),
            "conversations": self.conversations.stats(),
        }
