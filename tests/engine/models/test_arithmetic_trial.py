"""The way to multiply bf16 is the faster one of a trial, and stays what it was found to be."""

from __future__ import annotations

from pathlib import Path

import pytest
from prerope.cache.kernels import build
from prerope.server.models.cpu import trial


@pytest.fixture(autouse=True)
def own_choice(decode_kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not build.can_multiply_pairs():
        pytest.skip(f"no bf16 pairs here: {decode_kernel}")
    monkeypatch.setattr(build, "_pairs", None)
    monkeypatch.setattr(trial, "library_path", lambda: tmp_path / "kernels.so")


@pytest.mark.parametrize(("found", "pairs"), [((0.001, 0.002), True), ((0.002, 0.001), False)])
def test_the_faster_is_taken_and_kept(
    found: tuple[float, float], pairs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trial, "measure", lambda: found)
    said = trial.choose_arithmetic()
    assert build.multiplies_pairs() == pairs
    monkeypatch.setattr(trial, "measure", lambda: found[::-1])
    assert trial.choose_arithmetic() == said
    (kept,) = tmp_path.iterdir()
    kept.write_text("{")  # damaged: measured again
    assert trial.choose_arithmetic() != said
    assert build.multiplies_pairs() != pairs


def test_a_real_trial_takes_both_and_leaves_a_choice() -> None:
    assert all(0 < seconds < 5 for seconds in trial.measure())
    assert trial.choose_arithmetic() is not None
