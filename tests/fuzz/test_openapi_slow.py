"""The edges of each field of large bodies, for tests/fuzz/test_openapi.py: cases that take long to make, and to ask."""

from __future__ import annotations

import pytest

from tests.fuzz.test_openapi import LARGE, api, name_of, operation_test, url

__all__ = ["url"]

pytestmark = pytest.mark.slow

for _path in LARGE:
    globals()[f"{name_of('post', _path)}_at_its_edges"] = operation_test("post", _path, api, 10)
