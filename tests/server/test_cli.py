"""`python -m prerope.server` as a process: what it prints, how it ends, and with which exit code."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from prerope.server import __main__ as entry
from prerope.server.flags import environment_table
from prerope.server.http.server import CLOSE_GRACE_S
from prerope.server.machine.threads import SPIN_COUNT
from prerope.server.settings import Settings
from safetensors.torch import load_file, save_file

from tests.tiers import every

ROOT = Path(__file__).parent.parent.parent
INHERITED = ("PATH", "CUDA_VISIBLE_DEVICES")
ENVIRONMENT = {name: os.environ[name] for name in INHERITED if name in os.environ}
ENVIRONMENT |= {"HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
TIMEOUT_S = 180
LONG = {"prompt": "Hello", "max_tokens": 600, "ignore_eos": True, "stream": True}


def start(*flags: str, module: str = "server", **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*flags: str, **variables: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a start that is expected to end by itself."""
    with start(*flags, **variables) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def process(byte_checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the tiny model, perhaps still loading, and its URL."""
    port = free_port()
    started = start(
        *("--model-id", str(byte_checkpoint), "--port", str(port)),
        *("--kv-cache-memory", "16MiB", "--max-model-len", "8192"),
    )
    yield started, f"http://127.0.0.1:{port}"
    if started.poll() is None:
        started.kill()
    started.communicate()


def wait_for(url: str, status: int = 200) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    with httpx.Client(timeout=5) as http:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if http.get(url).status_code == status:
                    return
            time.sleep(0.05)
    raise AssertionError(f"{url} did not answer {status} within {TIMEOUT_S} s")


def test_a_wrong_setting_stops_the_start_with_one_line() -> None:
    code, out, err = run(MAX_MODEL_LEN="many")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("prerope: MAX_MODEL_LEN=many is not allowed (flag --max-model-len).")
    assert line.endswith("Allowed: integer, at least 1; default: unset")


def test_an_unknown_flag_stops_the_start_with_one_line() -> None:
    code, _, err = run("--prot", "80")
    assert code == 2
    assert err.splitlines() == [
        "prerope: there is no flag --prot; did you mean --port. See python -m prerope.server --help."
    ]


def test_a_taken_port_stops_the_start_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("--port", str(port))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"PORT={port}" in err
    assert "in use" in err


def test_markdown_prints_the_table() -> None:
    code, out, _ = run("--markdown")
    assert code == 0
    assert out.strip() == environment_table()


@pytest.mark.ci
def test_a_checkpoint_that_is_not_whole_stops_the_start_in_one_line(byte_checkpoint: Path, tmp_path: Path) -> None:
    """The port answers while it loads; then nothing of transformers' own report, and no traceback, stands around the
    line that says what to do."""
    folder = Path(shutil.copytree(byte_checkpoint, tmp_path / "lacking"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    port = free_port()
    with start("--model-id", str(folder), "--port", str(port), "--log-level", "warning") as process:
        wait_for(f"http://127.0.0.1:{port}/live")
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    lines = [line for line in err.splitlines() if "prerope: " in line or "Traceback" in line or "REPORT" in line]
    assert lines == err.splitlines()[-1:]
    assert "lacks 1 weights that its config asks for: model.norm.weight" in lines[0]


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_soon_sleep_and_what_was_imported_is_not_looked_through_for_garbage(
    given: dict[str, str], seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def create_app(_settings: Settings) -> NoReturn:
        raise Reached

    monkeypatch.setattr("prerope.server.app.create_app", create_app)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    gc.unfreeze()  # as it is before anything was imported
    try:
        with socket.socket() as listener, pytest.raises(Reached):
            entry._serve(Settings(), listener)
        assert os.environ.get("GOMP_SPINCOUNT") == seen
        assert gc.isenabled()
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.freeze()  # as it was


@pytest.mark.slow
def test_a_signal_while_the_model_loads_ends_with_zero(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    server, url = process
    wait_for(f"{url}/live")
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=30)
    assert server.returncode == 0


@pytest.mark.slow
def test_a_signal_while_the_workers_begin_is_no_error(process: tuple[subprocess.Popen[str], str]) -> None:
    server, _ = process
    assert server.stderr is not None
    for line in server.stderr:
        if re.search(r"\bready\b.*url=", line):
            break
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "[error" not in err


@pytest.mark.parametrize("pause_s", every(3, [0.05, 0.0, 0.2], quick=0))
def test_nor_is_a_second_one_while_the_model_loads(process: tuple[subprocess.Popen[str], str], pause_s: float) -> None:
    server, url = process
    wait_for(f"{url}/live")
    for _ in range(2):
        server.send_signal(signal.SIGTERM)
        time.sleep(pause_s)
    _, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "Traceback" not in err
    assert "[error" not in err


@pytest.mark.slow
def test_a_second_signal_ends_at_once(process: tuple[subprocess.Popen[str], str]) -> None:
    """Ctrl-C, this time: it begins the drain as SIGTERM does."""
    server, url = process
    wait_for(f"{url}/ready")
    with httpx.stream("POST", f"{url}/generate", json=LONG | {"max_tokens": 4000}, timeout=60) as stream:
        lines = stream.iter_lines()  # kept: a generator that is dropped closes the stream
        next(lines)
        server.send_signal(signal.SIGINT)
        wait_for(f"{url}/ready", 503)
        began = time.monotonic()
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=30)
    assert time.monotonic() - began < CLOSE_GRACE_S + 3
    assert server.returncode == 0
    assert "Traceback" not in err
