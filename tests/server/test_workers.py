"""Processes that do clients' work: whose fault an end is, and that an innocent task does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prerope.server.errors import EngineUnavailable, InvalidRequest
from prerope.server.machine.threads import ASIDE
from prerope.server.workers import children
from prerope.server.workers.children import WorkerLost
from prerope.server.workers.fair import FairSemaphore
from prerope.server.workers.messages import Limits
from prerope.server.workers.pool import Lane, Workers

from tests.server.tasks import (
    Busy,
    Ended,
    Full,
    Large,
    LargeWorld,
    Manner,
    NoWorld,
    Templates,
    Unsendable,
    WhatWasFound,
)

LANE = Lane("test", at_once=2, limits=Limits(cpu_s=1, memory_bytes=64 * 2**20), doing="testing")


def with_workers(use: Callable[[Workers], Awaitable[None]], world: Callable[[], Any] = NoWorld) -> None:
    async def main() -> None:
        workers = Workers(world, (LANE,))
        try:
            async with asyncio.timeout(120):
                await use(workers)
        finally:
            workers.close()

    asyncio.run(main())


def test_an_idle_worker_that_is_killed_is_not_noticed() -> None:
    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(-9, "/"), "test") == "done"
        for settle_s in (0.2, 0.0):
            assert workers._forking is not None
            assert workers._zygote is not None
            await workers._forking
            for child in workers._zygote.standby:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(settle_s)  # noqa: ASYNC251 - the loop does not see it before it asks
            assert await workers.run(Ended(-9, "/"), "test") == "done"
        assert workers.num_failed == 0

    with_workers(use)


def test_a_task_whose_process_somebody_ends_is_begun_again_once(tmp_path: Any) -> None:
    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(-signal.SIGKILL, str(tmp_path / "killed")), "test") == "done"
        for how in (-signal.SIGKILL, -signal.SIGTERM, 0, 1):
            with pytest.raises(EngineUnavailable, match="helper process"):
                await workers.run(Ended(how), "test")
        zygote = workers._zygote
        assert zygote is not None
        zygote.process.kill()
        assert await workers.run(Ended(0, "/"), "test") == "done"

    with_workers(use)


def test_a_task_whose_process_stands_still_is_begun_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped has no end, passes no limit, and closes nothing; one that works is not taken for it."""
    monkeypatch.setattr(children, "LOOK_S", 1.0)

    async def use(workers: Workers) -> None:
        began = time.monotonic()
        assert await workers.run(Ended(-signal.SIGSTOP, str(tmp_path / "stopped")), "test") == "done"
        assert time.monotonic() - began >= children.LOOK_S * children.STILL_LOOKS
        assert await workers.run(Ended(-signal.SIGSTOP, "/"), "test") == "done", "its place is free again"
        with pytest.raises(InvalidRequest, match="CPU time"):
            await workers.run(Busy(), "test")

    with_workers(use)


def test_where_the_kernel_tells_no_times_nobody_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "LOOK_S", 0.1)
    monkeypatch.setattr(children.Child, "_cpu_time", lambda _: [])

    async def use(workers: Workers) -> None:
        with pytest.raises(InvalidRequest, match="CPU time"):
            await workers.run(Busy(), "test")

    with_workers(use)


@pytest.mark.parametrize("task", [Ended(-signal.SIGABRT), Ended(-signal.SIGSEGV), Busy(), Large()], ids=str)
def test_what_a_task_brings_on_itself_is_the_clients(task: Any) -> None:
    async def use(workers: Workers) -> None:
        with pytest.raises(InvalidRequest) as refused:
            await workers.run(task, "test", param="prompt")
        assert refused.value.code == "too_much_work"

    with_workers(use)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has it")
def test_workers_leave_the_cores_to_the_engine() -> None:
    """In the server's own session, too: where each session has an equal share, being nice is nothing to another's."""

    async def use(workers: Workers) -> None:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert await workers.run(Manner(), "test") == (min(19, own + ASIDE), os.SCHED_BATCH, os.getsid(0))

    with_workers(use)


def test_what_cannot_be_sent_is_not_done_again() -> None:
    async def use(workers: Workers) -> None:
        with pytest.raises(RuntimeError, match="cannot be sent"):
            await workers.run(Unsendable(), "test")

    with_workers(use)


def test_one_line_cannot_fill_a_lane_and_others_come_in_turn() -> None:
    async def main() -> None:
        places, let_in, leave = FairSemaphore(2), list[str](), dict[str, asyncio.Event]()

        async def one(name: str) -> None:
            async with places.place(name[0]):
                let_in.append(name)
                await leave.setdefault(name, asyncio.Event()).wait()

        names = ["a1", "a2", "a3", "b1", "b2", "c1"]
        tasks = {name: asyncio.create_task(one(name)) for name in names}
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert let_in == ["a1", "b1"], "a place is kept for others"
        tasks["a2"].cancel()
        for name in ("b1", "a1", "c1", "a3", "b2"):
            leave.setdefault(name, asyncio.Event()).set()
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert let_in == ["a1", "b1", "b2", "a3", "c1"]
        assert places.num_waiting == 0
        async with places.place("a"), places.place("b"):
            pass

    asyncio.run(main())


