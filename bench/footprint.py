"""How much of our own Python a plain request enters: modules and calls of functions, from JSON to JSON.

One warm, greedy, non-streamed /generate of three tokens on the embedded model, on a server in this process. A call is
what the interpreter's profiler counts, in every thread: a generator or a coroutine that is resumed counts again.

    python -m bench.footprint [--functions]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from prerope.server.app import create_app
from prerope.server.http.server import DrainingServer
from prerope.server.settings import Settings

ROOT = Path(__file__).parent.parent
OURS = tuple(f"{ROOT / package}/" for package in ("rope", "cache", "server"))
BODY = json.dumps({"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0})
NUM_WARM = 3
IDLE = "DrainingServer.run_until_done"
"""Resumed by the server's clock ten times a second, request or not."""


class Profile:
    """Counts calls into our packages while `on`, in the threads that begin after `install`."""

    def __init__(self) -> None:
        self.on = False
        self.calls: Counter[tuple[str, str]] = Counter()  # (file, function)

    def install(self) -> None:
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def _see(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if self.on and event == "call" and code.co_filename.startswith(OURS) and code.co_qualname != IDLE:
            self.calls[str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname] += 1


def measure() -> Profile:
    """A server from its start to its end, and the profile of one request."""
    profile = Profile()
    profile.install()
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(Settings(kv_cache_memory=2**28))
    server = DrainingServer(app.state.service, app, "http://127.0.0.1")

    def ask() -> None:
        try:
            while app.state.service.engine.state.value == "loading":
                time.sleep(0.1)
            connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=60)
            for number in range(NUM_WARM + 1):
                profile.on = number == NUM_WARM
                connection.request("POST", "/generate", BODY, {"content-type": "application/json"})
                reply = connection.getresponse()
                assert reply.status == 200, reply.read()
                reply.read()
                time.sleep(0.5)  # what follows the reply is part of it
            profile.on = False
            connection.close()
        finally:
            server.handle_exit(signal.SIGTERM, None)

    client = threading.Thread(target=ask)
    client.start()
    asyncio.run(server.run_until_done(listener))
    client.join()
    sys.setprofile(None)
    return profile


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--functions", action="store_true", help="list functions, too")
    options = parser.parse_args(arguments)
    calls = measure().calls
    if not calls:  # the client has said why
        return 1
    files: Counter[str] = Counter()
    for (file, _), count in calls.items():
        files[file] += count
    lines = [(count, file) for file, count in files.most_common()]
    if options.functions:
        lines += [(count, f"{file} {function}") for (file, function), count in calls.most_common()]
    print(*(f"{count:6} {name}" for count, name in lines), sep="\n")
    print(f"{len(files)} modules, {sum(files.values())} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
