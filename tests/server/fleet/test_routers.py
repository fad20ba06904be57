"""What routers ask of a replica: probes, gauges, and a chat's prompt as token ids, by the body that they pass on."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socketserver
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prerope.server.engine.life import EngineState

from tests.server.test_cli import free_port, wait_for
from tests.test_docker import router_files

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
PAGE = (ROOT / "docs/router.md").read_text(encoding="utf-8").replace("\\\n", " ")
PROGRAMS = f"/usr/sbin:{sysconfig.get_path('scripts')}:{os.environ.get('CLIENTS', ROOT / '.clients')}/router/bin"
KEY = f"sk-{secrets.token_hex(16)}"
"""LiteLLM's proxy wants one; the others ask for none."""
BODY = {
    "model": "m",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}],
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["\n"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "seed": 1,
    "n": 1,
}


@pytest.fixture(scope="module")
def replicas(serve_module: Any, tiny_checkpoint: Path) -> list[str]:
    return [serve_module(model_id=str(tiny_checkpoint)) for _ in range(2)]


@pytest.fixture(scope="module")
def url(replicas: list[str]) -> str:
    return replicas[0]


@contextmanager
def router(recipe: str, replicas: list[str], folder: Path, *flags: str, probe: str = "health") -> Iterator[str]:
    """A command of docs/router.md, and its file of docker/, with other addresses; its URL. Skips what is missing."""
    name, *arguments = shlex.split(recipe.replace("$PWD", str(ROOT)))
    program = shutil.which(name) or shutil.which(name, path=PROGRAMS)
    if program is None:
        pytest.skip(f"{name} is not installed")
    addresses = {"8000": free_port()} | {str(8001 + i): url.rpartition(":")[2] for i, url in enumerate(replicas)}

    def own(text: str) -> str:
        return re.sub(r"(127\.0\.0\.1:|^)(800[012])\b", lambda found: f"{found[1]}{addresses[found[2]]}", text)

    for place, argument in enumerate(arguments):
        if (ROOT / argument).is_file():
            text = "\n".join(map(own, (ROOT / argument).read_text(encoding="utf-8").split("\n")))
            (folder / Path(argument).name).write_text(text.replace("/tmp/prerope-", f"{folder}/"))
            arguments[place] = str(folder / Path(argument).name)
    with (folder / "log").open("wb") as log:
        environment = os.environ | {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        command = [program, *map(own, arguments), *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{addresses['8000']}/{probe}")
        yield f"http://127.0.0.1:{addresses['8000']}"
    finally:
        process.kill()
        process.wait()


def command(name: str) -> str:
    """The one of docs/router.md that starts this."""
    (found,) = re.findall(rf"^(?:\w+=\S+ )?({name} .*)$", PAGE, re.MULTILINE)
    return str(found)


@pytest.fixture
def nginx(replicas: list[str], tmp_path: Path) -> Iterator[str]:
    """The recipe of docker/nginx.conf before both replicas."""
    with router(command("nginx"), replicas, tmp_path, "-g", "daemon off; master_process off;") as url:
        yield url


def through(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)


def turns(url: str, session: str, count: int) -> list[int]:
    """Cached tokens of each turn of one conversation."""
    chat, cached = [{"role": "user", "content": f"{session} " * 12}], []
    with through(url) as http:
        for _ in range(count):
            body = {"model": "prerope", "messages": chat, "max_tokens": 4, "temperature": 0}
            reply = http.post("/v1/chat/completions", json=body, headers={"x-session-id": session}).json()
            cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
            chat += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
    return cached


def assert_prefixes_are_found(url: str, alone: str) -> None:
    """Behind a router, as on one replica."""
    own = [turns(alone, f"{secrets.token_hex(8)}-alone", 3) for _ in range(6)]
    routed = [turns(url, f"{secrets.token_hex(8)}-routed", 3) for _ in range(6)]
    assert sum(map(sum, routed)) >= 0.9 * sum(map(sum, own)) > 0


def test_nginx_keeps_a_conversation_where_its_prefix_is(nginx: str, replicas: list[str]) -> None:
    assert_prefixes_are_found(nginx, replicas[0])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cache_aware", "consistent_hash"])
def test_vllm_router_keeps_a_conversation_where_its_prefix_is(replicas: list[str], tmp_path: Path, policy: str) -> None:
    """Where the router is: `pip install '.[routers]'`."""
    recipe = command("vllm-router").replace("cache_aware", policy)
    with router(f"{recipe} --prometheus-port {free_port()}", replicas, tmp_path) as url:
        assert_prefixes_are_found(url, replicas[0])


@pytest.mark.slow
def test_litellm_keeps_a_conversation_and_passes_a_draining_replica_by(
    replicas: list[str], tmp_path: Path, serve_module: Any
) -> None:
    """Where the proxy is: `make test-clients`."""
    with router(command("litellm"), replicas, tmp_path, probe="health/liveliness") as url:
        assert_prefixes_are_found(url, replicas[0])
        assert codes_while_one_drains(url, serve_module.running(replicas[0]).service.engine) == {200}


def codes_while_one_drains(url: str, engine: Any) -> set[int]:
    """Of chats of many conversations, while this replica says 503."""
    engine._state = EngineState.DRAINING
    try:
        return codes(url)
    finally:
        engine._state = EngineState.READY


def codes(url: str) -> set[int]:
    """Of twelve conversations."""
    body = {"model": "prerope", "messages": [{"role": "user", "content": "on"}], "max_tokens": 2}
    with through(url) as http:
        return {
            http.post("/v1/chat/completions", json=body, headers={"x-session-id": f"session-{number}"}).status_code
            for number in range(12)
        }


def test_nginx_passes_a_draining_replica_by(nginx: str, replicas: list[str], serve_module: Any) -> None:
    assert codes_while_one_drains(nginx, serve_module.running(replicas[0]).service.engine) == {200}


def test_nginx_sends_on_all_that_comes_once_replicas_are_back(
    nginx: str, replicas: list[str], serve_module: Any
) -> None:
    """Streams that begin at once, the first of them not over yet, after every replica has said 503."""
    engines = [serve_module.running(replica).service.engine for replica in replicas]
    for engine in engines:
        engine._state = EngineState.DRAINING
    try:
        assert codes(nginx) == {503}
    finally:
        for engine in engines:
            engine._state = EngineState.READY
    time.sleep(2.5)
    body = BODY | {"model": "prerope", "max_tokens": 100, "ignore_eos": True, "stop": None}
    with through(nginx) as http, ExitStack() as streams:
        for number in range(8):
            stream = http.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": f"new-{number}"})
            assert streams.enter_context(stream).status_code == 200


class Names(socketserver.BaseRequestHandler):
    """A name server that knows the names in `known`, all of them this machine's."""

    known: frozenset[str] = frozenset()

    def handle(self) -> None:
        query, answer_to = self.request
        end = query.index(b"\0", 12) + 5
        labels = "".join(map(chr, query[12 : end - 5])).translate(dict.fromkeys(range(32), "."))
        is_known, is_ipv4 = labels[1:] in self.known, query[end - 4 : end - 2] == b"\0\1"
        answers = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1" if is_known and is_ipv4 else b""
        counts = bytes((0, 1, 0, bool(answers), 0, 0, 0, 0))
        head = query[:2] + (b"\x81\x80" if is_known else b"\x81\x83") + counts
        answer_to.sendto(head + query[12:end] + answers, self.client_address)


@pytest.fixture
def composed(replicas: list[str], tmp_path: Path) -> Iterator[str]:
    """The router of docker/compose.yaml, its names those of `replicas` as far as `Names` knows them."""
    program = shutil.which("nginx") or shutil.which("nginx", path=PROGRAMS)
    version = subprocess.run([program or "true", "-v"], capture_output=True, text=True, check=True).stderr
    if tuple(map(int, re.findall(r"\d+", version))) < (1, 27, 3):
        pytest.skip("nginx, from version 1.27.3 on, is not installed")
    file, servers = router_files(tmp_path)
    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), Names) as names:
        threading.Thread(target=names.serve_forever, daemon=True).start()
        port, text = free_port(), file.read_text(encoding="utf-8").replace("listen 8000", "listen 127.0.0.1:8000")
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("/tmp/prerope-", f"{tmp_path}/")
        file.write_text(text.replace("127.0.0.11", f"127.0.0.1:{names.server_address[1]}"))
        lines = servers.read_text(encoding="utf-8")
        for number, replica in enumerate(replicas):
            lines = lines.replace(f"replica{number}:8000", f"replica{number}:{replica.rpartition(':')[2]}")
        servers.write_text(lines)
        Names.known = frozenset({"replica0"})
        process = subprocess.Popen([program, "-c", str(file), "-g", "daemon off; master_process off;"])
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()
            names.shutdown()


