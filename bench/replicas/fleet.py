"""Replicas behind something that people run before them: started, one of them killed, all of them restarted in turn.

Behind   processes of `prerope.server`, and nginx, vllm-router or LiteLLM's proxy before them; whoever is killed is
         started again, as a supervisor would
OnRay    `serve run prerope.server.ray_app:app`, where Ray starts replicas, and starts them again
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.shared.machine import free_port
from bench.shared.servers import end, http_client, start, until

ROOT = Path(__file__).parents[2]
READY_S, NOTICE_S = 180.0, 3
KEY = f"sk-{secrets.token_hex(16)}"
"""LiteLLM's proxy does not start without one; the others ask for none."""


async def answers(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until GET url is 200."""
    async with http_client(timeout=5) as client:

        async def answered() -> bool:
            try:
                return (await client.get(url)).is_success
            except httpx.HTTPError:
                return False

        await until(answered, url, READY_S, process)


async def scraped(url: str, names: Sequence[str], label: str = "") -> dict[str, float]:
    """/metrics: value of a label → the sum of its samples of these names; 0 where it has none."""
    async with http_client(timeout=READY_S) as client:
        text = (await client.get(f"{url}/metrics")).text
    found = defaultdict[str, float](float)
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        if label in ("", *sample.labels):
            found[sample.labels.get(label, "")] += sample.value if sample.name in names else 0
    return dict(found)


@dataclass(slots=True)
class Fleet:
    """`size` replicas of `threads` threads each; `program` is the router's or Ray Serve's executable."""

    size: int
    threads: int
    program: str
    out: Path
    port: int = field(default_factory=free_port)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        raise NotImplementedError

    async def kill_one(self) -> str:
        """With -9, and see to it that one comes in its place; that one's name, where it is known before."""
        raise NotImplementedError

    async def restart_each(self) -> None:
        raise NotImplementedError

    async def measured(self, *names: str) -> dict[str, float]:
        """Replica → the sum of its samples of these names."""
        raise NotImplementedError

    async def finished(self) -> dict[str, float]:
        """Replica → requests that it has finished."""
        return await self.measured("vllm:request_success_total")

    async def held(self) -> dict[str, float]:
        """Replica → requests that run or wait there."""
        return await self.measured("vllm:num_requests_running", "vllm:num_requests_waiting")

    def run(self, command: Sequence[str], name: str, **variables: str) -> subprocess.Popen[bytes]:
        own = {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT)}
        self._processes.append(start(command, self.out / f"{name}.log", **(own | variables)))
        return self._processes[-1]

    def stop(self) -> None:
        for process in self._processes:
            end(process, signal.SIGINT)


