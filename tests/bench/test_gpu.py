"""bench.gpu: one command from end to end at toy size; a stage that fails or hangs keeps no other from running."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import BenchError, gpu

pytest.importorskip("triton")


@pytest.mark.slow
def test_a_toy_run_leaves_tables_to_paste(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 0, capfd.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{n}.{s}" for n in ("kernels", "step") for s in ("json", "md", "log")} | {"results.md"}
    text = (tmp_path / "results.md").read_text()
    assert text.startswith(
        "## GPU: the CPU\n\n```sh\npython -m bench.gpu --toy --kernels 4 --step 3.5 --tests 0\n```\n"
    )
    for line in ("| decode | toy | rerope | 2 | 96 |", "| decode 2 x 96 | rope |"):
        assert line in text
    assert re.findall(r"\| (\w+) \| \d+\.\d \| done \|", text) == ["kernels", "step"]
    assert text.count("| target | wanted | found | worst case | verdict |") == 2
    assert str(tmp_path) not in text
    for name in ("kernels", "step"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["failures"] == {}
    assert re.search(r"kernels: done after .* minutes; ", capfd.readouterr().out)


def stage(name: str, program: str, limit_s: float = 60.0) -> gpu.Stage:
    return gpu.Stage(name, [sys.executable, "-c", program], limit_s, {"ASKED": "for"})


def test_how_a_stage_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.json").write_text("of an earlier run")
    done = gpu.run(stage("done", "import os; print('asked', os.environ['ASKED']); print()"), tmp_path)
    assert done[2:] == ["done", "asked for"]
    assert (tmp_path / "done.log").read_text() == "asked for\n\n"
    wrong = gpu.run(stage("wrong", "import sys; print('before', flush=True); sys.exit(3)"), tmp_path)
    assert wrong[2:] == ["failed, status 3", "before"]
    assert not (tmp_path / "wrong.json").exists()
    began = time.monotonic()
    # A child of the stage that keeps its output open is ended too.
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    cut = gpu.run(stage("cut", hangs, limit_s=0.5), tmp_path)
    assert cut[2] == "ended at its limit"
    assert time.monotonic() - began < 30
    text = gpu.results([done, wrong, cut], "python -m bench.gpu", tmp_path)
    assert "## GPU: not measured" in text
    assert "Its last line: `before`" in text
    assert "asked for" in capfd.readouterr().out


def test_a_failed_stage_fails_the_run_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [stage("first", "import sys; sys.exit(1)"), stage("second", "print('ran')")]
    monkeypatch.setattr(gpu, "stages", lambda _: both)
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "second.log").read_text() == "ran\n"
    assert "| first | 0.0 | failed, status 1 |" in (tmp_path / "results.md").read_text()


def test_kernels_and_steps_end_within_ten_minutes() -> None:
    """The tests come after them, and only where they are given minutes."""
    asked = argparse.Namespace(kernels=4.0, step=3.5, tests=15.0, toy=False, out=Path("out"))
    found = gpu.stages(asked)
    assert [one.name for one in found] == ["kernels", "step", "tests"]
    assert sum(one.limit_s for one in found[:2]) < 600
    assert found[2].variables["DEVICE"] == "cuda"


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="--toy needs none"):
        gpu.main([])
