"""How much each fuzz test tries: little and always the same in CI, `LONG` times that at random by profile."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

LONG = 50


def budget(max_examples: int, **options: Any) -> settings:
    """Settings of one test that tries `max_examples` in CI."""
    long = settings.get_current_profile_name() == "long"
    return settings(
        max_examples=max_examples * (LONG if long else 1),
        deadline=None,
        derandomize=not long,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        **options,
    )
