"""The kernels under Triton's interpreter, on the CPU; tests/conftest.py asks for it before Triton is imported.

Compilation is tested in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def interpreter() -> Iterator[None]:
    """The interpreter, less what makes it slow, and a grid of few programs."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is off: kernels are compiled for a GPU here")
    from triton.runtime.interpreter import InterpretedFunction

    from cache.kernels import decode

    with pytest.MonkeyPatch.context() as patch:
        device_function, patched = InterpretedFunction.__call__, set[str]()

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            """Of a device function. Patching triton.language anew at every call would be half of all time."""
            module = self.fn.__module__
            if module.startswith("cache.") or module in patched:
                return self.rewrite()(*arguments, **named)
            patched.add(module)
            return device_function(self, *arguments, **named)

        patch.setattr(InterpretedFunction, "__call__", call)
        patch.setattr(decode, "ITEMS", 6)
        patch.setattr(decode, "LEAST_TILES", 1)
        patch.setattr(decode, "LEAST_UNITS", 1)
        patch.setattr(decode, "MERGED", 64)
        yield
