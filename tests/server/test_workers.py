"""Processes that do clients' work: whose fault an end is, and that an innocent task does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prerope.server.api.chat.template import render_chat
from prerope.server.api.chat.trial import guard, is_tame
from prerope.server.api.fairness import TooLong, cut_off
from prerope.server.errors import EngineUnavailable, InvalidRequest
from prerope.server.machine.threads import ASIDE
from prerope.server.tokenizer import Tokenizer
from prerope.server.workers import children
from prerope.server.workers.children import WorkerLost
from prerope.server.workers.fair import FairSemaphore
from prerope.server.workers.messages import Limits
from prerope.server.workers.pool import Lane, Workers
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

LANE = Lane("test", at_once=2, limits=Limits(cpu_s=1, memory_bytes=64 * 2**20), doing="testing")


class NoWorld:
    def prepare(self) -> None:
        pass


@dataclass(frozen=True)
class LargeWorld(NoWorld):
    """More than a socket keeps for who does not read."""

    text: str = field(default_factory=lambda: "a" * 2**22)


@dataclass(frozen=True)
class Ended:
    """Ends its process: by a signal, or with a code (0 and up); the first time only, where `once` is a file to be."""

    how: int
    once: str = ""

    def run(self, world: Any) -> str:  # noqa: ARG002
        if not self.once or not os.path.exists(self.once):
            if self.once:
                open(self.once, "x").close()
            if self.how >= 0:
                os._exit(self.how)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), -self.how)
        return "done"


@dataclass(frozen=True)
class Manner:
    """How it is with others."""

    def run(self, world: Any) -> tuple[int, int, int]:  # noqa: ARG002
        return os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), os.getsid(0)


@dataclass(frozen=True)
class Unsendable:
    def run(self, world: Any) -> Any:  # noqa: ARG002
        return lambda: None


@dataclass(frozen=True)
class Busy:
    """For ever. began: a file to be."""

    began: str = ""

    def run(self, world: Any) -> None:  # noqa: ARG002
        if self.began:
            open(self.began, "x").close()
        while True:
            pass


@dataclass(frozen=True)
class Large:
    """What fits, but not twice: it is pickled."""

    def run(self, world: Any) -> str:  # noqa: ARG002
        return "x" * 150 * 2**20


@dataclass(frozen=True)
class Full:
    """A world in whose zygote no process can be forked while there is a file."""

    file: str

    def prepare(self) -> None:
        fork = os.fork

        def refuse() -> int:
            if os.path.exists(self.file):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return fork()

        os.fork = refuse


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


@pytest.mark.parametrize("endless", [lambda: [None for _ in itertools.count()], lambda: render_endlessly()])
def test_what_takes_long_on_the_loop_is_cut_off(endless: Callable[[], object]) -> None:
    """On the main thread, where the loop is, and also where it catches every Exception that it meets."""
    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(TooLong):
        cut_off(endless, 0.05)
    assert time.monotonic() - began < 5
    assert cut_off(lambda: 7) == 7
    assert (signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM)) == (0, before)


def test_a_timer_that_runs_out_as_the_work_ends_is_not_armed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Armed with the handler from before it would end the process a quarter of a second later."""
    set_timer, handlers = signal.setitimer, list[Any]()
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)  # others have the core

    def late(which: signal.ITIMER, seconds: float) -> None:
        handlers.append(signal.getsignal(signal.SIGALRM))
        set_timer(which, seconds)
        if not seconds:
            handlers[-1](signal.SIGALRM, None)  # it ran out before, and Python comes to it now

    monkeypatch.setattr(signal, "setitimer", late)
    assert cut_off(lambda: 7, 60) == 7
    assert len(handlers) == 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def render_endlessly() -> str:
    loops = "".join(f"{{% for {name} in range(9999) %}}" for name in "abcd")
    return render_chat(tokenizer_with(loops + "{% endfor %}" * 4), [{"role": "user", "content": "Hello"}])


def tokenizer_with(template: str) -> Tokenizer:
    pieces = {piece: index for index, piece in enumerate(("<s>", *"abcdefghijklmnopqrstuvwxyzH"))}
    hf = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE(pieces, [])), eos_token="<s>")
    hf.chat_template = template
    return Tokenizer(hf)


