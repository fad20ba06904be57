"""Keys and values reach their slots and no others, by the C kernel and by torch."""

from __future__ import annotations

import pytest
import torch
from prerope.cache.kernels.build import library
from prerope.cache.storage import KVStorage, LayerShape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_rows_are_at_their_slots(
    stored: torch.dtype, strided: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided rows and rows of another dtype are for torch, whatever there is."""
    assert not kernel or library() is not None
    if not kernel:
        monkeypatch.setattr("prerope.cache.storage.library", lambda: None)
    storage = KVStorage([LayerShape(2, 8, 4)] * 2, 5, 4, stored, torch.device("cpu"))
    slots = torch.tensor([13, 2, 19, 0])
    key, value = torch.randn(4, 2, 8).bfloat16(), torch.randn(4, 2, 4).bfloat16()
    if strided:
        key, value = key.transpose(0, 1).contiguous().transpose(0, 1), value[:, [1, 0]].flip(1)
    storage.store(1, key, value, slots)
    for cache, rows in ((storage.keys, key), (storage.values, value)):
        expected = torch.zeros(20, *rows.shape[1:], dtype=stored)
        expected[slots] = rows.to(stored)
        assert torch.equal(cache[1].flatten(0, 1), expected)
        assert not cache[0].any()
