"""Speculation beside none: figures of both, and a token that differs is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.loading import load_engine
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer

from bench import BenchError, speculation


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint(str(tiny_checkpoint), "tiny")


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return load_engine(checkpoint, EngineConfig(prefix_caching=False, kv_cache_memory=2**22))


def test_both_ways_give_figures_and_the_same_tokens(
    engine: Engine, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    asked = speculation.parse_arguments(["--streams", "2", "--passage", "40", "--tokens", "12", "--rounds", "1"])
    rows = list(speculation.compare(engine, tokenizer, asked))
    assert [row[:2] for row in rows] == [["copying", "2"], ["free writing", "2"]]
    assert all(float(figure) > 0 for row in rows for figure in row[2:4])
    plain = speculation.run

    def cheating(*arguments: object, speculation: bool) -> list[list[int]]:
        tokens = plain(*arguments, speculation=speculation)  # type: ignore[arg-type]
        return [[*tokens[0][:-1], -1], *tokens[1:]] if speculation else tokens

    monkeypatch.setattr(speculation, "run", cheating)
    with pytest.raises(BenchError, match="another token"):
        list(speculation.compare(engine, tokenizer, asked))
