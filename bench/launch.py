"""Starts and stops a server from its command line, in a process group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench.client import Server, ServerUnusable

STOP_TIMEOUT_S = 20.0
POLL_S = 0.5


@contextlib.asynccontextmanager
async def launched(server: Server, command: str, log: Path, timeout_s: float) -> AsyncIterator[None]:
    """Run `command` until the block ends, once the server is ready; its output goes to `log`.

    Raises:
        ServerUnusable: it ended, or was not ready in time; the message has the end of its output. Also where
            something answers already: that would be measured in its place.
    """
    if await server.is_ready():
        raise ServerUnusable(f"{server.name}: something answers at {server.url} already: stop it, or drop --launch")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220  starting takes milliseconds, and nothing else runs yet
            shlex.split(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        await _wait_until_ready(server, process, log, timeout_s)
        yield
    finally:
        await _stop(process)


async def wait_until_ready(server: Server, timeout_s: float) -> None:
    """For a server that someone else started."""
    deadline = time.monotonic() + timeout_s
    while not await server.is_ready():
        if time.monotonic() > deadline:
            raise ServerUnusable(f"{server.name}: nothing ready at {server.url} after {timeout_s:g} s")
        await asyncio.sleep(POLL_S)


async def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await server.is_ready():
        if process.poll() is not None:
            raise ServerUnusable(f"{server.name} ended with status {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerUnusable(f"{server.name} was not ready after {timeout_s:g} s:\n{_tail(log)}")
        await asyncio.sleep(POLL_S)


async def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: kindly, then at once. A launcher's children may outlive it, so the group is killed last."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_group(process.pid, number)
        await _wait_until_ended(process, STOP_TIMEOUT_S)


async def _wait_until_ended(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(process.wait, timeout_s)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, number)


def _tail(log: Path, num_lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
