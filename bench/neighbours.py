"""How much of the machine was used by others while a server was measured: by programs that are no part of it.

On few cores a busy neighbour slows a server tenfold, since its threads wait for one another. This makes it known,
so that a disturbed run can be repeated or at least be told from a clean one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
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
    def read(cls, server: Iterable[psutil.Process]) -> CpuMeter:
        """`server`: its processes, counted with their descendants."""
        times = psutil.cpu_times()
        waiting = times.idle + getattr(times, "iowait", 0.0)
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
        members = {psutil.Process(), *(member for process in server for member in _tree(process))}
        return cls(time.perf_counter(), sum(times) - guest - waiting, sum(_cpu_seconds(member) for member in members))

    def others_since(self, before: CpuMeter) -> float:
        """Cores in use by others between two readings."""
        machine = self.machine_s - before.machine_s
        measured = self.measured_s - before.measured_s
        return max(0.0, machine - measured) / max(1e-9, self.at - before.at)


def listeners(url: str) -> list[psutil.Process]:
    """The processes on this machine that hold the port of `url`; none where it is elsewhere, or not to be seen.

    A server's workers may have inherited its socket, and are then listed beside it.
    """
    parts = urlsplit(url)
    if parts.hostname not in LOCAL_HOSTS:
        return []
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    found = {c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid}
    return [psutil.Process(pid) for pid in sorted(found) if psutil.pid_exists(pid)]


async def quiet(deadline: float, sample_s: float = 0.5) -> bool:
    """Wait until others leave the machine alone; False where they did not before `deadline` (time.monotonic)."""
    while True:
        before = CpuMeter.read(())
        await asyncio.sleep(sample_s)
        if CpuMeter.read(()).others_since(before) <= DISTURBED_CORES:
            return True
        if time.monotonic() >= deadline:
            return False


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0  # it ended: what it used before is in no reading, and counts as others'
    return float(times.user + times.system)
