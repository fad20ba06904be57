"""bench.attention: what it counts as work, and the file it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prerope.cache.kernels.build import library
from prerope.server.machine.places import default_cache_dir
from prerope.server.models.cpu.build import prepare

from bench import attention
from bench.kernels.cases import prefill_flops


def test_work_is_counted_by_visible_pairs() -> None:
    visible = sum(row + 1 for row in range(95, 100))
    assert prefill_flops(attention.SHAPES["smollm2"], 5, 95) == visible * 9 * 64 * 4


def test_speeds_are_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(default_cache_dir())
    if library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(attention, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(attention, "LEAST_RUNS", 1)
    asked = ["--shapes", "smollm2", "--methods", "rerope", "--chunks", "8", "--contexts", "64", "128"]
    assert attention.main([*asked, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    assert [(s["chunk"], s["context"]) for s in found["speeds"]] == [(8, 64), (8, 128)]
    assert all(s["kernel"] > 0 for s in found["speeds"])
