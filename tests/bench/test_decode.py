"""bench.decode: what is timed is the engine's own decode, and figures are worked out as the notes say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.loading import load_engine
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.models.checkpoint import Checkpoint

from bench import decode
from bench.decode import Decoded, slope
from bench.shared.engines import fill

ABOUT = {"rows": 1, "rounds": 3, "steps": 5, "threads": 1, "model": "m", "dtype": "float32", "train_length": 8}
ABOUT |= {"date": "today", "cpu": "one", "cache_bytes_per_token": 1000}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    config = EngineConfig(max_model_len=96, max_num_seqs=2, kv_cache_memory=2**24, prefix_caching=False)
    return load_engine(Checkpoint(str(tiny_checkpoint), "tiny"), config)


@pytest.mark.parametrize("method", ["rope", "rerope:window=8"])
def test_a_step_gives_the_token_that_generation_gives(engine: Engine, method: str) -> None:
    """The cache holds a real prefill here, laid out as the benchmark lays its rows out."""
    positions = engine.resolve_positions(RopeSpec.parse(method))
    prompt = torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest("one", prompt, sampling, positions=positions))
    expected = [token for _ in range(4) for _, output in engine.step() for token in output.token_ids]
    engine.add(EngineRequest("two", prompt, sampling, positions=positions))
    engine.step()
    (sequence,) = engine.scheduler.sequences
    decoding = decode.Decoding(engine, 1)
    decoding._tables, decoding._tokens = [list(sequence.block_table) + [0] * 3], expected[:1]
    found = []
    for context in (41, 42, 43):
        decoding.step(positions, context)
        found += decoding._tokens
    engine.abort("two")
    assert found == expected[1:]


def test_rows_share_no_block_and_reach_the_longest_context(engine: Engine) -> None:
    tables = decode.Decoding(engine, 2)._tables
    assert sorted(tables[0] + tables[1]) == list(range(2 * 96 // 16))


def test_every_slot_is_filled(engine: Engine) -> None:
    fill(engine)
    for tensor in (*engine.storage.keys, *engine.storage.values):
        assert (tensor != 0).any(-1).all()
        assert tensor.float().std().item() == pytest.approx(1, abs=0.1)


def test_each_round_has_every_cell_once_and_a_contexts_methods_in_a_row() -> None:
    order = list(decode.cells([10, 20, 30], ["a", "b"], 4))
    assert set(Counter(order).values()) == {1}
    assert len(order) == 4 * 6
    for first, second in zip(order[::2], order[1::2], strict=True):
        assert first[:2] == second[:2]
    assert len({tuple(cell[1:] for cell in order if cell[0] == number) for number in range(4)}) > 1


def test_a_slope_is_that_of_a_line() -> None:
    assert slope([1000, 2000, 8000], [20.0, 20.5, 23.5]) == pytest.approx(500)
    assert slope([1000], [20.0]) == 0.0


def test_methods_are_compared_within_a_round() -> None:
    """The second round is three times slower for both, the third is disturbed in one cell."""
    rounds = {
        ("rope", 1000): [10.0, 30.0, 10.0],
        ("rope", 2000): [20.0, 60.0, 20.0],
        ("rerope", 1000): [11.0, 33.0, 90.0],
        ("rerope", 2000): [18.0, 54.0, 18.0],
    }
    report = Decoded(["rope", "rerope"], [1000, 2000], rounds, ABOUT)
    assert report.ratio("rerope", 1000) == pytest.approx(1.1)
    assert report.ratio("rerope", 2000) == pytest.approx(0.9)
    assert report.slope("rope") == pytest.approx(10_000)
    assert report.slope_differences("rerope") == pytest.approx([-3000, -9000, -82_000])
    assert report.row("rope") == ["rope", "10.00", "20.00", "10000", "–", "–", "–"]
    assert report.row("rerope") == ["rerope", "33.00", "18.00", "-15000", "-9000", "1.100", "0.900"]
    assert "rope 10000 µs per 1000 tokens (0.1 GB/s)" in report.notes()[-1]


def test_what_it_leaves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = ["--model", tiny_checkpoint, "--methods", "rope,rerope:window=8", "--contexts", "32,64", "--rounds", 2]
    assert decode.main([*map(str, asked), "--threads", "1", "--rows", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "decode.json").read_text())
    assert found["about"]["cache_bytes_per_token"] == 2 * 2 * (16 + 16) * 4  # layers, KV heads, key and value, fp32
    cells = [(cell["method"], cell["context"]) for cell in found["cells"]]
    assert cells == [(method, n) for method in ("rope", "rerope:window=8") for n in (32, 64)]
    assert all(len(cell["rounds_ms"]) == 2 and min(cell["rounds_ms"]) > 0 for cell in found["cells"])
    assert (tmp_path / "decode.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "5,64"], "more than the 5 --steps"),
        (["--rounds", "0"], "0: must be at least 1"),
        (["--methods", "rope,rope"], "each once"),
        (["--methods", "ropes"], "no position method"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.parse_arguments(arguments)
    assert message in capsys.readouterr().err
