"""Runs stages to their end or their limit, each a process whose output goes on and to NAME.log."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.stages import Stage

ROOT = Path(__file__).parent.parent.parent

GRACE_S = 12.0
"""A stage is told to end so long before it is ended, a fifth of its limit at most: what it found is told, and a server
that it started is stopped."""


@dataclass(frozen=True, slots=True)
class Ending:
    """last: the last line that the stage printed."""

    name: str
    seconds: float
    told: str
    last: str

    @property
    def failed(self) -> bool:
        return self.told.startswith(("failed", "ended"))


def run_all(group: Sequence[Stage], folder: Path) -> list[Ending]:
    """All at once; as they were given."""
    if not group:
        return []
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(lambda stage: run(stage, folder), group))


def run(stage: Stage, folder: Path) -> Ending:
    """One that needs a tool or a module that is not there is left out."""
    for suffix in ("json", "md", "log"):  # of an earlier run
        (folder / f"{stage.name}.{suffix}").unlink(missing_ok=True)
    if missing := _missing(stage):
        return Ending(stage.name, 0.0, f"left out: there is no {missing}", "")
    began, last, cut = time.monotonic(), "", threading.Event()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.variables}
    with (
        (folder / f"{stage.name}.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True, preexec_fn=_heed,
        ) as process,
    ):  # fmt: skip

        def tell() -> None:
            cut.set()
            process.send_signal(signal.SIGINT)

        timers = [
            threading.Timer(stage.limit_s - min(GRACE_S, stage.limit_s / 5), tell),
            threading.Timer(stage.limit_s, os.killpg, (process.pid, signal.SIGKILL)),  # its workers, too
        ]
        for timer in timers:
            timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"{stage.name}: {line}", end="", flush=True)
                log.write(line)
                last = line.strip() or last
            status = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            with contextlib.suppress(ProcessLookupError):  # what one that ended, or was interrupted, leaves behind
                os.killpg(process.pid, signal.SIGKILL)
    told = "ended at its limit" if cut.is_set() else "done" if status == 0 else f"failed, status {status}"
    return Ending(stage.name, time.monotonic() - began, told, last)


def _heed() -> None:
    """Of a child before it runs: what a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _missing(stage: Stage) -> str | None:
    """The first tool or module that a stage needs and that is not there."""
    tools = [] if stage.tool is None or shutil.which(stage.tool) else [stage.tool]
    return next(iter([*tools, *(name for name in stage.modules if importlib.util.find_spec(name) is None)]), None)
