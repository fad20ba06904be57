"""Blocks outside the cache: what is written is read, and whatever happens to the files is a miss, never an answer."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prerope.cache import tier as tiers
from prerope.cache.tier import BlockTier, folder_secret
from torch import Tensor

SIZE = 4096


def block(seed: int) -> Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def name(seed: int) -> bytes:
    return seed.to_bytes(16, "big")


def fill(tier: BlockTier, *seeds: int) -> None:
    tier.write([name(seed) for seed in seeds], torch.stack([block(seed) for seed in seeds]))


def fetched(tier: BlockTier, *seeds: int) -> dict[bytes, Tensor]:
    fetch = tier.fetch([[name(seed) for seed in seeds]])
    assert fetch.done.wait(30)
    found = {}
    while not fetch.blocks.empty():
        block_hash, payload = fetch.blocks.get()
        found[block_hash] = payload
    return found


def opened(folder: Path | None, identity: bytes = b"model", **limits: int) -> BlockTier:
    return BlockTier(folder, identity, **{"folder_limit": 2**20, **limits})


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.safetensors"))


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    first = opened(tmp_path)
    fill(first, 1, 2, 3)
    first.close()
    second = opened(tmp_path)
    found = fetched(second, 1, 2, 9, 3)
    assert list(found) == [name(1), name(2)], "a chain ends where a block is missing"
    assert all(torch.equal(found[name(seed)], block(seed)) for seed in (1, 2))
    second.close()
    for path in files_of(tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path)
    fill(first, 1)
    first.close()
    other = opened(tmp_path, b"another model")
    assert not other.holds(name(1))
    assert fetched(other, 1) == {}
    # Even under the other's name.
    (path,) = files_of(tmp_path)
    foreign = other._path(name(1))
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(path.read_bytes())
    other.close()
    assert fetched(opened(tmp_path, b"another model"), 1) == {}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-SIZE // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 100),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "a bit flipped": flip,
    "a header of any length": lambda path: path.write_bytes(b"\xff" * 64),
    "no tensors": lambda path: path.write_bytes(b"\x02\0\0\0\0\0\0\0{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_miss_and_a_warning(tmp_path: Path, damage: str) -> None:
    first = opened(tmp_path)
    fill(first, 1)
    first.close()
    (path,) = files_of(tmp_path)
    DAMAGES[damage](path)
    lines: list[str] = []
    second = BlockTier(tmp_path, b"model", folder_limit=2**20, report=lines.append)
    assert fetched(second, 1) == {}
    assert second.stats.num_damaged == 1
    assert "damaged" in lines[0]
    fill(second, 1)
    second.close()
    assert torch.equal(fetched(opened(tmp_path), 1)[name(1)], block(1)), "made again"


def test_a_file_under_anothers_name_is_a_miss(tmp_path: Path) -> None:
    first = opened(tmp_path)
    fill(first, 1, 2)
    first.close()
    first._path(name(2)).write_bytes(first._path(name(1)).read_bytes())
    assert list(fetched(opened(tmp_path), 1, 2)) == [name(1)]


def test_the_oldest_go_when_the_folder_is_full(tmp_path: Path) -> None:
    tier = opened(tmp_path, folder_limit=8 * SIZE)
    for seed in range(20):
        fill(tier, seed)
    tier.close()
    assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 8 * SIZE
    assert not tier.holds(name(0))
    assert tier.holds(name(19))


def test_files_of_a_clock_that_was_ahead_do_not_outlast_those_in_use(tmp_path: Path) -> None:
    ahead = opened(tmp_path, folder_limit=8 * SIZE)
    fill(ahead, *range(6))
    ahead.close()
    for path in files_of(tmp_path):
        os.utime(path, (time.time() + 10**6,) * 2)
    tier = opened(tmp_path, folder_limit=8 * SIZE)
    for seed in range(100, 112):
        fill(tier, seed)
    tier.close()
    assert not any(tier.holds(name(seed)) for seed in range(6))
    assert all(tier.holds(name(seed)) for seed in (109, 110, 111))


def test_a_full_disk_stops_writing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    tier = BlockTier(tmp_path, b"model", folder_limit=2**20, report=lines.append)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tiers.os, "replace", full)
        fill(tier, 1, 2, 3)
        tier.close()
    assert len(lines) == 1
    assert "No space left" in lines[0]
    assert (tier.stats.num_failed_writes, tier.stats.num_dropped_writes) == (1, 2)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_two_servers_share_a_folder(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    fill(one, 1, 2)
    fill(two, 2, 3)
    one.close()
    two.close()
    third = opened(tmp_path)
    assert len(fetched(third, 1, 2, 3)) == 3
    files_of(tmp_path)[0].unlink()
    assert fetched(third, 1) == {}, "another server has deleted it"
    assert third.stats.num_damaged == 0


def test_memory_alone_forgets_the_oldest() -> None:
    tier = opened(None, memory_limit=3 * SIZE)
    fill(tier, 1, 2, 3, 4)
    tier.close()
    assert [tier.holds(name(seed)) for seed in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_secret_is_kept_and_private(tmp_path: Path) -> None:
    secret = folder_secret(tmp_path / "new")
    assert folder_secret(tmp_path / "new") == secret
    assert stat.S_IMODE((tmp_path / "new" / "secret").stat().st_mode) == 0o600
