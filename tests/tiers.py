"""Which of many like cases are tried when: quick ones by `make test`, `ci` ones by `make test-ci`, which CI runs beside
it, slow ones by `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(nth: int, cases: Iterable[Any], *, quick: int | None = None) -> list[Any]:
    """For `parametrize`: the first case and each nth after it are tried by CI, all others are slow.

    quick: how many of those `make test` tries, from the first on; all, where it is None.
    A case that is a tuple has the values of several arguments.
    """

    def tier(number: int) -> Any:
        if number % nth:
            return pytest.mark.slow
        return () if quick is None or number // nth < quick else pytest.mark.ci

    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=tier(number))
        for number, case in enumerate(cases)
    ]
