"""`python -m prerope.server`: settings, socket, app, and an orderly end.

The port is bound before anything slow is imported, so a taken one is known at once; then the HTTP server runs while
the engine loads on its own thread. Exit codes: 0 after SIGTERM or SIGINT, once running requests are done or
SHUTDOWN_TIMEOUT_S has passed; 1 if the model cannot be served or the engine dies; 2 for a wrong setting.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import structlog
from prerope.server.errors import ConfigurationError
from prerope.server.flags import MODULE, load_settings
from prerope.server.log import configure_logging
from prerope.server.machine.allowance import cores
from prerope.server.machine.imports import importing
from prerope.server.machine.threads import let_waiting_threads_sleep, limit_threads, switch_soon
from prerope.server.ranks.processes import Followers
from prerope.server.settings import Settings

log = structlog.get_logger(__name__)


def main(arguments: Sequence[str] | None = None, command: str = MODULE) -> NoReturn:
    """Serve until a signal; None: as the process was called, which `command` names."""
    signal.signal(signal.SIGTERM, lambda *_: _exit(0))  # until the server is up: as process 1 there is no default
    try:
        settings = load_settings(sys.argv[1:] if arguments is None else arguments, command)
        listener = _bind(settings.host, settings.port)
    except ConfigurationError as error:
        _complain(error)
        _exit(2)
    configure_logging(settings.log_level, settings.log_format)
    try:
        _exit(_serve(settings, listener))
    except KeyboardInterrupt:
        _exit(130)


def _serve(settings: Settings, listener: socket.socket) -> int:
    """Run until a signal or a failure; the exit code."""
    let_waiting_threads_sleep()
    switch_soon()
    bound = cores()
    threads = limit_threads(max(1, int(bound.amount) // settings.tensor_parallel_size))
    log.info("threads", computing=threads, cores=round(bound.amount, 2), taken_from=bound.source)
    size = settings.tensor_parallel_size
    followers = Followers(size) if size > 1 else None  # they import while this process does
    with importing():
        from prerope.server.app import create_app
        from prerope.server.http.server import DrainingServer

    app = create_app(settings)
    service = app.state.service
    service.followers = followers
    url = _url(settings.host, listener.getsockname()[1])
    server = DrainingServer(service, app, url, once_ready=service.start_workers)
    asyncio.run(server.run_until_done(listener))
    if server.failure is None:
        return 0
    if isinstance(server.failure, ConfigurationError):
        _complain(server.failure)
    return 1


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = host == "::" and socket.has_dualstack_ipv6()  # every interface, and IPv4 with it
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigurationError(
            f"HOST={host} PORT={port} cannot be listened on: {reason}. Choose others with --host and --port."
        ) from error


def _url(host: str, port: int) -> str:
    """An address that a shell on this machine can use."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _complain(error: ConfigurationError) -> None:
    print(f"prerope: {error}", file=sys.stderr)


def _exit(code: int) -> NoReturn:
    """End now. Not sys.exit: a load cut short leaves a thread in torch, which the interpreter cannot end cleanly."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
