"""bench.kernels from end to end at toy size, under Triton's interpreter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prerope.cache.attention.reference import reference_attention

import bench.kernels.__main__ as kernels
from bench import BenchError
from bench.kernels.cases import FULL, RAW, TOY, low_precision
from bench.kernels.report import Found, Result
from bench.kernels.rows import SHARPNESS

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled for a GPU here")


@pytest.mark.slow
@interpreted
def test_a_toy_run_writes_every_case_and_a_wrong_kernel_fails_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(["--toy", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["failures"] == {}
    cases = {(result["kernel"], result["method"]) for result in found["results"]}
    methods = (RAW, *TOY.methods)
    assert cases == {(kernel, method) for kernel in ("decode", "prefill") for method in methods} | {("store", RAW)}
    assert all(result["seconds"] > 0 and result["share"] > 0 for result in found["results"])
    assert set(found["errors over a torch run's"]) == CHECKS
    assert all(0 < ratio <= 2 for ratio in found["errors over a torch run's"].values())
    assert (found["left_out"], found["silent_peers"]) == ({}, {})
    verdicts = {target["name"]: target["verdict"] for target in found["targets"]}
    assert verdicts["error of the worst row ÷ a plain torch run's"] == "reached"
    assert "not measured" not in verdicts.values()
    shown = capsys.readouterr().out
    assert "over SDPA" in shown
    assert "toy: prefill, rerope ÷ rope" in shown
    assert "| decode | toy | rerope | 2 | 96 |" in (tmp_path / "kernels.md").read_text()

    def wrong(*arguments: object) -> torch.Tensor:
        query = arguments[0]
        assert isinstance(query, torch.Tensor)
        return query

    monkeypatch.setattr(kernels, "cuda_attention", wrong)
    assert (
        kernels.main(["--toy", "--out", str(tmp_path), "--only", "checks", "--checks", "rows", "--name", "some"]) == 1
    )
    found = json.loads((tmp_path / "some.json").read_text())
    assert set(found["failures"]) == {f"check {name}" for name in CHECKS if " rows " in name}
    assert "of its size; at most" in found["failures"]["check toy rows rope flat"]
    assert found["results"] == []


def test_a_run_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    bench = kernels.Bench(TOY, torch.device("cpu"), print)
    bench.run(0.0, tmp_path)
    assert len(bench.found.left_out) == len(CHECKS) + 3
    assert all(target.verdict == "not measured" for target in bench.found.targets())


CHECKS = {
    f"toy {rows} {method} {how}" for rows, method, how in itertools.product(TOY.checked, (RAW, *TOY.methods), SHARPNESS)
}


class Once:
    """A clock for tensors without memory."""

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        return 1.0


def test_every_case_of_full_size_keeps_its_tensors_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors, which refuse to be mixed with the host's, as a GPU's do. Block tables are the host's."""
    meta = torch.device("meta")
    bench = kernels.Bench.__new__(kernels.Bench)
    bench.plan, bench.device, bench.say, bench.clock = FULL, meta, lambda _: None, Once()  # type: ignore[assignment]
    bench.found, bench.rates = Found(FULL, {}), {"byte/s": 1.0, "FLOP/s": 1.0}
    monkeypatch.setattr(kernels, "cuda_attention", lambda query, *_: torch.empty_like(query))
    monkeypatch.setattr(kernels, "cuda_store", lambda key, _, keys, *__: keys.view(key.shape).copy_(key))
    for method in FULL.only_checked:
        bench._step("llama-3-8b", method, [(0, 1)])
    step = bench._step("llama-3-8b", "rerope", list(FULL.checked["chunks"]))
    assert {sequence.block_table.device.type for sequence in step.metadata.sequences} == {"cpu"}
    assert low_precision(step).device == meta
    assert reference_attention(step.query, step.keys, step.values, step.metadata, step.options).device == meta
    for _, name, call in bench._cases():
        if not name.startswith("check"):
            call()
    assert bench.found.silent == {}
    largest = max(result.work for result in bench.found.results if result.kernel == "decode")
    assert 5e9 < largest <= FULL.most_bytes
    assert {result.over["SDPA"] for result in bench.found.results if result.kernel != "store"} == {1.0}


def test_targets_take_the_worst_large_case() -> None:
    report = Found(FULL, {})

    def add(kernel: str, method: str, context: int, seconds: float, work: float, share: float) -> None:
        report.results.append(Result(kernel, "llama-3-8b", method, 1, context, seconds, work, share))

    for method, seconds, share in ((RAW, 1.0, 0.86), ("rope", 1.1, 0.78), ("rerope", 1.0, 0.6)):
        add("decode", method, 131072, seconds, 6e8, share)
        add("decode", method, 4096, 9.0, 1e7, 0.1)  # too small to count
    for method, seconds in (("rope", 0.01), ("rerope", 0.011)):
        add("prefill", method, 32768, seconds, 4.1e12, 0.5)
        add("prefill", method, 2048, 1.0, 1e9, 0.5)
    targets = {target.name.removeprefix("llama-3-8b: "): target for target in report.targets()}
    assert targets["decode, share of copy bandwidth, not rotated"].verdict == "reached"
    assert targets["decode, share of copy bandwidth, rotated"].verdict == "missed"
    assert targets["decode, share of copy bandwidth, rotated"].worst == "1 x 131,072 rerope"
    assert targets["decode, rerope ÷ rope"].verdict == "reached"
    assert targets["prefill, rerope ÷ rope"].found == {"1 x 32,768": pytest.approx(1.1)}
    assert targets["prefill, rerope ÷ rope"].verdict == "missed"
    assert targets["prefill, TFLOP/s of rope"].found == {"1 x 32,768 rope": pytest.approx(410)}
    assert targets["prefill, TFLOP/s of rope, after that"].verdict == "missed"
    assert targets["error of the worst row ÷ a plain torch run's"].verdict == "not measured"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="--toy"):
        kernels.main([])
