"""The store kernel against indexing."""

from __future__ import annotations

import pytest
import torch
from prerope.cache.cuda.attention import cuda_store

from tests.device import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_go_to_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    """Keys and values are views of merged projections; heads × dims is no power of two; −1 stores nothing."""
    merged = torch.randn(5, 9, 24, device=DEVICE)
    key, value = merged[:, :3], merged[:, 3:6]
    keys, values = torch.randn(2, 4, 8, 3, 24, device=DEVICE).to(dtype)
    slots = torch.tensor([31, 0, -1, 9, 17], device=DEVICE)
    expected_keys, expected_values = keys.clone(), values.clone()
    kept = slots >= 0
    expected_keys.view(-1, 3, 24)[slots[kept]] = key[kept].to(dtype)
    expected_values.view(-1, 3, 24)[slots[kept]] = value[kept].to(dtype)
    cuda_store(key, value, keys, values, slots)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.skipif(DEVICE != "cpu", reason="a card may not see it, or may end the process")
@pytest.mark.parametrize("slot", [64, 2**20])
def test_an_address_outside_the_cache_is_seen(slot: int) -> None:
    """By the tests' own check of bounds, which all kernels run under here."""
    keys, values, row = torch.zeros(8, 8, 2, 4), torch.zeros(8, 8, 2, 4), torch.ones(1, 2, 4)
    with pytest.raises(Exception, match="outside all tensors"):
        cuda_store(row, row, keys, values, torch.tensor([slot]))
