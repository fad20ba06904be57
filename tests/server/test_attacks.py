"""What one client can do to the others: each attack beside a probe of /health and somebody's stream, in full when slow.

The server is a process of its own with a tiny model, whose steps take a millisecond or two, so a stream's bound here is
time; `python -m bench.soak.attacks` makes the same attacks on the embedded model and prints what they did.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from bench.soak import attacks
from bench.soak.attacks import ATTACKS, Bystander
from bench.soak.hostile import HUGE_GRAMMAR, PRIMES, meeting
from tests.server.test_cli import LONG, free_port, start, wait_for
from tests.tiers import every

WORST_HEALTH_S = 1.0
WORST_GAP_S = 2.0
"""On cores that other tests use too. Before there were limits these were 3 to 40 s."""


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of its own, and its URL."""
    port = free_port()
    process = start(
        *("--model-id", str(tiny_checkpoint), "--port", str(port), "--log-level", "error", "--rope-method", "rope"),
        *("--kv-cache-memory", "64MiB", "--max-model-len", "32768"),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/ready")
        httpx.post(f"{url}/generate", json={"prompt": "a", "max_tokens": 1, "regex": "a"}, timeout=60)
        yield process, url
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url(server: tuple[subprocess.Popen[str], str]) -> str:
    return server[1]


@pytest.fixture(scope="module")
def attack() -> Iterator[Callable[[str, str, float], list[int]]]:
    with attacks.attacker() as attack:
        yield attack


QUICK = {"many items": 1 / 64, "slow masks": 1 / 64, "digits": 1 / 64}
"""What of a body is sent where it is quick, of slow masks one request for a token; of all others an eighth."""


OTHERS = [name for name in ATTACKS if name != "explosive grammars"]
"""Those take their whole time of the processor, on what somebody's stream leaves of one."""


@pytest.mark.parametrize("share", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["quick", "whole"])
@pytest.mark.parametrize(
    "name", [*every(3, OTHERS[::-1], quick=2), pytest.param("explosive grammars", marks=pytest.mark.slow)]
)
def test_nobody_else_is_held_up(
    url: str, attack: Callable[[str, str, float], list[int]], name: str, share: float | None
) -> None:
    with Bystander(url) as bystander:
        statuses = attack(name, url, share or QUICK.get(name, 1 / 8))
    assert bystander.worst_health_s < WORST_HEALTH_S
    assert bystander.worst_gap_s < WORST_GAP_S
    assert set(statuses) <= {200, 400, 408, 413, 429}, statuses


def test_a_refused_grammar_is_remembered_and_an_abandoned_one_is_killed(url: str) -> None:
    with httpx.Client(base_url=url, timeout=30) as http:
        first = http.post("/generate", json=HUGE_GRAMMAR)
        assert first.status_code == 400
        assert first.json()["error"]["code"] == "too_much_work"
        said = first.json()["error"]["message"]
        assert "CPU time" in said or "of memory" in said  # whichever limit is met first
        again = http.post("/generate", json=HUGE_GRAMMAR, timeout=1)
        assert again.json() == first.json()
        abandoned = meeting(PRIMES[1:])
        for _ in range(8):
            with pytest.raises(httpx.ReadTimeout):
                http.post("/generate", json=abandoned, timeout=0.3)
        assert (
            http.post("/generate", json={"prompt": "Hi", "regex": "ab", "max_tokens": 4}, timeout=3).status_code == 200
        )


def test_then_a_signal_lets_a_running_stream_finish_and_the_process_ends_with_zero(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    """The last test here: the process ends."""
    process, url = server
    with httpx.stream("POST", f"{url}/generate", json=LONG, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_for(f"{url}/ready", 503)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert f"curl {url}/generate" in out
    assert "Hello" not in err, "a prompt must not reach the log"
