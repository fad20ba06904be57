"""Which of many like cases `make test` tries. The others are slow: `make test-slow` tries them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(nth: int, cases: Iterable[Any]) -> list[Any]:
    """For `parametrize`: the first case and each nth after it are quick, all others slow.

    A case that is a tuple has the values of several arguments.
    """
    return [
        case
        if number % nth == 0
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
