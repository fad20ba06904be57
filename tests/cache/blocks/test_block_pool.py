"""The rules of the block pool one by one; tests/fuzz/test_block_pool_machine.py has random histories."""

from __future__ import annotations

import pytest
from prerope.cache.blocks.manager import BlockPool


def test_the_end_of_a_chain_is_reused_before_its_beginning() -> None:
    pool = BlockPool(4)
    chain = pool.allocate(4)
    for place, block in enumerate(chain):
        pool.remember(block, bytes([place]))
    pool.release(chain)
    pool.allocate(2)
    assert [pool.find(bytes([place])) is not None for place in range(4)] == [True, True, False, False]


def test_least_recently_freed_goes_first_and_being_shared_makes_recent() -> None:
    pool = BlockPool(3)
    for place in range(3):
        (block,) = pool.allocate(1)
        pool.remember(block, bytes([place]))
    for place in range(3):
        pool.release([pool.find(bytes([place]))])  # type: ignore[list-item]
    oldest = pool.find(bytes([0]))
    assert oldest is not None
    pool.share([oldest])
    pool.release([oldest])
    pool.allocate(2)
    assert pool.find(bytes([0])) == oldest


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached, partial = pool.allocate(2)
    pool.remember(cached, b"known")
    pool.release([cached])
    pool.release([partial])
    assert pool.allocate(1) == [partial]
    assert pool.find(b"known") == cached


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])
    with pytest.raises(AssertionError, match=r"allocate\(3\) with 2 free"):
        pool.allocate(3)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([[0]])


def test_integrity_notices_a_leak_a_lost_block_and_a_wrong_index() -> None:
    leaking = BlockPool(2)
    leaking.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        leaking.check_integrity()
    lost = BlockPool(2)
    del lost._free[0]
    with pytest.raises(AssertionError, match="free queue"):
        lost.check_integrity()
    misled = BlockPool(2)
    misled._block_of[b"x"] = 1
    with pytest.raises(AssertionError, match="hash index"):
        misled.check_integrity()
