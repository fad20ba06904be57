"""The kernels on the device under test: on a card as they are compiled, else under Triton's interpreter on the CPU, for
which tests/conftest.py asks before Triton is imported.

Compilation without a card is tested in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.device import DEVICE


class Bounds:
    """The memory of a launch's tensors. Only on a card would a load or store outside it be seen, and not always."""

    def __init__(self) -> None:
        self._starts = self._ends = np.zeros(0, dtype=np.uint64)

    def launch(self, tensors: list[Tensor]) -> None:
        spans: list[list[int]] = []
        for begin, end in sorted(_span(tensor) for tensor in tensors if tensor.numel()):
            if spans and begin <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([begin, end])
        self._starts, self._ends = np.array(spans, dtype=np.uint64).T

    def check(self, pointers: Any, mask: Any) -> None:
        found = pointers.data[mask.data.astype(bool)]
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        span = np.searchsorted(self._starts, found, side="right") - 1
        assert (span >= 0).all(), "an address before all tensors"
        assert (found + size <= self._ends[span]).all(), "an address outside all tensors"


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.fixture(scope="package", autouse=True)
def interpreter() -> Iterator[None]:
    """What nobody wrote is NaN, and items are few; the interpreter, where it is, is made faster and checks bounds."""
    triton = pytest.importorskip("triton")
    from prerope.cache.kernels.triton import decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "ITEMS", 6)
        patch.setattr(decode, "LEAST_TILES", 1)
        if DEVICE == "cpu":
            assert triton.knobs.runtime.interpret, "there is no card to compile kernels for"
            patch.setattr(decode, "LEAST_UNITS", 1)
            patch.setattr(decode, "MERGED", 64)
            hasten(patch)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
        yield
        torch.use_deterministic_algorithms(False)


def no_overflow(_semantic: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Sums, differences and products of integers fit into their type. Triton's own check asks for as much in some
    thirty operations of its language, and forgets it where nobody debugs."""
    one, other = lhs.handle.data, rhs.handle.data
    if one.dtype.itemsize < 8:
        exact = NUMPY[operation.__name__](one.astype(np.int64), other.astype(np.int64))
        assert (exact == exact.astype(one.dtype)).all(), f"overflow in {operation.__name__}"


NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def hasten(patch: pytest.MonkeyPatch) -> None:
    """The interpreter, with addresses checked, and integers."""
    from triton import language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder

    device_function, patched = InterpretedFunction.__call__, set[str]()

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        """Of a device function. Patching triton.language anew at every call would be half of all time."""
        module = self.fn.__module__
        if module.startswith("prerope.") or module in patched:
            return self.rewrite()(*arguments, **named)
        patched.add(module)
        return device_function(self, *arguments, **named)

    find_dtype, dtypes = interpreter._get_np_dtype, dict[str, Any]()

    def np_dtype(asked: Any) -> Any:
        """It makes a table of all of them at every call."""
        scalar = asked.element_ty if isinstance(asked, tl.block_type) else asked
        if scalar.name not in dtypes:
            dtypes[scalar.name] = find_dtype(scalar)
        return dtypes[scalar.name]

    blocks = dict[tuple[Any, ...], Any]()

    def block(element: Any, shape: Any) -> Any:
        """Types are made as often as tensors, of which a kernel has a dozen."""
        key = element.name, *shape
        if key not in blocks:
            blocks[key] = tl.block_type(element, shape)
        return blocks[key]

    bounds = Bounds()
    host_arguments = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def launched(self: Any, given: Any, named: Any) -> Any:
        given, named = host_arguments(self, given, named)
        bounds.launch([value for value in (*given, *named.values()) if isinstance(value, Tensor)])
        return given, named

    def checked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        bounds.check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        bounds.check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", no_overflow)
    patch.setattr(interpreter, "_get_np_dtype", np_dtype)
    patch.setattr(tl.block_type, "with_element_ty", lambda self, element: block(element, self.shape))
    patch.setattr(InterpreterBuilder, "get_block_ty", lambda _, element, shape: block(element, shape))
    patch.setattr(InterpretedFunction, "__call__", call)
    patch.setattr(GridExecutor, "_init_args_hst", launched)
    patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