def test_no_descriptor_left_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(0, "/"), "test") == "done"
        assert workers._forking is not None
        await workers._forking

        def none(*_: Any) -> Any:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr(socket, "socketpair", none)
            assert await workers.run(Ended(0, "/"), "test") == "done"  # by the one in waiting
            with pytest.raises(EngineUnavailable):
                await workers.run(Ended(0, "/"), "test")
        assert await workers.run(Ended(0, "/"), "test") == "done"

    with_workers(use)


def test_a_zygote_that_is_slow_to_read_is_waited_for() -> None:
    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(0, "/"), "test") == "done"
        zygote = workers._zygote
        assert zygote is not None
        zygote.control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the system gives
        zygote.process.send_signal(signal.SIGSTOP)
        tasks = [asyncio.create_task(zygote.fork()) for _ in range(16)]
        await asyncio.sleep(0.2)
        with pytest.raises(BlockingIOError):
            zygote.control.send(b"+")
        zygote.process.send_signal(signal.SIGCONT)
        for child in await asyncio.gather(*tasks):
            assert child.pid is not None
            child.end()

    with_workers(use)


@pytest.mark.parametrize("full", [False, True], ids=["asked", "that cannot be asked"])
def test_a_zygote_that_never_answers_is_replaced(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(0, "/"), "test") == "done"
        silent = workers._zygote
        assert silent is not None
        assert workers._forking is not None
        await workers._forking  # the child in waiting could still answer
        silent.process.send_signal(signal.SIGSTOP)
        assert await workers.run(Ended(0, "/"), "test") == "done"
        with contextlib.suppress(BlockingIOError):
            while full:
                silent.control.send(b"+" * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(children, "BEGIN_TIMEOUT_S", 0.2)
            with pytest.raises(WorkerLost):
                await silent.fork()
        assert await workers.run(Ended(0, "/"), "test") == "done"
        assert silent.process.returncode == -signal.SIGKILL
        assert workers._zygote is not silent

    with_workers(use)


def test_a_zygote_that_does_not_read_its_world_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[subprocess.Popen[bytes]]()
    popen = subprocess.Popen

    def stopped(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(*args, **options))
        begun[-1].send_signal(signal.SIGSTOP)
        return begun[-1]

    async def use(workers: Workers) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", stopped)
            patch.setattr(children, "BEGIN_TIMEOUT_S", 0.2)
            with pytest.raises(EngineUnavailable, match="timed out"):
                await workers.run(Ended(0, "/"), "test")
        assert begun
        assert all(one.returncode == -signal.SIGKILL for one in begun)
        assert await workers.run(Ended(0, "/"), "test") == "done"

    with_workers(use, LargeWorld)


def test_where_no_process_can_begin_a_request_is_a_503_and_later_ones_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"

    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(0, "/"), "test") == "done"
        first = workers._zygote
        assert first is not None
        assert workers._forking is not None
        await workers._forking
        full.touch()
        assert await workers.run(Ended(0, "/"), "test") == "done"  # by the one in waiting
        with pytest.raises(EngineUnavailable, match=r"Resource temporarily unavailable.*try again.*ulimit -u"):
            await workers.run(Ended(0, "/"), "test")
        full.unlink()
        assert await workers.run(Ended(0, "/"), "test") == "done"
        assert workers._zygote is first
        first.control.shutdown(socket.SHUT_RDWR)  # now the zygote is lost, and cannot be begun again at first
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", refused)
            for _ in range(3):
                with contextlib.suppress(EngineUnavailable):
                    await workers.run(Ended(0, "/"), "test")
        assert await workers.run(Ended(0, "/"), "test") == "done"
        assert await workers.run(Ended(0, "/"), "test") == "done"

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with_workers(use, lambda: Full(str(full)))


def test_a_zygote_that_is_given_up_is_no_longer_heard() -> None:
    """Its socket's number is soon another's, and the event loop would take one for the other."""

    async def use(workers: Workers) -> None:
        assert await workers.run(Ended(0, "/"), "test") == "done"
        assert workers._zygote is not None
        workers._zygote.alive = False  # as where nothing could be sent to it
        assert await workers.run(Ended(0, "/"), "test") == "done"
        with pytest.raises(InvalidRequest):  # as the new one tells
            await workers.run(Ended(-signal.SIGABRT), "test")

    with_workers(use)


def test_a_child_is_killed_and_never_another_process_of_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, began = list[int](), tmp_path / "began"
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))

    async def use(workers: Workers) -> None:
        task = asyncio.create_task(workers.run(Busy(str(began)), "test"))
        while not began.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        zygote = workers._zygote
        assert zygote is not None
        while -signal.SIGKILL not in zygote.ended.values():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        killed.append(zygote.process.pid)

    with_workers(use)
    assert set(killed) == {killed[0]}, "the zygote alone, which is waited for"


def test_a_chat_template_that_never_ends_or_takes_all_memory_is_never_run_again() -> None:
    """Found out in a process that may be killed; what refuses one word, or is no Jinja, is left to each request."""
    loops = "".join(f"{{% for {name} in range(9999) %}}" for name in "abcd") + "{% endfor %}" * 4
    large = ("{{ 'a' * 10**10 }}", "{% set x = messages[0].content * 10**10 %}{{ x }}")
    fine = ("{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% for")

    async def use(workers: Workers) -> None:
        assert await workers.run(WhatWasFound(), "test") == [True, True, True, False, False, False]

    with_workers(use, lambda: Templates((*fine, loops, *large)))
