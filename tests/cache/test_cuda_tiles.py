"""Tile sizes that were measured: kept a card and Triton, used where they were measured, refused where they are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from prerope.cache.cuda.tiles import Choice, choice, file_of, keep, use, use_kept
from prerope.cache.kernels.triton import launch
from prerope.server.config import EngineConfig
from prerope.server.engine.loading import _prepare_kernels
from prerope.server.ranks.group import ALONE

DECODE = Choice("decode", 4, 128, "bfloat16", (16, 32, 4, 4))
PREFILL = Choice("prefill", 4, 128, "bfloat16", (128, 64, 8, 4))
ORDER = Choice("decode", 1, 64, "float16", heads_first=False, items=1056)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    use([])


def test_what_is_kept_is_used_for_what_was_measured(tmp_path: Path) -> None:
    keep(tmp_path / "cache", "NVIDIA H200", [DECODE, PREFILL, ORDER])
    use([replace(DECODE, head_dim=96)])
    lines = use_kept(tmp_path / "cache", "NVIDIA H200")
    assert lines[0].endswith("decode of 4 heads of 128 dims in bfloat16: 16x32x4x4")
    assert lines[2].endswith("decode of 1 heads of 64 dims in float16: heads last, 1056 items")
    assert choice("decode", 4, 128, torch.bfloat16) == DECODE
    assert choice("decode", 1, 64, torch.float16) == ORDER
    for other in (("decode", 8, 128, torch.bfloat16), ("decode", 4, 96, torch.bfloat16)):
        assert choice(*other) is None
    assert choice("prefill", 4, 128, torch.float16) is None


def test_another_card_another_triton_and_no_folder_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, "NVIDIA H200", [DECODE])
    for directory, card in ((tmp_path, "NVIDIA H100 80GB HBM3"), (tmp_path / "other", "NVIDIA H200"), (None, "x")):
        use([DECODE])
        assert use_kept(directory, card) == []
        assert choice("decode", 4, 128, torch.bfloat16) is None
    monkeypatch.setattr(launch, "TRITON_VERSION", "9.9.9")
    assert use_kept(tmp_path, "NVIDIA H200") == []


def test_triton_may_come_in_a_package_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", without)
    keep(tmp_path, "A card", [DECODE])
    assert len(use_kept(tmp_path, "A card")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}}",
        "3",
        "[3]",
        '["decode"]',
        '[{"kernel": "decode"}]',
        *(
            json.dumps([asdict(DECODE) | wrong])
            for wrong in (
                {"kernel": "merge"},
                {"dtype": "bf16"},
                {"dtype": "nn"},
                {"tile": [16, 64, 8]},
                {"tile": [16, 64, 8, 0]},
                {"tile": [16, 48, 8, 3]},
                {"tile": [16, 64.0, 8, 3]},
                {"tile": [16, 64, True, 3]},
                {"tile": "16x64"},
                {"tile": 5},
                {"items": 0},
                {"items": True},
                {"heads_first": 1},
                {"unknown": 1},
            )
        ),
    ],
)
def test_a_file_that_says_something_else_is_told_and_left_alone(text: str, tmp_path: Path) -> None:
    use([DECODE])
    file = file_of(tmp_path, "A card")
    file.write_text(text)
    (line,) = use_kept(tmp_path, "A card")
    assert line.startswith(f"warning: {file} is not used")
    assert choice("decode", 4, 128, torch.bfloat16) is None
    assert file.read_text() == text


def test_a_start_on_a_card_takes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU no file is looked for."""
    keep(tmp_path, "A card", [DECODE])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    told: list[str] = []
    for device in ("cpu", "cuda"):
        assert choice("decode", 4, 128, torch.bfloat16) is None
        _prepare_kernels(EngineConfig(cache_dir=tmp_path), torch.device(device), told.append, ALONE)
    assert choice("decode", 4, 128, torch.bfloat16) == DECODE
    assert [line for line in told if "measured on this card" in line] == [
        f"attention by what was measured on this card, {DECODE.described}"
    ]
