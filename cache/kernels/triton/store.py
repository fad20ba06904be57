"""Store: raw keys and values of a step's rows into their slots. One program a row; nothing is rotated or converted
but the dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

LANES = 1024


@triton.jit
def copy_row(source, target, SIZE: tl.constexpr, LANES: tl.constexpr):
    for first in tl.static_range(0, SIZE, LANES):
        lane = first + tl.arange(0, LANES)
        tl.store(target + lane, tl.load(source + lane, mask=lane < SIZE).to(target.dtype.element_ty), mask=lane < SIZE)


@triton.jit
def store_kernel(
    key, value, keys, values, slots, key_stride, value_stride,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """key: [T, Hkv·D] with rows key_stride apart; keys: [slots, Hkv·D]. A negative slot stores nothing (padding)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        copy_row(key + row * key_stride, keys + slot * KEY_SIZE, KEY_SIZE, LANES)
        copy_row(value + row * value_stride, values + slot * VALUE_SIZE, VALUE_SIZE, LANES)


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """key [T, Hkv, D] and value [T, Hkv, Dv], whose heads lie side by side; keys and values contiguous caches."""
    for rows, cache in ((key, keys), (value, values)):
        assert rows.stride(2) == 1, "a head's dims lie side by side"
        assert rows.stride(1) == rows.shape[2], "heads lie side by side"
        assert cache.is_contiguous(), "the cache is contiguous"
    store_kernel[(len(key),)](
        key, value, keys, values, slots, key.stride(0), value.stride(0),
        KEY_SIZE=key.shape[1] * key.shape[2], VALUE_SIZE=value.shape[1] * value.shape[2], LANES=LANES, num_warps=4,
    )  # fmt: skip
