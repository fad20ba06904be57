"""bench.gpu.sweep: which candidate is kept for servers on that card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from prerope.cache.cuda.tiles import Choice, choice, use, use_kept

from bench.gpu import sweep
from bench.gpu.sweep import DECODE, PREFILL, Candidate, choices, fastest
from bench.kernels.cases import FULL

pytest.importorskip("triton")

CASES = ("decode llama-3-8b 8 x 32,768 rope", "decode llama-3-8b 1 x 131,072 rerope")
PROMPT = "prefill llama-3-8b 1 x 32,768 rope"


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    use([])


def times(shares: Sequence[tuple[Candidate, tuple[float, float]]]) -> dict[str, float]:
    """Milliseconds of two cases of decode, of the shipped candidate 1.0 and 3.0, of others these shares of it."""
    found = {f"{case}: {one.name}": ms for case, ms in zip(CASES, (1.0, 3.0), strict=True) for one in DECODE[:1]}
    for one, both in shares:
        found |= {
            f"{case}: {one.name}": share * found[f"{case}: shipped"] for case, share in zip(CASES, both, strict=True)
        }
    return found | {f"{PROMPT}: shipped": 10.0, "GEMV 64 x 512: shipped": 1.0, "GEMV 64 x 512: gemv": 0.1}


def test_the_fastest_over_all_cases_is_kept() -> None:
    order, wide, narrow = DECODE[1:4]
    found = times([(order, (0.9, 1.2)), (wide, (0.97, 0.92)), (narrow, (0.96, 0.96))])
    assert fastest(found, "decode", DECODE) == wide
    assert choices(found, FULL, toy=False) == [Choice("decode", 4, 128, "bfloat16", wide.tile)]
    assert choices(times([(order, (0.9, 0.95))]), FULL, toy=False) == [
        Choice("decode", 4, 128, "bfloat16", heads_first=False)
    ]
    many = next(one for one in DECODE if one.constants.get("ITEMS") == 1056)
    (found_items,) = choices(times([(many, (0.9, 0.9))]), FULL, toy=False)
    assert (found_items.items, found_items.heads_first, found_items.tile) == (1056, None, None)


def test_what_is_no_faster_or_was_not_measured_everywhere_is_not_kept() -> None:
    order, wide = DECODE[1:3]
    assert choices(times([]), FULL, toy=False) == []
    assert choices(times([(order, (0.99, 0.99))]), FULL, toy=False) == [], "noise"
    found = times([(order, (0.5, 0.5)), (wide, (0.9, 0.9))])
    del found[f"{CASES[0]}: {order.name}"]  # left out in one case
    assert fastest(found, "decode", DECODE) == wide
    found[f"{PROMPT}: {PREFILL[1].name}"] = 1.0  # by SDPA: no size of a tile
    assert [one.kernel for one in choices(found, FULL, toy=False)] == ["decode"]
    found[f"{PROMPT}: {PREFILL[3].name}"] = 9.0
    assert choices(found, FULL, toy=False)[1] == Choice("prefill", 4, 128, "bfloat16", (128, 64, 8, 4))


def test_a_sweep_leaves_what_a_server_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says, of two candidates of decode the other order of the grid is the faster here."""

    def measured(*_: object) -> dict[str, object]:
        return {"rates": {}, "ms": times([(DECODE[1], (0.8, 0.8))]), "left out": {}}

    monkeypatch.setattr(sweep, "sweep", measured)
    monkeypatch.setattr(sweep, "measured_model", lambda *_: ("", FULL.models["llama-3-8b"]))
    assert sweep.main(["--toy", "--keep", str(tmp_path / "cache"), "--out", str(tmp_path)]) == 0
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("tiles-the-cpu-triton-")
    assert len(json.loads(file.read_text())) == 1
    (line,) = use_kept(tmp_path / "cache", "the CPU")
    assert line.endswith("decode of 4 heads of 128 dims in float16: heads last")
    found = choice("decode", 4, 128, torch.float16)
    assert found is not None
    assert found.heads_first is False