@dataclass(slots=True)
class Behind(Fleet):
    """`kind`: nginx, vllm-router, litellm, or none, where a single replica is asked itself."""

    kind: str = "none"
    policy: str = "cache_aware"  # of vllm-router
    _ports: list[int] = field(default_factory=list)
    _replicas: list[subprocess.Popen[bytes]] = field(default_factory=list)

    async def start(self) -> None:
        self._ports = [self.port] if self.kind == "none" else [free_port() for _ in range(self.size)]
        for number in range(self.size):
            self._replicas.append(self._replica(number))
            await answers(self._health(number), self._replicas[number])  # then the next: each is checked by trials
        if self.kind != "none":
            probe = "health/liveliness" if self.kind == "litellm" else "health"
            variables = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # nothing is fetched
            await answers(f"{self.url}/{probe}", self.run(self._router(), self.kind, **variables))

    def _health(self, number: int) -> str:
        return f"http://127.0.0.1:{self._ports[number]}/health"

    def _replica(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "prerope.server", "--port", str(self._ports[number])]
        return self.run(command, f"replica{number}", SHUTDOWN_NOTICE_S=str(NOTICE_S))

    def _router(self) -> list[str]:
        if self.kind == "nginx":
            return [self.program, "-c", self._recipe("nginx.conf"), "-g", "daemon off;"]
        if self.kind == "litellm":
            own = "--host", "127.0.0.1", "--port", str(self.port)
            return [self.program, "--config", self._recipe("litellm.yaml"), *own]
        workers = [f"http://127.0.0.1:{port}" for port in self._ports]
        health = ("check-interval-secs", "1"), ("failure-threshold", "2"), ("success-threshold", "1")
        return [
            *(self.program, "--worker-urls", *workers, "--policy", self.policy, "--port", str(self.port)),
            *(part for name, value in health for part in (f"--health-{name}", value)),
            *("--cb-timeout-duration-secs", "5", "--prometheus-port", str(free_port())),
        ]

    def _recipe(self, name: str) -> str:
        """A file of docker/ with these ports, and a line for each replica."""
        text = (ROOT / "docker" / name).read_text(encoding="utf-8").replace("/tmp/prerope-", f"{self.out.resolve()}/")
        first, second = (re.findall(rf"^.*127\.0\.0\.1:{port}.*\n", text, re.MULTILINE)[0] for port in (8001, 8002))
        lines = "".join(first.replace("127.0.0.1:8001", f"127.0.0.1:{port}") for port in self._ports)
        text = text.replace(second, "").replace(first, lines).replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        (self.out / name).write_text(text)
        return str((self.out / name).resolve())

    async def kill_one(self) -> str:
        self._replicas[0].kill()
        self._replicas[0].wait()
        self._replicas[0] = self._replica(0)
        return str(self._ports[0])

    async def restart_each(self) -> None:
        for number in range(self.size):
            self._replicas[number].terminate()
            await asyncio.to_thread(self._replicas[number].wait)
            self._replicas[number] = self._replica(number)
            await answers(self._health(number), self._replicas[number])
            await asyncio.sleep(NOTICE_S)  # until the router has seen it

    async def measured(self, *names: str) -> dict[str, float]:
        return {str(port): (await scraped(f"http://127.0.0.1:{port}", names))[""] for port in self._ports}


@dataclass(slots=True)
class OnRay(Fleet):
    """A cluster of this machine, with as many CPUs for Ray's book-keeping as the replicas are to have threads.

    grows: from one replica to `size`, by what waits.
    """

    grows: bool = False

    async def start(self) -> None:
        text = (ROOT / "docker/ray.yaml").read_text(encoding="utf-8").replace("port: 8000", f"port: {self.port}")
        text = text.replace("max_replicas: 2", f"max_replicas: {self.size}")
        text = text.replace("min_replicas: 2", f"min_replicas: {1 if self.grows else self.size}")
        text += f"      num_cpus: {min(self.threads, (os.cpu_count() or 1) / self.size)}\n"
        if self.grows:
            text += "      queued_tokens: 1000\n      upscale_delay_s: 2\n      downscale_delay_s: 10\n"
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "ray.yaml").write_text(text)
        process = self.run([self.program, "run", str(self.out / "ray.yaml")], "ray", **self._variables())
        await answers(f"{self.url}/ready", process)
        await self._until(lambda names: self.grows or len(names) >= self.size)

    def _variables(self) -> dict[str, str]:
        # Of this machine alone; and what Ray keeps objects in is memory that replicas want.
        return {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",
        }

    async def kill_one(self) -> str:
        family = psutil.Process(self._processes[0].pid).children(recursive=True)
        next(one for one in family if "ServeReplica:prerope:Replica" in " ".join(one.cmdline())).kill()
        return ""

    async def restart_each(self) -> None:
        """By deploying it again with another setting."""
        before = set(await self.finished())
        sizes = f"min_replicas={self.size}", f"num_cpus={min(self.threads, (os.cpu_count() or 1) / self.size)}"
        command = [self.program, "run", "--non-blocking", "--address", "auto", "--name", "prerope"]
        deploy = self.run(
            [*command, "prerope.server.ray_app:app", *sizes], "redeploy", CLIENT_TIMEOUT_S="59", **self._variables()
        )
        await asyncio.to_thread(deploy.wait)
        await self._until(lambda names: len(names) >= self.size and not names & before)

    async def _until(self, met: Callable[[set[str]], bool]) -> None:
        """Until Ray has such replicas."""

        async def has_them() -> bool:
            return met(set(await self.finished()))

        await until(has_them, "what Ray has of replicas", READY_S)

    async def measured(self, *names: str) -> dict[str, float]:
        return await scraped(self.url, names, "replica")
