"""A server of two ranks: its replies are one rank's, and all of it ends when either is gone."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prerope.server.config import EngineConfig
from prerope.server.engine.limits import check_ranks
from prerope.server.errors import ConfigurationError

from tests.server.test_cli import free_port, start, wait_for

PAGE = (Path(__file__).parents[3] / "docs/scale.md").read_text(encoding="utf-8")
PROMPT = "A prompt that is longer than a block of the cache, so that a second one of the same beginning finds it there."
END_WITHIN_S = 10
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["Ada", "Grace"]}}, "required": ["name"]}

Started = tuple[subprocess.Popen[str], str]


def started(checkpoint: Path | None, **variables: str) -> Started:
    """A server of two ranks, ready: the command of docs/scale.md, with this model, or the embedded one."""
    (flags,) = re.findall(r"^python -m prerope\.server --model-id owner/model (.*)$", PAGE, re.MULTILINE)
    port, model = free_port(), () if checkpoint is None else ("--model-id", str(checkpoint))
    process = start(
        *(*model, *shlex.split(flags), "--port", str(port), "--log-level", "warning"),
        **{"KV_CACHE_MEMORY": "8MiB"} | variables,
    )
    url = f"http://127.0.0.1:{port}"
    wait_for(f"{url}/ready")
    return process, url


def followers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if one.cmdline()[-1].endswith("server.ranks")]


@pytest.fixture(scope="module")
def shared(byte_checkpoint: Path) -> Iterator[Started]:
    process, url = started(byte_checkpoint)
    yield process, url
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def alone(serve_module: Any, byte_checkpoint: Path) -> str:
    url: str = serve_module(model_id=str(byte_checkpoint))
    return url


def ask(url: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(
        f"{url}/generate", json={"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True} | body, timeout=60
    )
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0},
        {"temperature": 0, "rope": {"method": "rerope", "window": 16}},
        {"temperature": 1, "seed": 7, "top_p": 0.9},
        {"temperature": 0, "ignore_eos": False, "json_schema": SCHEMA},
    ],
)
def test_replies_are_those_of_one_rank(shared: Started, alone: str, body: dict[str, Any]) -> None:
    ours, theirs = ask(shared[1], **body), ask(alone, **body)
    assert ours["token_ids"] == theirs["token_ids"]


def test_several_choices_and_prefix_hits(shared: Started, alone: str) -> None:
    body = {"model": "m", "prompt": PROMPT, "n": 3, "seed": 3, "temperature": 1, "max_tokens": 12}
    replies = [httpx.post(f"{url}/v1/completions", json=body, timeout=60).json() for url in (shared[1], alone)]
    texts = [[choice["text"] for choice in reply["choices"]] for reply in replies]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    assert ask(shared[1], temperature=0)["usage"]["cached_tokens"] >= 16


def test_a_client_that_leaves_takes_nobody_with_it(shared: Started) -> None:
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{shared[1]}/generate", json=body, timeout=60) as response:
        next(response.iter_lines())
    assert len(ask(shared[1])["token_ids"]) == 24


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_with_an_error_for_every_client(shared: Started) -> None:
    """Last of the module: the shared server is gone then."""
    process, url = shared
    (follower,) = followers_of(process)
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}

    begun = threading.Barrier(9)

    def read(number: int) -> str:
        with httpx.stream("POST", f"{url}/generate", json=body | {"seed": number}, timeout=60) as response:
            pieces = response.iter_text()
            first = next(pieces)
            begun.wait(timeout=60)
            return first + "".join(pieces)

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(read, number) for number in range(8)]
        begun.wait(timeout=60)
        follower.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = [stream.result(timeout=END_WITHIN_S) for stream in streams]
    assert process.wait(END_WITHIN_S) == 1
    assert time.monotonic() - killed < END_WITHIN_S
    frames = [line.removeprefix("data: ") for text in ended for line in text.splitlines() if '"error":{' in line]
    assert [json.loads(frame)["error"]["code"] for frame in frames] == ["rank_lost"] * 8
    assert process.stderr is not None
    assert "rank 1 of 2" in process.stderr.read()


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_rank_behind(byte_checkpoint: Path) -> None:
    process, _ = started(byte_checkpoint)
    followers = followers_of(process)
    process.kill()
    process.communicate()
    assert followers
    assert psutil.wait_procs(followers, timeout=END_WITHIN_S)[1] == []


def test_what_several_ranks_cannot_do_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for config in (EngineConfig(tier_dir=tmp_path), EngineConfig(device="cuda:1")):
        with pytest.raises(ConfigurationError, match="TENSOR_PARALLEL_SIZE is 2, but"):
            check_ranks(config, 2)
