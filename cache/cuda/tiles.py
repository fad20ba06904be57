"""Tile sizes by measurement: what `bench.gpu.sweep --keep` found faster on a card than what is shipped.

A file a card and Triton, beside the built kernels: other versions compile to other registers. What it says holds for
the shapes of heads that were measured; all others keep the sizes that are shipped. A file that does not say what it
should is told, and left alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

KERNELS = ("decode", "prefill")
LIMITS = ((16, 256), (16, 256), (1, 16), (1, 8))
"""Of rows and keys of a tile, warps and stages."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one kernel, for heads of one shape.

    Attributes:
        group: query heads of a KV head.
        dtype: of the cache, as torch calls it.
        tile: rows, keys, warps and stages; None where those that are shipped are best.
        heads_first, items: of decode's grid; None likewise.
    """

    kernel: str
    group: int
    head_dim: int
    dtype: str
    tile: tuple[int, int, int, int] | None = None
    heads_first: bool | None = None
    items: int | None = None

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS or not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"there is no {self.kernel} of {self.dtype}")
        if self.tile is not None:
            fits = len(self.tile) == len(LIMITS) and all(
                type(size) is int and low <= size <= high for size, (low, high) in zip(self.tile, LIMITS, strict=True)
            )
            if not fits or any(size & (size - 1) for size in self.tile[:3]):
                raise ValueError(f"{self.tile} is no tile")
        if self.items is not None and not (type(self.items) is int and 1 <= self.items <= 2**16):
            raise ValueError(f"{self.items} are no items")
        if self.heads_first is not None and type(self.heads_first) is not bool:
            raise ValueError(f"{self.heads_first!r} is no order")

    @property
    def described(self) -> str:
        found = [] if self.tile is None else ["x".join(map(str, self.tile))]
        found += [] if self.heads_first is None else [f"heads {'first' if self.heads_first else 'last'}"]
        found += [] if self.items is None else [f"{self.items} items"]
        return f"{self.kernel} of {self.group} heads of {self.head_dim} dims in {self.dtype}: {', '.join(found)}"


_choices: dict[tuple[str, int, int, torch.dtype], Choice] = {}


def choice(kernel: str, group: int, head_dim: int, dtype: torch.dtype) -> Choice | None:
    """What was measured for this kernel and these heads; None: what is shipped."""
    return _choices.get((kernel, group, head_dim, dtype))


def use(choices: Sequence[Choice]) -> None:
    """From now on, in place of all others; before anything is planned."""
    _choices.clear()
    for one in choices:
        _choices[one.kernel, one.group, one.head_dim, getattr(torch, one.dtype)] = one


def file_of(directory: Path, card: str) -> Path:
    """Where the choices of a card are kept, for the Triton that is installed."""
    from prerope.cache.kernels.triton.launch import TRITON_VERSION

    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return directory / f"tiles-{name}-triton-{TRITON_VERSION}.json"


def keep(directory: Path, card: str, choices: Sequence[Choice]) -> Path:
    """Write them where `use_kept` finds them."""
    target = file_of(directory, card)
    written = target.with_suffix(f".{os.getpid()}")
    directory.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps([asdict(one) for one in choices], indent=1) + "\n")
    os.replace(written, target)
    return target


def use_kept(directory: Path | None, card: str) -> list[str]:
    """Use what is kept of this card; lines about it, none where nothing is."""
    use([])
    if directory is None or not (file := file_of(directory, card)).exists():
        return []
    try:
        choices = [_read(one) for one in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        return [f"warning: {file} is not used, attention has the tile sizes that are shipped: {error}"]
    use(choices)
    return [f"attention by what was measured on this card, {one.described}" for one in choices]


def _read(found: Mapping[str, Any]) -> Choice:
    tile = found.get("tile")
    return Choice(**{**found, "tile": None if tile is None else tuple(tile)})
