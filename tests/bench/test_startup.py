"""bench.startup: the lines it waits for are those that a start writes, and phases add up."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from prerope.server.service import Service
from prerope.server.settings import Settings

from bench import BenchError, startup
from bench.startup import FIRST_TOKEN, MILESTONES, Memory, Start, milestones, report

ABOUT = {"model": "m", "weight_bytes": 2**20, "date": "today", "cpu": "one", "cores": 2}


def start(*times: float, rss: int = 3 * 2**20) -> Start:
    at = dict(zip([*MILESTONES, FIRST_TOKEN], times, strict=True))
    return Start(at, 0.5, {"ready": Memory(rss, 2**20, 2 * 2**20)}, 2**20)


def test_a_real_start_writes_the_lines_in_order(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Settings(model_id=str(tiny_checkpoint), kv_cache_memory="1MiB"))
    written: list[str] = []
    monkeypatch.setattr(Service, "report", lambda _service, stage: written.append(stage))
    service._load()
    lines = [
        json.dumps({"event": event, "timestamp": f"2026-01-01T00:00:{second:02}.5Z"})
        for second, event in enumerate([*written, "ready"], 1)
    ]
    began = 1767225600.0  # 2026-01-01
    at, cache_bytes = milestones(lines, began)
    assert list(at) == list(MILESTONES)
    assert list(at.values()) == sorted(set(at.values())), "each milestone has a line of its own"
    assert at["cache, /ready"] == len(written) + 1.5
    assert cache_bytes <= 2**30
    with pytest.raises(BenchError, match="does not tell of cache, /ready"):
        milestones(lines[:-1], began)


@pytest.mark.slow
def test_a_start_is_measured_and_a_wrong_setting_ends_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ["--rounds", "1", "--out", str(tmp_path), "--"]
    settings = ["--model-id", str(tiny_checkpoint), "--kv-cache-memory", "1MiB"]
    assert startup.main([*given, *settings]) == 0
    ((found,),) = [json.loads((tmp_path / "startup.json").read_text())["starts"]]
    assert list(found["at"]) == [*MILESTONES, FIRST_TOKEN]
    assert list(found["at"].values()) == sorted(found["at"].values())
    assert found["at"]["imports"] > 0
    assert list(found["memory"]) == ["ready", "after a request"]
    with pytest.raises(BenchError, match="there is no flag --port-number"):
        asyncio.run(startup.run_once(["--port-number", "1"], 60, tmp_path / "log"))


def test_phases_add_up_to_the_first_token_and_medians_are_of_each() -> None:
    starts = [start(1, 2, 3, 4, 5, 6, 7), start(2, 3, 5, 9, 10, 11, 12), start(3, 4, 5, 6, 7, 8, 20, rss=2**22)]
    assert all(sum(one.phases().values()) == pytest.approx(one.at[FIRST_TOKEN]) for one in starts)
    (table,) = report(starts, ABOUT).tables
    assert list(table.rows[-1]) == [FIRST_TOKEN, "1.00", "12.00", "7.00–20.00"]
    assert "ready 3 MiB resident (private 2 MiB, USS 1 MiB)" in table.notes[-1]


def test_private_memory_is_what_no_file_backs() -> None:
    info = SimpleNamespace(rss=100, uss=50, shared=30)
    assert Memory.of(SimpleNamespace(memory_full_info=lambda: info)) == Memory(100, 50, 70)
