"""bench.step: nested times are counted once, and the file it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import step
from cache.native import prepare


def test_what_is_inside_a_part_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0])  # outer from 0 to 10; inside it 1 to 3 and 4 to 8
    stopwatch = step.Stopwatch(torch.device("cpu"), threads=1)
    monkeypatch.setattr(stopwatch, "_clock", lambda: next(now))
    first, second = stopwatch.timed("a", lambda: None), stopwatch.timed("b", lambda: None)
    stopwatch.timed("outer", lambda: (first(), second()))()
    assert stopwatch.taken == {"a": 2.0, "b": 4.0, "outer": 4.0}


def test_parts_are_told_and_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if "loaded" not in prepare(None):
        pytest.skip("needs the C kernels: without them there is no stack")
    asked: list[Any] = ["--model", tiny_checkpoint, "--rows", 1, 3, "--context", 20, "--chunk", 40, "--steps", 4]
    assert step.main([*map(str, asked), "--threads", "1", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert list(found["ms"]) == ["decode, 1 row", "decode, 3 rows", "prefill, 40 rows"]
    for name, times in found["ms"].items():
        idle = {"stack"} if name.startswith("prefill") else {"linears", "attention", "store"}
        assert set(times) == {"step", *step.PARTS}
        assert {part for part, milliseconds in times.items() if milliseconds == 0} == idle
    assert str(tmp_path) not in json.dumps(found)
