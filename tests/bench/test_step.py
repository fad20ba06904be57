"""bench.step: nested times are counted once, contexts are not prefilled, and the files it leaves."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prerope.server.config import EngineConfig
from prerope.server.machine.places import default_cache_dir
from prerope.server.models.cpu.build import prepare

import bench.step.__main__ as step
from bench.shared.shapes import MODELS
from bench.step import floor as step_floor
from bench.step import parts as step_parts
from bench.step.report import Found


def test_what_is_inside_a_part_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0])  # outer from 0 to 10; inside it 1 to 3 and 4 to 8
    stopwatch = step_parts.Stopwatch(torch.device("cpu"), threads=1)
    monkeypatch.setattr(stopwatch, "_clock", lambda: next(now))
    first, second = stopwatch.timed("a", lambda: None), stopwatch.timed("b", lambda: None)
    stopwatch.timed("outer", lambda: (first(), second()))()
    assert stopwatch.taken == {"a": 2.0, "b": 4.0, "outer": 4.0}


def test_parts_are_told_and_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    if "loaded" not in prepare(default_cache_dir()):
        pytest.skip("needs the C kernels: without them there is no stack")
    asked: list[Any] = ["--model", tiny_checkpoint, "--rows", 1, 3, "--context", 20, "--chunk", 40, "--steps", 4]
    asked += ["--threads", "1", "--dtype", "bfloat16", "--device", "cpu", "--held", 2, "--out", tmp_path]
    assert step.main([*map(str, asked)]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert list(found["ms"]) == ["decode, 1 row", "decode, 3 rows", "prefill, 40 rows"]
    for name, times in found["ms"].items():
        idle = {"stack"} if name.startswith("prefill") else {"linears", "attention", "store"}
        assert set(times) == {*step_parts.WHOLE, *step_parts.PARTS}
        assert times["slowest"] >= times["step"] > 0
        assert {part for part, milliseconds in times.items() if milliseconds == 0} == idle
    assert str(tmp_path) not in json.dumps(found)


def options(*more: object) -> Any:
    return step.parse_arguments(["--shape", "toy", "--device", "cpu", *map(str, more)])


def test_a_shape_is_the_model_that_transformers_makes_of_it() -> None:
    from transformers import LlamaForCausalLM

    shape = MODELS["toy"]
    model = LlamaForCausalLM(shape.config()).bfloat16()
    weights = sum(weight.nbytes for name, weight in model.named_parameters() if "embed" not in name)
    assert shape.read_bytes(torch.bfloat16) == weights
    llama = MODELS["llama-3-8b"]
    # 8.03e9 parameters in all, as its card says, less the embedding; a token's keys and values are 128 KiB.
    assert llama.read_bytes(torch.int8) + llama.vocabulary * llama.hidden == pytest.approx(8.03e9, rel=1e-3)
    assert llama.token_bytes(torch.bfloat16) == 128 * 1024


def test_a_context_is_in_the_cache_without_a_prefill() -> None:
    """Rows decode at their context, in blocks of their own, and only the last block of each prompt was computed."""
    asked = options("--contexts", 70, 96, "--rows", 2)
    engine = step_floor.open_engine(MODELS["toy"], asked, lambda _: None)
    floor = step_floor.Floor(engine, ["rope", "rerope"], asked.steps)
    assert all((tensor != 0).any(-1).all() for tensor in (*engine.storage.keys, *engine.storage.values))
    names = [floor._add("rerope", tokens, 8, known=True) for tokens in (70, 96)]
    while any(not sequence.decoding for sequence in engine.scheduler.sequences):
        engine.step()
    first, second = engine.scheduler.sequences
    assert (first.num_cached_tokens, second.num_cached_tokens) == (64, 80)
    assert engine.stats().prompt_tokens == 6 + 16
    assert not set(first.block_table) & set(second.block_table)
    assert sorted(second.block_table) != list(second.block_table)
    assert first.num_tokens > 70
    engine.check_integrity()
    for name in names:
        engine.abort(name)
    assert floor.decode("rope", 2, 96) > 0
    assert not floor.fits(20, 96)
    assert not engine.has_work()
    engine.check_integrity()


def test_steps_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step is launched before the tokens of the one before it are read."""
    monkeypatch.setattr(step_floor, "EngineConfig", partial(EngineConfig, overlap=True))
    asked = options("--rows", 2)
    floor = step_floor.Floor(step_floor.open_engine(MODELS["toy"], asked, lambda _: None), ["rope"], asked.steps)
    assert floor.decode("rope", 2, 96) > 0
    assert not floor.engine.has_work()
    assert floor.prefill("rope", 96) > 0
    floor.engine.check_integrity()


def test_a_toy_shape_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--shape", "toy", "--device", "cpu", "--threads", "1", "--methods", "rope", "rerope", "--rounds", "1"]
    assert step.main([*asked, "--contexts", "48", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert {(cell["method"], cell["rows"], cell["context"]) for cell in found["decode"]} == {
        (method, rows, 48) for method in ("rope", "rerope") for rows in (1, 2)
    }
    assert all(cell["over_floor"] > 0 for cell in found["decode"])
    assert all(rate > 0 for rates in found["prefill_tokens_per_s"].values() for rate in rates)
    assert (found["left_out"], found["failures"]) == ({}, {})
    text = (tmp_path / "step.md").read_text()
    assert "| decode 2 x 48 | rerope |" in text
    assert "not measured" in text  # batch 8
    assert "prefill time, rerope ÷ rope" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(found)


def test_the_floor_and_the_ratios() -> None:
    about = {"copy_bytes_per_s": 1000.0, "prompt": 64}
    report = Found(["rope", "rerope"], 500, 10, about)
    report.decode = {("rope", 8, 100): [10.0, 30.0, 10.0], ("rerope", 8, 100): [9.0, 27.0, 90.0]}
    report.prefill = {"rope": [100.0, 50.0], "rerope": [80.0, 40.0]}
    assert report.floor(8, 100) == pytest.approx(8.5)
    assert report.over_floor(("rope", 8, 100)) == pytest.approx(10 / 8.5)
    assert report.over_first(("rerope", 8, 100)) == pytest.approx(0.9)
    targets = {target.name: target for target in report.targets()}
    assert targets["decode step ÷ floor, batch 8"].verdict == "missed"  # rerope's median is 27
    assert targets["decode step ÷ floor, batch 1"].verdict == "not measured"
    assert targets["decode step, rerope ÷ rope"].verdict == "reached"
    assert targets["prefill time, rerope ÷ rope"].found == {"64": pytest.approx(1.25)}


def test_what_does_not_fit_or_comes_too_late_is_told() -> None:
    asked = options("--rows", 1)
    floor = step_floor.Floor(step_floor.open_engine(MODELS["toy"], asked, lambda _: None), ["rope"], asked.steps)
    report = Found(["rope"], 1, 1, {"copy_bytes_per_s": 1.0, "prompt": 96})
    assert "left out, the cache holds" in step_floor.measure(floor, report, ("rope", 99, 96), float("inf"))
    assert "left out, the time was up" in step_floor.measure(floor, report, ("rope", 1, 96), 0.0)
    assert report.decode == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "0"], "0: must be at least 1"), (["--methods", "rope", "rope"], "each once")],
)
def test_a_wrong_option_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.parse_arguments(arguments)
    assert message in capsys.readouterr().err
