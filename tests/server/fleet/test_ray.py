"""The server on Ray Serve, as docker/ray.yaml has it: two replicas, of which one is killed at the end.

`pip install '.[ray]'` brings Ray; without it this module is skipped.
"""

from __future__ import annotations

import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fleet.test_routers import PAGE, assert_prefixes_are_found
from tests.server.test_cli import ENVIRONMENT, free_port

pytest.importorskip("ray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's about pydantic
    from prerope.server.ray_app import Scale
    from prerope.server.ray_app.call import Call
    from prerope.server.ray_app.metrics import merged
    from prerope.server.ray_app.scaling import QueuedTokens

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[3]
SMALL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # of this machine alone, on the loopback interface
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",
    "RAY_USAGE_STATS_ENABLED": "0",
}
BODY = {"prompt": "A river", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
SERVED_WITHIN_S, START_S = 5, 300
STREAMS, CHATS = 16, 6
"""More than one replica may have for the sake of its cache, so that both have some."""


@pytest.fixture(scope="module")
def alone(serve_module: Any, tiny_checkpoint: Path) -> str:
    url: str = serve_module(model_id=str(tiny_checkpoint))
    return url


@pytest.fixture(scope="module")
def ray(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """`serve run docker/ray.yaml`, on a port of its own."""
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    text = (ROOT / "docker/ray.yaml").read_text(encoding="utf-8").replace("port: 8000", f"port: {port}")
    (folder / "ray.yaml").write_text(text + "      num_cpus: 0.5\n")
    settings = {
        "MODEL_ID": str(tiny_checkpoint),
        "KV_CACHE_MEMORY": "32MiB",
        "SHUTDOWN_TIMEOUT_S": "5",
        "MAX_MODEL_LEN": "4096",
    }
    environment = ENVIRONMENT | SMALL | settings | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "ray.yaml")]
        process = psutil.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/ready"), START_S)
        until(lambda: len(finished(f"http://127.0.0.1:{port}")) == 2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        for one in psutil.wait_procs(family, timeout=30)[1]:
            one.kill()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def until(met: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def finished(url: str) -> dict[str, float]:
    """Replica → requests that it has finished."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            count = sample.value if sample.name == "vllm:request_success_total" else 0
            found[sample.labels["replica"]] = found.get(sample.labels["replica"], 0) + count
    return found


def test_replies_are_those_of_a_server_alone(ray: tuple[str, psutil.Process], alone: str) -> None:
    replies = [httpx.post(f"{url}/generate", json=BODY, timeout=60).json() for url in (ray[0], alone)]
    assert replies[0]["token_ids"] == replies[1]["token_ids"]
    codes = [httpx.post(f"{ray[0]}/generate", content=b"x" * 2**25, timeout=60), httpx.get(f"{ray[0]}/nowhere")]
    assert [reply.status_code for reply in codes] == [413, 404]


def test_a_conversation_stays_where_its_prefix_is(ray: tuple[str, psutil.Process], alone: str) -> None:
    before = finished(ray[0])
    assert_prefixes_are_found(ray[0], alone)
    assert all(count > before[name] for name, count in finished(ray[0]).items())


def test_a_client_that_leaves_ends_its_request(ray: tuple[str, psutil.Process]) -> None:
    body = BODY | {"max_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{ray[0]}/generate", json=body, timeout=60) as reply:
        next(reply.iter_lines())
    before = sum(finished(ray[0]).values())
    until(lambda: sum(finished(ray[0]).values()) > before or running(ray[0]) == 0, 20)
    assert running(ray[0]) == 0


def running(url: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    return sum(s.value for f in families if f.name == "vllm:num_requests_running" for s in f.samples)


def test_a_replica_that_is_killed_takes_its_own_streams_alone(ray: tuple[str, psutil.Process]) -> None:
    """Last of the module. Another one comes, and is used."""
    url, process = ray
    before = set(finished(url))
    family = process.children(recursive=True)  # looked for first: the streams do not wait
    victim = next(one for one in family if "ServeReplica:prerope:Replica" in " ".join(one.cmdline()))

    def read(number: int) -> bool:
        """Whether the stream came to its end."""
        body = BODY | {"max_tokens": 3000, "stream": True, "prompt": f"{number} rivers"}
        try:
            with httpx.stream("POST", f"{url}/generate", json=body, timeout=120) as reply:
                return "[DONE]" in reply.read().decode()
        except httpx.RemoteProtocolError:
            return False

    def chat(number: int) -> str | None:
        """By the official client, which sends again by itself what may be sent again."""
        messages: Any = [{"role": "user", "content": f"{number} lakes"}]
        asked = {"model": "m", "messages": messages, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        return str(OpenAI(base_url=f"{url}/v1", api_key="-").chat.completions.create(**asked).choices[0].finish_reason)

    with ThreadPoolExecutor(STREAMS + CHATS) as pool:
        streams = [pool.submit(read, number) for number in range(STREAMS)]
        chats = [pool.submit(chat, number) for number in range(CHATS)]
        until(lambda: running(url) == STREAMS + CHATS)
        victim.kill()
        killed = time.monotonic()
        until(lambda: httpx.post(f"{url}/generate", json=BODY, timeout=60).status_code == 200, SERVED_WITHIN_S)
        assert time.monotonic() - killed < SERVED_WITHIN_S
        whole = [stream.result() for stream in streams]
        assert [one.result() for one in chats] == ["length"] * CHATS
    assert 0 < sum(whole) < STREAMS
    until(lambda: len(finished(url)) == 2 and set(finished(url)) != before, 120)


def test_the_command_of_the_page_is_the_application_of_the_file() -> None:
    (arguments,) = re.findall(r"^serve run (prerope[^#]*)", PAGE, re.MULTILINE)
    path, *pairs = arguments.split()
    (application,) = yaml.safe_load((ROOT / "docker/ray.yaml").read_text(encoding="utf-8"))["applications"]
    assert path == application["import_path"]
    for given in (dict(pair.split("=") for pair in pairs), application["args"]):
        assert Scale.model_validate(given).min_replicas == 2


def test_replicas_follow_the_tokens_that_wait() -> None:
    policy = QueuedTokens(1000)

    def wanted(tokens: list[float], busy: list[float]) -> int:
        named = {"queued_tokens": dict(enumerate(tokens)), "busy": dict(enumerate(busy))}
        return policy(SimpleNamespace(aggregated_metrics=named))[0]  # type: ignore[arg-type]

    assert wanted([0, 0], [0, 0]) == 1
    assert wanted([900, 1300], [0.1, 0.1]) == 3
    assert wanted([0, 0], [1.0, 0.9]) == 3
    assert policy(SimpleNamespace(aggregated_metrics=None))[0] == 1  # type: ignore[arg-type]


def test_the_router_goes_by_the_prompt_alone() -> None:
    bodies = [
        b'{"model": "a", "seed": 1, "messages": [1]}',
        b'{"model": "bb", "messages": [1]}',
        b'{"n": "\\"prompt\\": "}',
    ]
    prompts = [Call.of({"type": "http", "path": "/v1/models", "app": object()}, body) for body in bodies]
    assert [call.prompt for call in prompts] == ['"messages": [1]}'] * 2 + ["/v1/models"]
    assert "app" not in prompts[0].scope


def test_metrics_of_replicas_are_told_apart() -> None:
    families = [Metric("a_b", "help", "gauge"), Metric("a_b", "help", "gauge")]
    for value, family in enumerate(families):
        family.add_sample("a_b", {"x": "y"}, value)
    (found,) = text_string_to_metric_families(merged([("one", families[:1]), ("two", families[1:])]).decode())
    assert {sample.labels["replica"]: sample.value for sample in found.samples} == {"one": 0, "two": 1}
