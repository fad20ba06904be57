"""bench.startup: the lines it waits for are those that a start writes, and phases add up."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prerope.server.service import Service
from prerope.server.settings import Settings

from bench import startup
from bench.startup import CACHE_LINE, FIRST_TOKEN, MILESTONES, Log, Memory, Start, StartFailed, Startup, report

ABOUT = {"model": "m", "weight_bytes": 2**20, "date": "today", "cpu": "one", "cores": 2}


def start(*times: float, rss: int = 3 * 2**20) -> Start:
    at = dict(zip([*MILESTONES, startup.READY, FIRST_TOKEN], times, strict=True))
    return Start(at, 0.5, {"ready": Memory(rss, 2**20, 2 * 2**20)}, 2**20)


def test_a_real_start_writes_the_lines_in_order(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Settings(model_id=str(tiny_checkpoint), kv_cache_memory="1MiB"))
    written: list[str] = []
    monkeypatch.setattr(Service, "report", lambda _service, stage: written.append(stage))
    service._load()
    log = Log(time.perf_counter())
    log.read(iter(written))
    times = [log.wait_for(pattern, 0) for pattern in MILESTONES.values()]
    assert times == sorted(times)
    assert len(set(times)) == len(times), "each milestone has a line of its own"
    found = log.find(CACHE_LINE)
    assert found is not None
    assert int(found[1][1]) * 512 == 2**20  # bytes of K and V a token: 2 layers, 2 heads, 2 × 16 dims, fp32


def test_a_line_has_the_time_it_came_at() -> None:
    def lines() -> Iterator[str]:
        yield "one\n"
        time.sleep(0.2)
        yield "two\n"

    log = Log(time.perf_counter())
    threading.Thread(target=log.read, args=(lines(),)).start()
    assert log.wait_for(re.compile("two"), 10) - log.wait_for(re.compile("one"), 10) >= 0.19


def test_a_server_that_ends_or_is_silent_is_told_with_its_last_lines() -> None:
    log = Log(time.perf_counter())
    with pytest.raises(StartFailed, match=r"silent for 0\.01 s before 'ready'"):
        log.wait_for(re.compile("ready"), 0.01)
    log.read(iter(["MODEL_ID is wrong\n"]))
    with pytest.raises(StartFailed, match="the server ended before 'ready':\nMODEL_ID is wrong"):
        log.wait_for(re.compile("ready"), 10)


def test_a_wrong_setting_ends_the_measurement() -> None:
    with pytest.raises(StartFailed, match="there is no flag --port-number"):
        startup.run_once(["--port-number", "1"], 60)


def test_phases_add_up_to_the_first_token_and_medians_are_of_each() -> None:
    starts = [start(1, 2, 3, 4, 5, 6, 7), start(2, 3, 5, 9, 10, 11, 12), start(3, 4, 5, 6, 7, 8, 20, rss=2**22)]
    assert all(sum(one.phases().values()) == pytest.approx(one.at[FIRST_TOKEN]) for one in starts)
    found = Startup(starts, ABOUT)
    assert found.phase("inspection") == 1
    assert found.row(FIRST_TOKEN) == [FIRST_TOKEN, "1.00", "12.00", "7.00–20.00"]
    assert found.memory("ready").rss == 3 * 2**20
    assert "ready 3 MiB resident (private 2 MiB, USS 1 MiB)" in found.notes()[-1]


def test_a_moment_that_one_start_has_is_told(tmp_path: Path) -> None:
    starts = [start(1, 2, 3, 4, 5, 6, 7), start(1, 2, 3, 4, 5, 6, 7)]
    filled = Start(starts[1].at, 0.5, {**starts[1].memory, "cache written to": Memory(9, 9, 9)}, 2**20)
    found = Startup([starts[0], filled], ABOUT)
    report(found).save(tmp_path)
    assert "cache written to 0 MiB resident" in (tmp_path / "startup.md").read_text()
    assert found.memory("cache written to") == Memory(9, 9, 9)
    assert found.row("weights") == ["weights", "1.00", "3.00", "3.00–3.00"]
    assert (tmp_path / "startup.png").stat().st_size > 1000


def test_private_memory_is_what_no_file_backs() -> None:
    info = SimpleNamespace(rss=100, uss=50, shared=30)
    assert startup._memory(SimpleNamespace(memory_full_info=lambda: info)) == Memory(100, 50, 70)
