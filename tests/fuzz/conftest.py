"""`pytest tests/fuzz` is small and the same every time; with `--hypothesis-profile=long` it is random and long."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("long", deadline=None, print_blob=True)  # `tests.fuzz.budget` multiplies by it
