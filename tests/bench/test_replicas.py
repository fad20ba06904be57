"""The simulation of many replicas, against what can be said without it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bench.replicas.simulation import parse, simulate


def simulated(*flags: str) -> dict[str, float]:
    return simulate(parse(["--seconds", "120", *flags]))


def test_the_command_of_the_page_is_understood() -> None:
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    (flags,) = re.findall(r"`python -m bench\.replicas\.simulation ([^`]*)`", page)
    asked = parse(shlex.split(flags))
    assert (asked.replicas, asked.prefill) == (1000, 613)


def test_one_replica_with_room_finds_all_that_was_there_before() -> None:
    """Turn t finds what turn t − 1 left: all but `more` of each prompt after the first."""
    found = simulated("--replicas", "1", "--rate", "1", "--cache", str(10**9))
    prompts = [2000 + 400 * turn for turn in range(5)]
    assert found["found in the cache"] == pytest.approx(sum(p - 200 for p in prompts[1:]) / sum(prompts))


def test_prefixes_are_worth_a_router() -> None:
    best, least, chance = (
        simulated("--policy", policy)["found in the cache"] for policy in ("prefix", "least", "random")
    )
    assert best > 0.65 > 0.3 > max(least, chance) > 0


def test_a_tier_gives_what_the_cache_has_no_room_for() -> None:
    small = ("--replicas", "2", "--rate", "1", "--cache", "20000")
    without, with_tier = simulated(*small), simulated(*small, "--tier", "1e9")
    total = sum(with_tier[name] for name in ("found in the cache", "found in the tier"))
    assert total > 0.65 > 0.6 > without["found in the cache"]
    assert with_tier["busy reading"] < without["busy reading"]


def test_failures_cost_what_their_caches_held() -> None:
    assert simulated("--failures", "60")["found in the cache"] < simulated()["found in the cache"]
