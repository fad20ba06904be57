"""bench.kernels from end to end at toy size, under Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import kernels
from bench.kernels_cases import RAW, TOY

pytest.importorskip("triton")


@pytest.fixture
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    from cache.kernels import decode

    monkeypatch.setattr(decode, "ITEMS", 4)


@pytest.mark.usefixtures("few_items")
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
    assert all(0 < ratio <= 2 for ratio in found["errors over a torch run's"].values())
    assert "over SDPA" in capsys.readouterr().out

    def wrong(*arguments: object) -> torch.Tensor:
        query = arguments[0]
        assert isinstance(query, torch.Tensor)
        return query

    monkeypatch.setattr(kernels, "cuda_attention", wrong)
    assert kernels.main(["--toy", "--out", str(tmp_path)]) == 1
    failures = json.loads((tmp_path / "kernels.json").read_text())["failures"]
    assert set(failures) == {f"check toy {method}" for method in TOY.methods}
    assert "twice a plain torch run's" in failures["check toy rope"]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 1
    assert "--toy" in capsys.readouterr().err
