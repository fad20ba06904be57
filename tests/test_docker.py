"""docker/ against the code. No engine is needed: linters, schemas, and that everything named there exists here.

Where `docker compose` is installed, it reads the file too. Nothing here builds an image or starts a container.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prerope.server.http.server import CLOSE_GRACE_S
from prerope.server.settings import Settings
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
REPLICAS = tuple(f"replica{number}" for number in range(8))
SERVERS = ("gpu", "gpus", *REPLICAS, "cpu")
SETTINGS = {name.upper() for name in Settings.model_fields}
OF_THE_HOST = {"HOST", "PORT", "CACHE_DIR", "API_KEY_FILE"}
"""Settings that name something of the host: what is published and mounted. The container has its own."""
OF_COMPOSE = {"MODELS_DIR", "GPU_ID", "PROMETHEUS_PUBLISHED", "GRAFANA_PUBLISHED"}
"""Variables that compose.yaml adds; each is explained in its opening comment or beside its use."""
OF_LIBRARIES = {
    "HF_HOME": "huggingface_hub/constants.py",
    "HF_TOKEN": "huggingface_hub/utils/_auth.py",
    "HF_HUB_OFFLINE": "huggingface_hub/constants.py",
    "TORCHINDUCTOR_CACHE_DIR": "torch/_inductor/runtime/cache_dir_utils.py",
    "TRITON_CACHE_DIR": "torch/_inductor/runtime/cache_dir_utils.py",
}
"""Variables of libraries, and a file of theirs that reads each."""


OF_GCC = {"math.h", "stdint.h", "stddef.h", "stdlib.h", "string.h", "omp.h", "immintrin.h", "arm_neon.h"}
"""Headers that gcc and libc6-dev bring."""


def program(name: str, *arguments: str) -> str:
    """Run one of the environment's linters; its output. It must succeed."""
    path = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert path, f"{name} is not installed: run `make test`, or pip install -e '.[test]'"
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the Dockerfile ---


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, argument) of every line, continued lines joined and comments left out."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found, stage = [], ""
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, argument = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = argument.split(" AS ")[1]
        found.append((stage, instruction, argument))
    return found


INSTRUCTIONS = instructions()


def image_environment() -> dict[str, str]:
    """ENV of the stage that both images are made of."""
    return dict(
        pair.split("=", 1)
        for stage, instruction, argument in INSTRUCTIONS
        if (stage, instruction) == ("runtime", "ENV")
        for pair in argument.split()
    )


def only(instruction: str, stage: str = "runtime") -> str:
    """The argument of the one such instruction in a stage."""
    (argument,) = [argument for where, what, argument in INSTRUCTIONS if (where, what) == (stage, instruction)]
    return argument


def test_the_dockerfile_passes_the_linter() -> None:
    program("hadolint", "docker/Dockerfile")


def test_both_targets_are_the_same_server() -> None:
    parents = {
        stage: argument.split(" AS ")[0] for stage, instruction, argument in INSTRUCTIONS if instruction == "FROM"
    }
    assert parents["gpu"] == parents["cpu"] == "runtime"
    assert list(parents)[-1] == "gpu", "the default target is the last stage"
    for target in ("gpu", "cpu"):
        copies = [argument for stage, what, argument in INSTRUCTIONS if (stage, what) == (target, "COPY")]
        assert copies == [f"--from=packages-{target} /opt/venv /opt/venv", "--from=application /app /app"]


def test_base_images_have_a_version() -> None:
    images = [argument for _, instruction, argument in INSTRUCTIONS if instruction == "ARG"]
    assert images
    for image in [
        *(name.split("=")[1] for name in images),
        *(SERVICES[name]["image"] for name in ("prometheus", "grafana")),
    ]:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+[a-z-]*", image), image


def test_the_server_does_not_run_as_root() -> None:
    user = re.fullmatch(r"(\d+):(\d+)", only("USER"))
    assert user, "by number, so that an orchestrator can tell that it is not root"
    assert int(user[1]) >= 10000
    assert f"--uid {user[1]} --gid {user[2]}" in DOCKERFILE
    users_of_targets = [stage for stage, instruction, _ in INSTRUCTIONS if instruction == "USER"]
    assert users_of_targets == ["runtime"]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    sources = [
        source
        for _, instruction, argument in INSTRUCTIONS
        if instruction == "COPY" and "--from" not in argument
        for source in argument.split()[:-1]
    ]
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(path + "/") for path in let_in), f"{source} is ignored"
    for path in let_in:
        assert any(source == path or source.startswith(path + "/") for source in sources), f"{path} is not copied"


