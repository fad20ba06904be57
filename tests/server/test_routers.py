"""What routers ask of a replica: probes, gauges, and a chat's prompt as token ids, by the body that they pass on."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prerope.server.engine.async_engine import EngineState

from tests.server.test_cli import free_port, wait_for

DOCKER = Path(__file__).parents[2] / "docker"
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
def router(name: str, replicas: list[str], recipe: str, folder: Path, *flags: str) -> Iterator[str]:
    """A recipe of docker/ or a command of docs/router.md, with other addresses; its URL. Skips what is missing."""
    program = shutil.which(name) or shutil.which(name, path=f"/usr/sbin:{sysconfig.get_path('scripts')}")
    if program is None:
        pytest.skip(f"{name} is not installed")
    port = free_port()
    for given, own in zip(("8001", "8002", "8000"), (*(url.rpartition(":")[2] for url in replicas), port), strict=True):
        recipe = recipe.replace(f"127.0.0.1:{given}", f"127.0.0.1:{own}").replace(f"--port {given}", f"--port {own}")
    (folder / "recipe").write_text(recipe.replace("/tmp/prerope-", f"{folder}/"))
    arguments = flags or shlex.split(recipe)[1:]
    with (folder / "log").open("wb") as log:
        command = [program, *(argument.format(recipe=folder / "recipe", port=port) for argument in arguments)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def nginx(replicas: list[str], tmp_path: Path) -> Iterator[str]:
    """The recipe of docker/nginx.conf before both replicas."""
    flags = ("-c", "{recipe}", "-g", "daemon off; master_process off;")
    with router("nginx", replicas, (DOCKER / "nginx.conf").read_text(encoding="utf-8"), tmp_path, *flags) as url:
        yield url


def turns(url: str, session: str, count: int) -> list[int]:
    """Cached tokens of each turn of one conversation."""
    chat, cached = [{"role": "user", "content": f"{session} " * 12}], []
    for _ in range(count):
        body = {"model": "m", "messages": chat, "max_tokens": 4, "temperature": 0}
        reply = httpx.post(
            f"{url}/v1/chat/completions", json=body, headers={"x-session-id": session}, timeout=60
        ).json()
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        chat += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
    return cached


def test_nginx_keeps_a_conversation_where_its_prefix_is(nginx: str, replicas: list[str]) -> None:
    alone = [turns(replicas[0], f"alone{number}", 3) for number in range(6)]
    routed = [turns(nginx, f"routed{number}", 3) for number in range(6)]
    assert sum(map(sum, routed)) >= 0.9 * sum(map(sum, alone)) > 0


@pytest.mark.slow
def test_vllm_router_keeps_a_conversation_where_its_prefix_is(replicas: list[str], tmp_path: Path) -> None:
    """By the command of docs/router.md. Where the router brings it: `pip install '.[routers]'`."""
    text = (DOCKER.parent / "docs/router.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^vllm-router .*$", text, re.MULTILINE)
    with router("vllm-router", replicas, f"{command} --prometheus-port {free_port()}", tmp_path) as url:
        alone = [turns(replicas[0], f"single{number}", 3) for number in range(6)]
        routed = [turns(url, f"through{number}", 3) for number in range(6)]
    assert sum(map(sum, routed)) >= 0.9 * sum(map(sum, alone)) > 0


def test_nginx_passes_a_draining_replica_by(nginx: str, replicas: list[str], serve_module: Any) -> None:
    engine = serve_module.running(replicas[0]).service.engine
    engine.state = EngineState.DRAINING
    try:
        body = {"model": "m", "prompt": "on", "max_tokens": 2}
        codes = [
            httpx.post(
                f"{nginx}/v1/completions", json=body, headers={"x-session-id": str(number)}, timeout=60
            ).status_code
            for number in range(12)
        ]
    finally:
        engine.state = EngineState.READY
    assert codes == [200] * 12


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
