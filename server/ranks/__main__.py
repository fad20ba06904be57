"""`python -m prerope.server.ranks`: a follower, started by the server with a line of JSON on its standard input.

It loads its share of the model as the server does, then computes what rank 0 tells. Its standard input stays open as
long as the server lives, and ends it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from prerope.server.config import EngineConfig
from prerope.server.errors import PreRopeError
from prerope.server.machine.imports import importing
from prerope.server.machine.threads import let_waiting_threads_sleep
from prerope.server.settings import Settings

REPORT_AFTER_S = 2.0
"""What stops this rank stops rank 0 too, as a rule, which then says so and ends all: only else it is said here."""


def main() -> NoReturn:
    """Run this rank until rank 0 ends it, or is gone."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)  # the server drains first
    let_waiting_threads_sleep()
    with importing():  # and torch: seconds in which a signal is not to end it
        from prerope.server.engine.loading import load_engine
        from prerope.server.log import route_transformers_log
        from prerope.server.models.checkpoint import Checkpoint
        from prerope.server.ranks.group import Ranks
        from prerope.server.ranks.orders import follow

    order = json.loads(sys.stdin.buffer.readline() or b"null")
    if order is None:
        os._exit(0)
    rank, size = order["rank"], order["size"]
    threading.Thread(target=_end_with_server, name="server", daemon=True).start()
    route_transformers_log()
    try:
        ranks = Ranks.join(Path(order["folder"]), rank, size, on_gpus=order["on_gpus"])
        config = EngineConfig.of(Settings(**order["settings"]))
        follow(load_engine(Checkpoint(**order["checkpoint"]), config, ranks=ranks))
    except Exception as error:
        time.sleep(REPORT_AFTER_S)
        if isinstance(error, PreRopeError):
            print(f"prerope, rank {rank} of {size}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        raise
    os._exit(0)


def _end_with_server() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