def test_every_package_of_the_server_is_copied() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
    copied = {argument for _, instruction, argument in INSTRUCTIONS if instruction == "COPY"}
    assert {name for name in packages if f"{name} {name}" in copied} == packages
    entry = json.loads(only("ENTRYPOINT"))
    assert entry == ["python", "-m", "prerope.server"]
    assert importlib.util.find_spec("prerope.server.__main__")


def test_variables_of_the_image_are_read_by_somebody() -> None:
    environment = image_environment()
    of_python = {"PATH", "HOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    assert environment.keys() <= SETTINGS | OF_LIBRARIES.keys() | of_python
    for name, file in OF_LIBRARIES.items():
        package, rest = file.split("/", 1)
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert f'"{name}"' in (Path(spec.origin).parent / rest).read_text(encoding="utf-8"), f"{file}: no {name}"
    given = {name.lower(): value for name, value in environment.items() if name in SETTINGS}
    assert given.keys() == {"host", "port", "cache_dir"}
    assert Settings(**given).host == "0.0.0.0", "a container that listens on its own loopback cannot be reached"


def test_everything_that_is_kept_is_kept_on_the_volume() -> None:
    volume = only("VOLUME")
    environment = image_environment()
    kept = [value for name, value in environment.items() if name.endswith(("_DIR", "HOME"))]
    assert len(kept) == 5
    assert all(path == volume or path.startswith(volume + "/") for path in kept)
    assert f"--home-dir {volume} --create-home" in DOCKERFILE, "the volume's folder belongs to the user"


def test_what_compiles_at_run_time_finds_a_compiler() -> None:
    installed = next(argument for stage, what, argument in INSTRUCTIONS if (stage, what) == ("runtime", "RUN"))
    assert {"gcc", "libc6-dev"} <= set(installed.split())
    folders = (ROOT / "cache/kernels/c", ROOT / "server/models/cpu/c")
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.[ch]")]
    headers = {header for source in sources for header in re.findall(r"#include <([\w/.]+)>", source)}
    assert headers
    assert headers <= OF_GCC, "another header may need another package"


# --- the health check ---


def healthcheck(port: int) -> int:
    """Run the image's own check against a port of this machine; its exit code."""
    command = json.loads(only("HEALTHCHECK").split("CMD ", 1)[1])
    assert command[:2] == ["python", "-I"]
    source, target = next(
        argument.split() for _, what, argument in INSTRUCTIONS if what == "COPY" and "healthcheck" in argument
    )
    assert command[2] == target
    environment = {**os.environ, "PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, "-I", ROOT / source], check=False, env=environment, timeout=30).returncode


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    """A server that asks for a key and has answered a few requests."""
    base = str(serve_module(model_id=str(tiny_checkpoint), api_key="secret"))
    headers = {"Authorization": "Bearer secret"}
    for _ in range(2):
        body = {"prompt": "Hello " * 40, "max_tokens": 3}
        httpx.post(f"{base}/generate", json=body, headers=headers, timeout=60).raise_for_status()
    return base


def test_the_health_check_passes_when_the_server_is_ready(url: str) -> None:
    assert healthcheck(httpx.URL(url).port or 0) == 0


def test_the_health_check_fails_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert healthcheck(port) == 1


def test_the_health_check_fails_while_ready_says_503() -> None:
    class Loading(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if self.path == "/ready" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Loading) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert healthcheck(server.server_port) == 1
        thread.join()


# --- compose.yaml ---


def interpolated(value: object) -> set[str]:
    """Names of the variables in ${…} anywhere in a part of the file."""
    return set(re.findall(r"\$\{(\w+)", json.dumps(value)))


def test_compose_fits_the_schema() -> None:
    program("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml")


@pytest.mark.parametrize("name", SERVERS)
def test_every_setting_reaches_the_server_and_nothing_else_is_named(name: str) -> None:
    service = SERVICES[name]
    passed = [entry for entry in service["environment"] if "=" not in entry]
    assert len(set(passed)) == len(passed)
    assert set(passed) - OF_LIBRARIES.keys() == SETTINGS - OF_THE_HOST, "run `make docs`"
    own = {"gpu": {"GPU_ID"}, "gpus": {"TENSOR_PARALLEL_SIZE"}}.get(name, set())
    own |= {"SHUTDOWN_NOTICE_S", "SHUTDOWN_TIMEOUT_S", "MODELS_DIR", "CACHE_DIR", "API_KEY_FILE"}
    assert interpolated(service) == own | ({"HOST", "PORT"} if service["ports"] else set())


def test_variables_of_compose_are_explained_or_settings() -> None:
    assert interpolated(COMPOSE) - SETTINGS == OF_COMPOSE
    comments = "\n".join(re.findall(r"^#.*", (DOCKER / "compose.yaml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"MODELS_DIR", "GPU_ID", *OF_THE_HOST} <= set(re.findall(r"[A-Z_]{4,}", comments))


def test_no_variable_has_a_name_that_kubernetes_injects() -> None:
    names = interpolated(COMPOSE) | set(image_environment()) | SETTINGS
    assert [name for name in names if re.search(r"._(PORT|HOST|SERVICE_HOST|SERVICE_PORT)$", name)] == []


def test_ports_agree() -> None:
    inside = image_environment()["PORT"]
    assert only("EXPOSE") == inside
    fields = Settings.model_fields
    published = f"${{HOST:-{fields['host'].default}}}:${{PORT:-{fields['port'].default}}}:{inside}"
    assert all(SERVICES[name]["ports"] == [published] for name in {*SERVERS, "router"} - {*REPLICAS})
    assert all(SERVICES[name]["ports"] == [] for name in REPLICAS)
    others = [port for name in SERVICES.keys() - {*SERVERS, "router"} for port in SERVICES[name]["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in others), "what asks for no key is not published to the network"


def test_the_server_may_write_to_its_volume_and_tmp_only() -> None:
    volume = only("VOLUME")
    for name in SERVERS:
        writable = [mount for mount in SERVICES[name]["volumes"] if not mount.endswith(":ro")]
        assert [mount.rsplit(":", 1)[1] for mount in writable] == [volume]
        assert [mount.split(":")[0] for mount in SERVICES[name]["tmpfs"]] == ["/tmp"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "user"}
    assert all("docker.sock" not in mount for mount in service["volumes"])


def test_a_stop_waits_for_the_drain() -> None:
    default = Settings.model_fields["shutdown_timeout_s"].default
    for name in SERVERS:
        match = re.fullmatch(
            r"\$\{SHUTDOWN_NOTICE_S:-0\}s\$\{SHUTDOWN_TIMEOUT_S:-(\d+)\}s(\d+)s", SERVICES[name]["stop_grace_period"]
        )
        assert match
        assert float(match[1]) == default
        assert int(match[2]) > CLOSE_GRACE_S


def test_gpus_are_reserved_by_the_servers_that_use_them() -> None:
    for name in set(SERVERS) - {"cpu"}:
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
        assert device.get("count", "${TENSOR_PARALLEL_SIZE:-1}") == "${TENSOR_PARALLEL_SIZE:-1}"
        assert ("count" in device) == (name == "gpus")
        chosen = {"gpu": ["${GPU_ID:-0}"]} | {name: [name.removeprefix("replica")] for name in REPLICAS}
        assert device.get("device_ids") == chosen.get(name)
    assert "deploy" not in SERVICES["cpu"]
    targets = {name: SERVICES[name]["build"]["target"] for name in SERVERS}
    assert targets == {name: "cpu" if name == "cpu" else "gpu" for name in SERVERS}


def test_a_profile_has_as_many_replicas_as_its_name_says() -> None:
    for count in range(2, len(REPLICAS) + 1):
        chosen = {name for name, service in SERVICES.items() if f"replicas-{count}" in service.get("profiles", ())}
        assert chosen == {*REPLICAS[:count], "router"}


def router_files(folder: Path) -> tuple[Path, Path]:
    """What the router's command makes, here as in the container: nginx's file, and that of its servers."""
    source, inside = SERVICES["router"]["volumes"][0].split(":")[:2]
    script, start = SERVICES["router"]["command"][-1].rsplit(" && ", 1)
    assert start == "exec nginx -c /tmp/nginx.conf -g 'daemon off;'"
    here = script.replace("$$", "$").replace("/tmp/", f"{folder}/").replace(inside, str(DOCKER / source))
    subprocess.run(["sh", "-c", here], check=True)
    return folder / "nginx.conf", folder / "replicas.conf"


def test_the_router_is_the_recipe_with_the_names_of_the_replicas(tmp_path: Path) -> None:
    """Nothing in it names this host any more."""
    router, port = SERVICES["router"], image_environment()["PORT"]
    assert "depends_on" not in router, "what is not there yet is found by its name later"
    file, servers = router_files(tmp_path)
    made = file.read_text(encoding="utf-8")
    assert f"include {servers};" in made
    named = re.findall(r"server (\S+) .* resolve;", servers.read_text(encoding="utf-8"))
    assert named == [f"{name}:{port}" for name in REPLICAS]
    assert re.findall(r"listen (.*);", made) == [router["ports"][0].rpartition(":")[2]]
    assert re.findall(r"127\.[\d.]+", made) == ["127.0.0.11"], "where containers ask for names"


def test_replicas_without_gpus_have_their_share_of_cores() -> None:
    text = (DOCKER / "replicas-cpu.yaml").read_text(encoding="utf-8")
    services = yaml.safe_load(text.replace("deploy: !override", "deploy:"))["services"]
    assert tuple(services) == REPLICAS
    for service in services.values():
        assert service["deploy"] == {"resources": {"limits": {"cpus": "${REPLICA_CPUS:-1}"}}}
        assert (service["image"], service["build"]["target"]) == (SERVICES["cpu"]["image"], "cpu")


def test_mounts_of_the_host_exist() -> None:
    mounts = [mount.split(":")[0] for service in SERVICES.values() for mount in service["volumes"] if mount[0] != "$"]
    for source in mounts:
        assert source in COMPOSE["volumes"] or (DOCKER / source).exists(), source
    named = {name for mount in json.dumps(SERVICES).split('"') for name in re.findall(r"^\$\{\w+:-(\w+)\}:/", mount)}
    assert named | {source for source in mounts if source[0] != "."} == COMPOSE["volumes"].keys()
    for name in SERVERS:
        build = SERVICES[name]["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()


# --- compose itself, where it is installed ---


def compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if version.returncode == 0 and not version.stdout.startswith(("1.", "v1.")):
                return command
    return None


@pytest.fixture(scope="module")
def compose() -> list[str]:
    command = compose_command()
    if command is None:
        pytest.skip("docker compose is not installed")
    return [*command, "-f", "docker/compose.yaml"]


def run_compose(compose: list[str], *arguments: str, **variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    command = [*compose, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=inherited | variables)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        ([], {"gpu"}),
        (["cpu"], {"cpu"}),
        (["gpus"], {"gpus"}),
        (["replicas-2"], {"replica0", "replica1", "router"}),
        (["replicas-8"], {*REPLICAS, "router"}),
        (["gpu", "monitoring"], {"gpu", "prometheus", "grafana"}),
        (["cpu", "monitoring"], {"cpu", "prometheus", "grafana"}),
        (["monitoring"], {"prometheus", "grafana"}),
    ],
)
def test_profiles_choose_the_services(compose: list[str], profiles: list[str], services: set[str]) -> None:
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    assert set(run_compose(compose, *flags, "config", "--services").split()) == services


def test_compose_passes_what_is_set_and_leaves_the_rest(compose: list[str]) -> None:
    given = {"MODEL_ID": "owner/model", "SHUTDOWN_TIMEOUT_S": "100", "HOST": "0.0.0.0", "PORT": "9000", "GPU_ID": "1"}
    server = json.loads(run_compose(compose, "config", "--format", "json", **given))["services"]["gpu"]
    environment = server["environment"]
    assert {name for name, value in environment.items() if value} == {"MODEL_ID", "SHUTDOWN_TIMEOUT_S"}
    assert all(value is None for name, value in environment.items() if name not in {*given, "API_KEY_FILE"})
    assert server["stop_grace_period"] == "1m55s"
    (port,) = server["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "9000", 8000)
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["1"]


def test_compose_gives_replicas_a_gpu_or_cores_each(compose: list[str]) -> None:
    def replicas(*more: str) -> list[Any]:
        text = run_compose([*compose, *more], "--profile", "replicas-3", "config", "--format", "json", REPLICA_CPUS="4")
        services = json.loads(text)["services"]
        assert services.keys() == {*REPLICAS[:3], "router"}
        return [services[name] for name in REPLICAS[:3]]

    devices = [one["deploy"]["resources"]["reservations"]["devices"] for one in replicas()]
    assert [[device["device_ids"] for device in own] for own in devices] == [[["0"]], [["1"]], [["2"]]]
    for one in replicas("-f", "docker/replicas-cpu.yaml"):
        assert (one["image"], one["build"]["target"]) == ("prerope:cpu", "cpu")
        assert one["deploy"]["resources"].keys() == {"limits"}
        assert float(one["deploy"]["resources"]["limits"]["cpus"]) == 4


def test_compose_mounts_folders_of_the_host(compose: list[str]) -> None:
    given = {"CACHE_DIR": "/srv/cache", "MODELS_DIR": "/srv/models", "API_KEY_FILE": "/srv/keys"}
    server = json.loads(run_compose(compose, "config", "--format", "json", **given))["services"]["gpu"]
    mounts = {mount["target"]: (mount["type"], mount["source"]) for mount in server["volumes"]}
    assert mounts["/cache"] == ("bind", "/srv/cache")
    assert mounts["/models"] == ("bind", "/srv/models")
    assert mounts[server["environment"]["API_KEY_FILE"]] == ("bind", "/srv/keys")
    assert "CACHE_DIR" not in server["environment"]


# --- monitoring ---

DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "prerope.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]


@pytest.fixture(scope="module")
def exposed(url: str) -> dict[str, set[str]]:
    """Sample name → label names, of a running server's /metrics, read without a key as Prometheus reads it."""
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0]
    text = httpx.get(url + scrape["metrics_path"]).raise_for_status().text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def parsed(expression: str) -> Any:
    """The expression's syntax tree, Grafana's variables filled in as it would. Raises ValueError."""
    filled = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
    assert "$" not in filled
    return promql_parser.parse(filled)


def nodes(expression: Any) -> Iterator[Any]:
    """Every node of a PromQL syntax tree."""
    yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        child = getattr(expression, name, None)
        for each in child if isinstance(child, list) else [child] if child is not None else []:
            yield from nodes(each)


def selectors(expression: str) -> list[Any]:
    return [node for node in nodes(parsed(expression)) if isinstance(node, promql_parser.VectorSelector)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_panels_show_metrics_and_labels_that_the_server_has(expression: str, exposed: dict[str, set[str]]) -> None:
    found = selectors(expression)
    assert found
    labels: set[str] = set()
    for selector in found:
        assert selector.name in exposed, f"{selector.name} is not in /metrics"
        labels |= exposed[selector.name]
        named = {matcher.name for matcher in selector.matchers.matchers}
        assert named <= exposed[selector.name], f"{selector.name} has no label {named - exposed[selector.name]}"
    for grouping in re.findall(r"\bby \(([\w, ]+)\)", expression):
        assert set(re.findall(r"\w+", grouping)) <= labels


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_counters_are_read_as_rates(expression: str) -> None:
    """A bare counter climbs for ever; a rate of a gauge means nothing."""
    rated = {
        node.args[0].vector_selector.name
        for node in nodes(parsed(expression))
        if isinstance(node, promql_parser.Call) and node.func.name == "rate"
    }
    for selector in selectors(expression):
        is_counter = selector.name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert (selector.name in rated) == is_counter, selector.name


def test_a_wrong_expression_is_found(exposed: dict[str, set[str]]) -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parsed("sum(rate(vllm:prompt_tokens_total[5m])")
    (selector,) = selectors("sum(rate(vllm:no_such_total[$__rate_interval]))")
    assert selector.name not in exposed


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own


def test_grafana_finds_prometheus_and_prometheus_finds_the_server() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    listened = SERVICES["prometheus"]["ports"][0].rsplit(":", 1)[1]
    assert source["url"] == f"http://prometheus:{listened}"
    used = {panel["datasource"]["uid"] for panel in PANELS}
    used |= {variable["datasource"]["uid"] for variable in DASHBOARD["templating"]["list"]}
    assert used == {source["uid"]}
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert (found["names"], found["type"], found["port"]) == (["prerope"], "A", int(image_environment()["PORT"]))
    assert all(SERVICES[name]["networks"]["default"]["aliases"] == ["prerope"] for name in SERVERS)


def test_grafana_finds_the_dashboard() -> None:
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    provider = yaml.safe_load((DOCKER / "grafana" / "provisioning" / "dashboards" / "prerope.yaml").read_text())
    folder = mounts["./grafana/dashboards"]
    assert provider["providers"][0]["options"]["path"] == folder
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/prerope.json"
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_prometheus_reads_the_file_that_is_mounted() -> None:
    service = SERVICES["prometheus"]
    flags = dict(flag.split("=", 1) for flag in service["command"])
    mounts = dict(mount.split(":")[:2] for mount in service["volumes"])
    assert flags["--config.file"] == mounts["./prometheus.yml"]
    assert flags["--storage.tsdb.path"] == mounts["prometheus"]


def test_the_health_check_needs_the_standard_library_only() -> None:
    tree = ast.parse((DOCKER / "healthcheck.py").read_text(encoding="utf-8"))
    names = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert names <= sys.stdlib_module_names
