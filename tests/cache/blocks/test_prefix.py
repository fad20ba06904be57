"""Prefix hashes: equal exactly where K and V are, whatever the method that is to read them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prerope.cache.blocks.manager import PrefixHasher
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.spec import RopeSpec

from tests.cache.layouts import TRAINED, rotary

BLOCK = 16
TOKENS = list(range(1000, 1000 + 20 * BLOCK))


def positions(method: str, **spec: object) -> ModelPositions:
    return resolve_model(RopeSpec(method=method, **spec), {"": rotary(16, 16)}, None)  # type: ignore[arg-type]


def hashes(resolved: ModelPositions, tokens: list[int] = TOKENS, salt: str = "", block: int = BLOCK) -> list[bytes]:
    return list(PrefixHasher(block, resolved, salt).extend(tokens))


def num_shared(one: list[bytes], other: list[bytes]) -> int:
    """Length of the common beginning; past it nothing may be equal, since the hashes are chained."""
    equal = [a == b for a, b in zip(one, other, strict=True)]
    count = equal.index(False) if False in equal else len(equal)
    assert not any(equal[count:])
    return count


@given(st.lists(st.integers(0, 2**31 - 1), max_size=70), st.data())
@settings(max_examples=50, deadline=None)
def test_extending_in_pieces_is_extending_at_once(tokens: list[int], data: st.DataObject) -> None:
    resolved = positions("rerope", window=20)
    hasher = PrefixHasher(4, resolved, "salt")
    for stop in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        hasher.extend(tokens[:stop])
    whole = hasher.extend(tokens)
    assert whole == hashes(resolved, tokens, "salt", block=4)
    assert len(whole) == len(tokens) // 4


def test_a_token_changes_its_block_and_all_after_it() -> None:
    resolved = positions("rope")
    changed = list(TOKENS)
    changed[5 * BLOCK + 3] += 1
    assert num_shared(hashes(resolved), hashes(resolved, changed)) == 5
    swapped = TOKENS[BLOCK : 2 * BLOCK] + TOKENS[:BLOCK] + TOKENS[2 * BLOCK :]
    assert num_shared(hashes(resolved), hashes(resolved, swapped)) == 0
    assert len(set(hashes(resolved))) == 20
    assert len(set(hashes(resolved, [7] * len(TOKENS)))) == 20, "equal tokens elsewhere are another prefix"


def test_salt_separates_everything() -> None:
    resolved = positions("rope")
    assert num_shared(hashes(resolved, salt="a"), hashes(resolved, salt="b")) == 0
    assert num_shared(hashes(resolved, salt="a"), hashes(resolved)) == 0
    assert num_shared(hashes(resolved, salt="a"), hashes(resolved, salt="a")) == 20


@pytest.mark.parametrize(
    ("method", "spec", "blocks"),
    [
        ("offset", {}, 20),
        ("model", {}, 20),
        ("linear", {"factor": 1.0}, 20),
        ("linear", {"factor": 2.0}, 0),
        ("ntk", {"factor": 2.0}, 0),
        ("yarn", {"factor": 2.0}, 0),
        ("longrope", {}, 0),  # its short factors are not rope's here
        # The exceptions: rows before the window, or inside the trained length (64 tokens, 4 blocks), are rope's.
        ("rerope", {"window": 48}, 3),
        ("rerope", {"window": 47}, 2),
        ("rerope", {"window": 49}, 3),
        ("rerope", {"window": 15}, 0),
        ("leaky_rerope", {"window": 48}, 3),
        ("dynamic_leaky", {"window": 16}, TRAINED // BLOCK),
        ("dynamic_linear", {}, TRAINED // BLOCK),
        ("dynamic_ntk", {}, TRAINED // BLOCK),
        ("dynamic_yarn", {}, TRAINED // BLOCK),
        ("rope", {"logn": True}, TRAINED // BLOCK),
        ("rerope", {"window": 48, "logn": True}, 3),
    ],
)
def test_blocks_shared_with_rope(method: str, spec: dict[str, object], blocks: int) -> None:
    assert num_shared(hashes(positions("rope")), hashes(positions(method, **spec))) == blocks


def test_blocks_shared_between_two_other_methods() -> None:
    rerope, leaky = positions("rerope", window=48), positions("leaky_rerope", window=32, leak=4.0)
    assert num_shared(hashes(rerope), hashes(leaky)) == 2
    assert num_shared(hashes(rerope), hashes(positions("dynamic_ntk"))) == 3
    assert num_shared(hashes(positions("dynamic_yarn")), hashes(positions("dynamic_ntk"))) == 4
    assert num_shared(hashes(rerope), hashes(positions("rerope", window=48, logn=True))) == 3
    assert num_shared(hashes(positions("linear", factor=2.0)), hashes(positions("linear", factor=3.0))) == 0


def test_longrope_shares_only_with_itself() -> None:
    one, other = hashes(positions("longrope")), hashes(positions("longrope"))
    assert num_shared(one, other) == 20
