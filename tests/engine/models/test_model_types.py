"""Every decoder type of transformers: served and equal to it, or refused for the reason that docs/models.md gives."""

from __future__ import annotations

import re

import pytest

from tests.engine.models.model_table import OUTCOMES, PAGE, Verdict, examine, read_table, table
from tests.engine.models.model_types import MODEL_TYPES
from tests.tiers import every

SAMPLE = (
    *("llama", "ministral3", "olmo", "gemma4_text", "nanochat", "deepseek_v3", "gpt2", "bloom", "gptj", "moshi"),
    *("mamba2", "minimax_m3_vl_text", "phimoe", "bert", "bart", "kosmos-2.5"),
)


def check(model_type: str) -> None:
    expected = read_table(PAGE.read_text(encoding="utf-8"))[model_type]
    found = examine(model_type)
    assert found == expected, f"run: python -m tests.engine.models.model_table {model_type}"


@pytest.mark.parametrize("model_type", every(4, SAMPLE, quick=2))
def test_one_of_each_kind(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in SAMPLE])
def test_every_type(model_type: str) -> None:
    check(model_type)


def test_the_page_has_every_type_and_no_vague_reason() -> None:
    page = PAGE.read_text(encoding="utf-8")
    verdicts = read_table(page)
    assert set(verdicts) == set(MODEL_TYPES)
    assert page == table(verdicts)
    assert all(verdict.outcome in OUTCOMES for verdict in verdicts.values())
    reasons = [verdict.reason for verdict in verdicts.values() if verdict != Verdict("served")]
    assert all(reasons)
    assert not [reason for reason in reasons if re.search("Error|object has no|NoneType|torch\\.|argument '", reason)]
