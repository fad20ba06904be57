"""How much of the machine was used by others while a server was measured: by programs that are no part of it.

On few cores a busy neighbour slows a server tenfold, since its threads wait for one another. This makes it known,
so that a disturbed run can be repeated or at least be told from a clean one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
DISTURBED_CORES = 0.2
"""More than this in use by others, and a run counts as disturbed."""


@dataclass(frozen=True, slots=True)
class CpuMeter:
    """CPU seconds so far: of the whole machine, and of the server with this client."""

    at: float
    machine_s: float
    measured_s: float

    @classmethod
    def read(cls, server: psutil.Process | None) -> CpuMeter:
        """`server` with its descendants; None counts this process alone."""
        times = psutil.cpu_times()
        waiting = times.idle + getattr(times, "iowait", 0.0)
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
        members = [psutil.Process(), *_tree(server)]
        return cls(time.perf_counter(), sum(times) - guest - waiting, sum(_cpu_seconds(member) for member in members))

    def others_since(self, before: CpuMeter) -> float:
        """Cores in use by others between two readings."""
        machine = self.machine_s - before.machine_s
        measured = self.measured_s - before.measured_s
        return max(0.0, machine - measured) / max(1e-9, self.at - before.at)


def listener(url: str) -> psutil.Process | None:
    """The process on this machine that answers at `url`; None where it is elsewhere, or not to be seen."""
    parts = urlsplit(url)
    if parts.hostname not in LOCAL_HOSTS:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with contextlib.suppress(psutil.AccessDenied, psutil.NoSuchProcess):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    return None


async def quiet(deadline: float, sample_s: float = 0.5) -> bool:
    """Wait until others leave the machine alone; False where they did not before `deadline` (time.monotonic)."""
    while True:
        before = CpuMeter.read(None)
        await asyncio.sleep(sample_s)
        if CpuMeter.read(None).others_since(before) <= DISTURBED_CORES:
            return True
        if time.monotonic() >= deadline:
            return False


def _tree(process: psutil.Process | None) -> list[psutil.Process]:
    if process is None:
        return []
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [member for member in family if member.pid != os.getpid()]


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0  # it ended: what it used before is in no reading, and counts as others'
    return float(times.user + times.system)
