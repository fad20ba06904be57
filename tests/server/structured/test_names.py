"""Names that a pattern lists, beside all names that Python's `re` finds to match it."""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Iterable

import pytest
from prerope.server.structured.names import listed_names

NAMES = ["".join(some) for length in range(5) for some in itertools.product("abc", repeat=length)]
PARTS = ("a", "b", "[ab]", "[a-b]", "a?", "b*", "(a|b)", "(?:ab|)", "a{2}", "(a?b){1,2}", "^", "$", "|", "[^a]", ".")


def listed(pattern: str, given: Iterable[str]) -> set[str] | None:
    return listed_names([pattern], given)[pattern]


def test_lists_what_matches() -> None:
    rng = random.Random(0)
    num_listed = 0
    for _ in range(3_000):
        parts = rng.choices(PARTS, k=rng.randrange(5))
        pattern = rng.choice(["^", ""]) + "".join(parts) + rng.choice(["$", ""])
        given = [name for name in NAMES if rng.random() < 0.95]
        found = listed(pattern, given)
        if found is not None:
            num_listed += 1
            assert found == {name for name in NAMES if re.search(pattern, name)}, pattern
    assert num_listed > 150


@pytest.mark.parametrize(
    ("pattern", "names"),
    [(r"^\d$", set("0123456789")), (r"^\u0061{1,3}$", {"a", "aa", "aaa"}), ("^[$]$", {"$"}), (r"^\^$", {"^"})],
)
def test_lists_classes_escapes_and_what_looks_like_an_anchor(pattern: str, names: set[str]) -> None:
    assert listed(pattern, names) == names
    assert listed(pattern, names | {"other"}) == names
    assert listed(pattern, names - {max(names)}) is None


ELSEWHERE = (r"^[]a[b]]$", r"^[\]a[b]]$", "^[a&&b]$", "^[[a]b]$", "^a{,2}$", "^a{1 }$", "^(?#b)a$", r"^\N{DIGIT ONE}$")
"""What others read in another way than Python does."""


@pytest.mark.parametrize(
    "pattern",
    [*ELSEWHERE, "(?i)^a$", "^(?i:a)$", "^(?=a)a$", "^a$b", "$^", "^^a$", "^a$$", "^a^b$", "^a", "a$", "^[a", r"^\s$"],
)
def test_what_it_does_not_tell_is_no_list(pattern: str) -> None:
    given = ["a", "b", "", "aa", "1", "^^a", "a$$", "a^^b", "a{,2}", "a{1 }", "]]", "a]", "[]", "b]", "]"]
    assert listed(pattern, given) is None


@pytest.mark.parametrize(
    "pattern", ["^(?:){99999999}$", "^(a?){65535}$", "^((a{999}){999}){999}$", "^" + "(|a)" * 1000 + "$"]
)
def test_ends_whatever_is_repeated(pattern: str) -> None:
    """Each took minutes, or would."""
    assert listed(pattern, ["", "a" * 3000]) in ({""}, None)


def test_many_patterns_share_their_work() -> None:
    """Each by itself looked through all names: two thousand of them took nearly a minute."""
    word = string.ascii_letters + string.digits + "_"
    names = {first + second for first in word for second in word}
    patterns = [r"^\w\w" + "()" * count + "$" for count in range(100)]
    found = listed_names([*patterns, r"^\w{2}$"], names)
    assert found[patterns[0]] == listed(r"^\w{2}$", names) == names
    assert found[r"^\w{2}$"] is None
