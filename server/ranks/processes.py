"""The other ranks as processes of this one: started with it, watched, and ended with it.

A process that ends before it is told to is a loss for all: whoever computes hears of it as an error (`loss`), and the
server as a call. The other way round, each follower reads from a pipe that closes when the server is gone, however it
went.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prerope.server.errors import RankLost

VERDICT_S = 2.0
"""A collective may fail before the process that it failed by is seen to have ended: so long it is waited for."""

END_S = 5.0
"""Followers get to end by themselves."""


class Followers:
    """Ranks 1 … `size` − 1. They import what takes long at once, and begin when they are told what to load."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._folder: Path | None = None
        self._ending, self._seen = False, threading.Event()
        self._lost: RankLost | None = None
        command = [sys.executable, "-m", "prerope.server.ranks"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(1, size)
        ]

    def watch(self, on_loss: Callable[[RankLost], None]) -> None:
        """Call this once one of them has ended, now or later, without having been told to."""
        for rank, process in enumerate(self.processes, start=1):
            arguments = rank, process, on_loss
            threading.Thread(target=self._watch, args=arguments, name=f"rank-{rank}", daemon=True).start()

    def begin(self, what: dict[str, Any]) -> Path:
        """Tell the followers what to load. Returns the folder where they are met."""
        self._folder = folder = Path(tempfile.mkdtemp(prefix="prerope-ranks-"))  # nobody else's: it has mode 0700
        for rank, process in enumerate(self.processes, start=1):
            order = what | {"rank": rank, "size": self._size, "folder": str(folder)}
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise self.loss(error) from error
        return folder

    def loss(self, error: BaseException) -> BaseException:
        """The error that explains why a collective failed: which rank has ended."""
        self._seen.wait(VERDICT_S)
        if self._lost is not None:
            return self._lost
        return RankLost(f"the {self._size} processes that compute this model do not reach each other: {error}")

    def close(self) -> None:
        """End the followers, and wait until they are gone."""
        self._ending = True
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self, rank: int, process: subprocess.Popen[bytes], on_loss: Callable[[RankLost], None]) -> None:
        code = process.wait()
        if self._ending or code == 0 or self._lost is not None:  # 0: they were told to
            return
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}, and has said why"
        self._lost = RankLost(
            f"rank {rank} of {self._size} (process {process.pid}) {how}: a model shared by TENSOR_PARALLEL_SIZE="
            f"{self._size} processes needs them all, so the server ends; start it again"
        )
        self._seen.set()
        on_loss(self._lost)
