"""How deep JSON nests. A leaf."""

from __future__ import annotations

from itertools import chain
from typing import Any


def nests_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand deeper within each other than so many levels."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(levels):
        held = chain.from_iterable(outer.values() if type(outer) is dict else outer for outer in level)
        level = [one for one in held if type(one) is list or type(one) is dict]
        if not level:
            return False
    return bool(level)
