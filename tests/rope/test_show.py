"""What is drawn is what is read, and the page of all methods is the registry's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from prerope.rope.methods import method_table, resolve
from prerope.rope.show import EXAMPLE, FOLDER, UNREAD, draw, example, main, page, seen
from prerope.rope.spec import RopeSpec

from tests.tiers import every

LENGTH = 3000


def distances(name: str, **spec: object) -> np.ndarray:
    rows = torch.arange(0, LENGTH, 37)
    drawn = seen(resolve(RopeSpec(method=name, **spec), EXAMPLE, LENGTH), rows, rows)  # type: ignore[arg-type]
    exact = (rows[:, None] - rows).double()
    assert torch.equal(drawn.isnan(), exact < 0), "keys after the row, and no others"
    return np.stack([drawn[exact >= 0].numpy(), exact[exact >= 0].numpy()])


def test_maps_of_methods_whose_distance_is_the_same_for_every_pair() -> None:
    drawn, exact = distances("rerope", window=200)
    np.testing.assert_allclose(drawn, np.minimum(exact, 200), atol=1e-6)
    drawn, exact = distances("leaky_rerope", window=200, leak=5.0)
    np.testing.assert_allclose(drawn, np.where(exact < 200, exact, (exact - 200) / 5 + 200), atol=1e-6)
    drawn, exact = distances("linear", factor=3.0)
    np.testing.assert_allclose(drawn, exact / 3, atol=1e-6)


def test_the_slowest_pair_of_ntk_is_interpolated_by_its_factor() -> None:
    drawn, exact = distances("ntk", factor=3.0)
    np.testing.assert_allclose(drawn, exact / 3, rtol=1e-9, atol=1e-6)


def test_what_streaming_leaves_out_is_marked() -> None:
    drawn, exact = distances("streaming", window=500, sinks=1)
    np.testing.assert_allclose(drawn[exact < 500], exact[exact < 500], atol=1e-6)
    far = drawn[exact >= 500]
    assert set(np.unique(far.round(6))) == {UNREAD, 500.0}


@pytest.mark.parametrize("name", every(2, ["rope", "longrope", "streaming", "dual_chunk", "dynamic_leaky"]))
def test_methods_of_every_shape_can_be_drawn(name: str, tmp_path: Path) -> None:
    """Few runs and many, one frequency vector and two, keys that are not read; `make docs` draws all the others."""
    entry = next(entry for entry in method_table() if entry.name == name)
    draw(example(entry), 300, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_is_drawn() -> None:
    assert {f"{entry.name}.png" for entry in method_table()} <= {path.name for path in (FOLDER / "figures").iterdir()}


def test_the_page_is_the_registrys() -> None:
    assert (FOLDER / "METHODS.md").read_text(encoding="utf-8") == page(), "run make docs"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's own config, resolved: the parameters that a server would use."""
    config = {
        "model_type": "llama",
        "head_dim": 32,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rope_theta": 50000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["model", "rerope:window=64", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("method")] == ["yarn", "rerope"]
    assert "factor                   4.0" in printed
    assert "attention_factor         1.138629" in printed  # 0.1·ln 4 + 1
    assert "farthest distance seen   16.0" in printed  # the slowest pair of yarn's θ turns a quarter as fast
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.png", "rerope-window=64.png"]


@pytest.mark.parametrize("text", ["rotary", "rerope:window=none", "rerope:window=5000"])
def test_a_bad_method_is_refused_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([text, "--out", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