NS = "{% set ns = namespace(s='x', n=0, found=false) %}"
EACH = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "tame"),
    [
        # as people have them
        (EACH + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}", True),
        (NS + EACH + "{% if loop.index0 % 2 == 0 %}{% set ns.found = true %}{% endif %}{% endfor %}", True),
        (
            "{{ 'Cutting Knowledge Date: December 2023' }}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}",
            True,
        ),
        (NS + EACH + "{%- set ns.n = ns.n + 1 %}{%- set said = m.content -%}{{ said }}{% endfor %}{{ ns.n }}", True),
        (NS + EACH + "{% set ns.s = ns.s ~ m.content ~ '\n' %}{% endfor %}{{ ns.s }}", True),
        (
            "{% set all = messages | map(attribute='content') | join('\n') %}{{ all.split('</think>')[-1].strip() }}",
            True,
        ),
        (EACH + "{% if loop.last %}{{ tools | tojson }}{% endif %}{{ m.content }}{% endfor %}", True),
        ("{% macro one(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}" + EACH + "{{ one(m) }}{% endfor %}", True),
        (EACH + "{% for c in m.tool_calls %}{% for k, v in c.arguments|items %}{{ k ~ v }}" + "{% endfor %}" * 3, True),
        (EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", True),
        ("{{ messages[0].content|replace('<', '&lt;') }}{{ strftime_now('%d %b %Y') }}{{ bos_token }}", True),
        ("{% for m in messages[::-1] %}{{ m.content[:(m.content|length) // 2] }}{% endfor %}", True),
        # in one step or a few
        ("{{ m.content|replace('a', m.content)|replace('a', m.content)|length }}", False),
        ("{{ m.content.replace('', m.content) }}", False),
        ("{{ m.content.replace('', 'x') }}", False),
        ("{{ m.content" + "|replace('a', 'aaaaaaaaaa')" * 9 + " }}", False),
        ("{{ 'x'|center(9999)|list|join('y'|center(9999)) }}", False),
        ("{{ '%9999s' % m.content }}", False),
        ("{{ m.content % 3 }}", False),
        ("{% set f = 'a%' ~ 20 ~ '0000' ~ '0000d' %}{{ f % 1 }}", False),
        ("{{ '{:99999999}'.format(1) }}", False),
        ("{{ 'x' * 9 }}", False),
        ("{{ 9 * m.content }}", False),
        ("{{ [1] * (m.content|length) }}", False),
        ("{{ m.content ** 9 }}", False),
        ("{{ lipsum(9999) }}", False),
        ("{{ range(99999)|list|string }}{% for i in range(99999) %}{{ m }}{% endfor %}", False),
        ("{{ strftime_now('%99999999d') }}", False),
        ("{{ m|tojson(indent=m.content|length) }}", False),
        ("{{ m.content|indent(99999999) }}", False),
        ("{{ [[1]]|sum(start=m.content) }}", False),
        ("{{ (m|int(m.content)) * (m.content|length) }}", False),
        ("{{ loop.index * loop.length }}", False),
        ("{% macro f() %}{{ loop.index * loop.length }}{% endmacro %}" + EACH + "{{ f() }}{% endfor %}", False),
        ("{% set loop = m %}" + EACH + "{{ loop.index }}{% endfor %}", False),
        ("{{ strftime_now() }}{{ " + "9" * 5000 + " }}", False),
        # by steps that each make it twice as long
        (NS + "{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", False),
        (NS + "{% for i in range(40) %}{%- set ns.s=ns.s~ns.s -%}{% endfor %}", False),
        (NS + "{% for i in range(40) %}{% set both = ns.s ~ ns.s %}{% set ns.s = both %}{% endfor %}", False),
        (NS + EACH + "{% set ns.a = ns.b ~ m %}{% set ns.b = ns.a ~ ns.a %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s, ns.n = ns.s ~ ns.s, 1 %}{% endfor %}", False),
        (NS + EACH + "{% set other = ns %}{% set other.s = other.s ~ other.s %}{% endfor %}", False),
        (NS + EACH + "{% set ns.s = '}' ~ ns.s ~ ns.s %}{% endfor %}", False),
        ("{% set s = m.content %}" + "{% set s = s ~ s %}" * 30 + "{{ s|length }}", False),
        ("{% set s = m.content %}{% if m.x %}" + "{% set s -%}{{ s }}{{ s }}{% endset %}" * 30 + "{% endif %}", False),
        ("{% macro f(n, s) %}{{ f(n - 1, s ~ s) }}{% endmacro %}{{ f(9, 'x') }}", False),
        ("{% macro a(s) %}{{ s * 9 }}{% endmacro %}{{ a('x') }}", False),
        (
            "".join(f"{{% macro f{i}(s) %}}{{{{ f{i - 1}(s ~ s) }}}}{{% endmacro %}}" for i in range(40))
            + "{{ f39('x') }}",
            False,
        ),
        ("{% for a in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}", False),
        # by loops that have nothing to do with each other
        ("{% for a in m.content %}{% for b in m.content %}{{ m.content }}{% endfor %}{% endfor %}", False),
        (
            "{% set l = [] %}{% for a in m.content %}{% for b in m.content %}{% for c in m.content %}{{ a }}"
            + "{% endfor %}" * 3,
            False,
        ),
        # not known
        ("{% include 'x' %}", False),
        ("{% call f() %}{% endcall %}", False),
        ("{% for", False),
    ],
)
def test_a_template_that_may_multiply_texts_is_not_run_on_the_loop(template: str, tame: bool) -> None:
    assert is_tame(tokenizer_with(template)) is tame


@dataclass(frozen=True)
class Templates:
    """Templates that a zygote is to try."""

    templates: tuple[str, ...]

    def prepare(self) -> None:
        for template in self.templates:
            tokenizer = tokenizer_with(template)
            guard(tokenizer)
            self.found.append(tokenizer.template_fault is None)

    found: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class WhatWasFound:
    def run(self, world: Templates) -> list[bool]:
        return world.found


def test_a_chat_template_that_never_ends_or_takes_all_memory_is_never_run_again() -> None:
    """Found out in a process that may be killed; what refuses one word, or is no Jinja, is left to each request."""
    loops = "".join(f"{{% for {name} in range(9999) %}}" for name in "abcd") + "{% endfor %}" * 4
    large = ("{{ 'a' * 10**10 }}", "{% set x = messages[0].content * 10**10 %}{{ x }}")
    fine = ("{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% for")

    async def use(workers: Workers) -> None:
        assert await workers.run(WhatWasFound(), "test") == [True, True, True, False, False, False]

    with_workers(use, lambda: Templates((*fine, loops, *large)))
