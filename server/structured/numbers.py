"""Numbers of a JSON schema as llguidance has them: floats of 64 bits, and whole ones of 64 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, TypeGuard

from prerope.server.structured.values import Unenforceable

MOST = 2**63 - 1024
"""The largest bound that llguidance takes: the largest float below the end of its integers."""

STEP = 1e-9
"""How far inside of an exclusive bound a number begins, where llguidance does not hold the bound."""

MAX_MULTIPLE = 10_000
"""Of `multipleOf`, in its last digit: a lexer has a state for each remainder."""


def narrow_bounds(schema: dict[str, Any], *, met: bool) -> None:
    """Bounds that 64-bit floats have, and llguidance takes and holds. met: others may look at the same value."""
    for side in ("Minimum", "Maximum"):
        plain, exclusive = side.lower(), f"exclusive{side}"
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and plain in schema:  # as draft 4 has it
            schema[exclusive] = schema.pop(plain)
        for key in (plain, exclusive):
            bound = schema.get(key)
            if is_number(bound) and (abs(bound) > MOST or (isinstance(bound, int) and int(float(bound)) != bound)):
                schema[key] = _inner_bound(bound, upper=side == "Maximum")
    if schema.get("type") != "integer":
        _step_inside(schema, "Minimum", "Maximum", 1, met=met)
        _step_inside(schema, "Maximum", "Minimum", -1, met=met)


def _step_inside(schema: dict[str, Any], side: str, other: str, sign: int, *, met: bool) -> None:
    """An exclusive bound that is whole, as one that is not exclusive: llguidance lets it through where the other bound
    is less than 1 away."""
    plain, exclusive = side.lower(), f"exclusive{side}"
    bound = schema.get(exclusive)
    if not is_number(bound) or abs(bound) > MOST or not float(bound).is_integer():
        return
    others = [schema.get(key) for key in (other.lower(), f"exclusive{other}")]
    if not met and all(not is_number(one) or abs(one - bound) >= 1 for one in others):
        return
    step = STEP if abs(bound) < 1 / STEP / 1000 else 1
    inner = bound + sign * step
    given = schema.get(plain)
    schema[plain] = inner if not is_number(given) else sign * max(sign * inner, sign * given)
    del schema[exclusive]


def count_integers(schema: dict[str, Any], most: int) -> int:
    """How many whole numbers lie within a schema's bounds, up to `most`."""

    def inner(plain: str, exclusive: str, sign: int) -> int | None:
        """The outermost number on one side."""
        bound, beyond = schema.get(plain), schema.get(exclusive)
        found = [math.ceil(sign * bound)] if is_number(bound) and abs(bound) < math.inf else []
        found += [math.floor(sign * beyond) + 1] if is_number(beyond) and abs(beyond) < math.inf else []
        return sign * max(found) if found else None

    least, last = inner("minimum", "exclusiveMinimum", 1), inner("maximum", "exclusiveMaximum", -1)
    return most if least is None or last is None else min(max(last - least + 1, 0), most)


def is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _inner_bound(bound: float, *, upper: bool) -> float:
    """The nearest that allows no more. Unenforceable for what lies wholly beyond."""
    sign = 1 if upper else -1
    if sign * bound >= MOST:
        return sign * MOST
    if abs(bound) > MOST:
        raise Unenforceable(f"a bound beyond {sign * -MOST} leaves no number that can be written")
    near = float(bound)
    return bound if sign * near <= sign * bound else int(math.nextafter(near, -sign * math.inf))


def check_numbers(value: Any) -> None:
    """Unenforceable for a listed value with a number that would come out as another one."""
    for number in _numbers(value):
        if isinstance(number, int) and (abs(number) > MOST or int(float(number)) != number):
            raise Unenforceable(f"a listed number of {len(str(abs(number)))} digits cannot be written exactly")


def _numbers(value: Any) -> Iterator[int | float]:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, int | float):
            yield one


def check_multiples(given: Sequence[Any], *, met: bool) -> None:
    """Unenforceable where a `multipleOf` has too many remainders, or where llguidance could not multiply those that may
    meet in one value (met)."""
    known = [one for one in given if is_number(one) and 0 < abs(one) < math.inf]
    numbers = [Decimal(repr(abs(number))).normalize() for number in known]
    shifts = [max(0, -int(number.as_tuple().exponent)) for number in numbers]
    if any(number.scaleb(shift) > MAX_MULTIPLE for number, shift in zip(numbers, shifts, strict=True)):
        raise Unenforceable(f"'multipleOf' may be up to {MAX_MULTIPLE}, counted in its last digit")
    whole = [int(number.scaleb(max(shifts))) for number in numbers]
    if met and math.lcm(1, *whole) * max(whole, default=1) >= 2**32:
        raise Unenforceable("the least common multiple of its 'multipleOf' is too large")