def test_the_router_of_compose_takes_the_replicas_that_it_finds(
    composed: str, replicas: list[str], serve_module: Any
) -> None:
    engines = [serve_module.running(replica).service.engine for replica in replicas]

    def served() -> list[int]:
        """Prompt tokens of twelve conversations, by replica."""
        before = [engine.stats().prefix_queried_tokens for engine in engines]
        assert codes(composed) == {200}
        return [engine.stats().prefix_queried_tokens - count for engine, count in zip(engines, before, strict=True)]

    assert served()[1] == 0
    Names.known |= {"replica1"}
    deadline = time.monotonic() + 30
    while 0 in served():
        assert time.monotonic() < deadline
    assert_prefixes_are_found(composed, replicas[0])
    assert codes_while_one_drains(composed, engines[0]) == {200}


def test_a_chats_body_is_tokenized_as_it_would_be_answered(url: str) -> None:
    asked = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"stream": False, "stream_options": None})
    rendered = httpx.post(f"{url}/v1/chat/completions/render", json=BODY)
    tokenized = httpx.post(f"{url}/tokenize", json=BODY)
    assert [reply.status_code for reply in (asked, rendered, tokenized)] == [200] * 3, (rendered.text, tokenized.text)
    ids = rendered.json()["token_ids"]
    assert ids == tokenized.json()["tokens"]
    assert len(ids) == asked.json()["usage"]["prompt_tokens"]


def test_what_is_scraped_is_there(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert re.search(rf"^vllm:{name}{{[^}}]*}} [0-9.]+$", text, re.MULTILINE), name
    (labels,) = re.findall(r"^vllm:cache_config_info{([^}]*)} 1\.0$", text, re.MULTILINE)
    config = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    assert int(config["block_size"]) * int(config["num_gpu_blocks"]) > 1000


def objects(name: str) -> dict[str, dict[str, Any]]:
    """Kind → object of a file of manifests."""
    found = yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text(encoding="utf-8"))
    return {one["kind"]: one for one in found}


def test_manifests_agree_with_the_server() -> None:
    manifests = objects("prerope.yaml")
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health", "readiness": "/health", "liveness": "/live"}
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] >= wait + int(environment["SHUTDOWN_TIMEOUT_S"] or 0) + 10
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    selector = manifests["Service"]["spec"]["selector"]
    assert selector.items() <= manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "prerope"
    metric = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric == "prerope_num_tokens_waiting"
    claimed = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume}
    assert claimed == {manifests["PersistentVolumeClaim"]["metadata"]["name"]}


def test_manifests_fit_kubernetes_schemas() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    manifests = objects("prerope.yaml")
    assert len(manifests) == 5
    for one in manifests.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
