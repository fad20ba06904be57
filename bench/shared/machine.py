"""What a reader of figures must know of the machine they were taken on, who used it meanwhile, and a port of it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from bench import BenchError

DISTURBED_CORES = 0.2
"""More than this in use by others, and a run counts as disturbed: threads of a server wait for one another."""


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where and when figures are taken: no names of hosts or paths. device: with its name and the versions for it."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_at_start": list(os.getloadavg()),
    }
    if device is not None:
        about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        installed = {name.lower(): name for dist in importlib.metadata.distributions() if (name := dist.name)}
        names = installed.keys() & {"torch", "triton", "transformers"}
        about |= {name: importlib.metadata.version(name) for name in names}
    return about


def card(toy: bool) -> torch.device:
    """The GPU; at toy size the CPU, which proves a program and measures nothing."""
    if not toy and not torch.cuda.is_available():
        raise BenchError("torch sees no CUDA device; --toy needs none")
    return torch.device("cpu" if toy else "cuda")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def cpu_name() -> str:
    """The processor's model as Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


class OthersMeter:
    """How many cores programs use, since it was made, that are neither this one nor the watched ones."""

    def __init__(self, watched: Iterable[psutil.Process]) -> None:
        self._watched = [psutil.Process(), *watched]
        self._began, self._before = time.perf_counter(), self._others()

    def cores(self) -> float:
        used = max(0.0, self._others() - self._before)
        return used / max(1e-9, time.perf_counter() - self._began)

    def _others(self) -> float:
        times = psutil.cpu_times()
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
        busy = sum(times) - guests - times.idle - getattr(times, "iowait", 0.0)
        return float(busy) - cpu_seconds(*self._watched)


def listeners(url: str) -> list[psutil.Process]:
    """The processes on this machine that hold the port of `url`, if it is here and they may be seen."""
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        return []
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    found = {c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == parts.port and c.pid}
    return [psutil.Process(pid) for pid in sorted(found) if psutil.pid_exists(pid)]


def cpu_seconds(*processes: psutil.Process) -> float:
    """Of processes, their children, and those of them that have ended; nothing of one that has ended itself."""
    found = dict[psutil.Process, float]()
    for process in processes:
        with suppress(psutil.Error):
            for one in (process, *process.children(recursive=True)):
                times = one.cpu_times()
                found[one] = times.user + times.system + times.children_user + times.children_system
    return sum(found.values())
