"""What a safetensors file says that it holds, and whether that can be: its header is read and no weight.

Whatever a header says is held to the format: known types, shapes and places that agree, each byte of the file in one
tensor. The format's own library refuses the same, in words about its code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"
OTHERS = {
    b"GGUF": "is a GGUF file: give it a name that ends in .gguf, and that name as MODEL_ID",
    b"PK\x03\x04": "is a zip archive, such as torch.save writes: convert it once with transformers' save_pretrained",
    b"\x80\x02": "is a pickle, such as torch.save wrote: convert it once with transformers' save_pretrained",
    b"\x1f\x8b": "is compressed (gzip): unpack it",
}
"""How files of other formats begin."""

LONGEST_NAME = 120
MAX_HEADER = 100_000_000  # the format's own limit, in bytes
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Of a number of each type, as the format spells it."""


class Damaged(Exception):
    """A file is not what it should be; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header: dtype as the format spells it, shape in numbers."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose length agrees with its header. Raises Damaged, or OSError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(POINTER))
        if start == POINTER:
            raise Damaged(pointer(file.name))
        if other := next((said for magic, said in OTHERS.items() if start.startswith(magic)), None):
            raise Damaged(f"{file.name} {other}")
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        text = stream.read(length) if length <= MAX_HEADER else b""
    if size < 8 or (len(text) < length <= MAX_HEADER):
        raise Damaged(cut_short(file.name, f"{size} bytes, which end inside its header"))
    try:
        entries = json.loads(text)
        places, tensors = _parsed(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file.name} is no safetensors file, or is damaged: download it again") from error
    end = 8 + length + (places[-1][1] if places else 0)
    if size < end:
        raise Damaged(cut_short(file.name, f"{size} of {end} bytes"))
    if size > end:
        raise Damaged(f"{file.name} has {size} bytes, and its header says {end}: download it again")
    return tensors


def pointer(name: str) -> str:
    """The refusal of a file that stands for one that was not fetched (Git LFS)."""
    return f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull` in that folder"


def cut_short(name: str, reason: str) -> str:
    """The refusal of a file that ends too early."""
    return f"{name} is cut short ({reason}): the download is incomplete; run it again"


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, long ones cut, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names[:shown]) + more


def _parsed(entries: dict[str, Any]) -> tuple[list[tuple[int, int]], dict[str, StoredTensor]]:
    """Where tensors lie, in order, and what they are. Raises ValueError and the like."""
    told = entries.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in told.values()):
        raise ValueError("metadata that is no text")
    tensors = {name: StoredTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    places = sorted(_place(entry, tensors[name]) for name, entry in entries.items())
    if any(before[1] != after[0] for before, after in pairwise([(0, 0), *places])):
        raise ValueError("tensors that lie over each other, or apart")
    return places, tensors


def _place(entry: dict[str, Any], tensor: StoredTensor) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    numbers = (begin, end, *tensor.shape)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a size that is no number")
    if (end - begin) * 8 != math.prod(tensor.shape) * BITS[tensor.dtype]:
        raise ValueError("a place of another size than its shape")
    return begin, end
