"""What GGUF files hold: metadata and where each tensor lies, of one file or of all parts of a split one.

Read in one pass over the header, in a second or two for a large vocabulary (the gguf package takes ten times that, and
transformers has it read the file four times). Knows the format alone. Raises ConfigurationError with the remedy for
what is no GGUF file, is cut short, or lacks parts.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from prerope.server.errors import ConfigurationError
from prerope.server.models.gguf.parts import MAGIC, parts_of
from prerope.server.models.json_files import unreadable
from prerope.server.models.stored import POINTER, cut_short

VERSIONS = (2, 3)
MAX_EXPERTS = 65_536
MAX_ARRAY = 4096
"""Longer arrays (vocabularies) are left as their length."""

SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: shape in torch's order, bytes from the start of its file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A model's metadata, each value with its type, and its tensors. Arrays past `MAX_ARRAY` are left as a length."""

    file: Path
    values: dict[str, Any]
    types: dict[str, list[GGUFValueType]]
    tensors: tuple[StoredTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    def own(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's name: `rope.freq_base` of `llama.rope.freq_base`."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def tensor(self, name: str) -> StoredTensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(file: Path) -> Header:
    """The header of a file, or of all parts of a split one as if they were one file."""
    first, *others = [_read_file(part) for part in parts_of(file)]
    count = first.values.get("split.count", 1)
    if not others and isinstance(count, int) and count > 1:
        raise ConfigurationError(
            f"{file.name} is one of {count} parts of a split model, under another name: name them all as they were, "
            f"NAME-00001-of-{count:05}.gguf, or join them with llama.cpp's gguf-split --merge"
        )
    if not isinstance(first.values.get("general.architecture"), str):
        raise ConfigurationError(f"{file.name} names no general.architecture, so it is no language model's GGUF file")
    tensors = tuple(tensor for header in (first, *others) for tensor in header.tensors)
    promised = first.values.get("split.tensors.count")
    if others and promised is not None and promised != len(tensors):
        raise ConfigurationError(
            f"{file.name}: its parts hold {len(tensors)} of {promised} tensors: download them again"
        )
    header = Header(first.file, first.values, first.types, tensors)
    _check_counts(header)
    return header


def _check_counts(header: Header) -> None:
    """What a model is made by, before one is made."""
    for key, most, of in (
        ("block_count", len(header.tensors), f"the {len(header.tensors)} tensors that the file holds"),
        ("expert_count", MAX_EXPERTS, f"{MAX_EXPERTS}"),
    ):
        count = header.own(key, 0)
        if not isinstance(count, int) or not 0 <= count <= most:
            raise ConfigurationError(
                f"{header.file.name} cannot be served: its {key} is {count!r}, and not a number up to {of}: the file "
                "is damaged; download it again"
            )


def _read_file(file: Path) -> Header:
    try:
        return _read(file)
    except OSError as error:
        raise ConfigurationError(f"MODEL_ID={file} cannot be served: {unreadable(file.name, error)}.") from error


def _read(file: Path) -> Header:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(POINTER))
        if start == POINTER:
            raise ConfigurationError(f"{file.name} is a git-lfs pointer, not the file itself: run `git lfs pull` there")
        if not start.startswith(MAGIC):
            other = ", but looks like safetensors: it belongs into a folder as model.safetensors, with its config.json"
            said = other if start[8:9] == b"{" else ": download it again"
            raise ConfigurationError(f"{file.name} is no GGUF file ({size} bytes){said}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(file, data)
            except (struct.error, IndexError, OverflowError) as error:
                said = cut_short(file.name, f"{size} bytes, which end inside its header")
                raise ConfigurationError(said) from error
            except (ValueError, KeyError, TypeError, ArithmeticError) as error:
                raise ConfigurationError(
                    f"transformers cannot read {file.name}: its header is damaged: {error}; download it again"
                ) from error
    end = max((tensor.offset + tensor.num_bytes for tensor in header.tensors), default=0)
    if end > size:
        raise ConfigurationError(cut_short(file.name, f"{size} of {end} bytes"))
    return header


def _parse(file: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data, 4)
    version, num_tensors, num_values = cursor.take("<IQQ")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, and versions 2 and 3 are known")
    values: dict[str, Any] = {}
    types: dict[str, list[GGUFValueType]] = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in types:
            raise ValueError(f"{key[:80]!r} is said twice")
        types[key] = [GGUFValueType(cursor.take("<I")[0])]
        values[key] = cursor.array(types[key]) if types[key] == [GGUFValueType.ARRAY] else cursor.value(types[key][0])
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}, and it is a number of bytes")
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_placed(file, start, *entry) for entry in entries)
    _check_apart(tensors)
    return Header(file, values, types, tensors)


def _check_apart(tensors: Sequence[StoredTensor]) -> None:
    """Each name once, and each byte in one tensor."""
    names = Counter(tensor.name for tensor in tensors)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"it holds two tensors named {twice[0][:80]!r}")
    placed = sorted(tensors, key=lambda one: (one.offset, one.num_bytes))
    for before, after in itertools.pairwise(placed):
        if after.offset < before.offset + before.num_bytes:
            raise ValueError(f"the tensors {before.name[:80]!r} and {after.name[:80]!r} lie over each other")


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    (num_dims,) = cursor.take("<I")
    if num_dims > 8:
        raise ValueError(f"tensor {name[:80]!r} has {num_dims} dimensions")
    shape = cursor.take(f"<{num_dims}Q")
    kind, offset = cursor.take("<IQ")
    return name, tuple(reversed(shape)), kind, offset


def _placed(file: Path, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    quantization = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(name, shape, quantization, file, start + offset, count // block * block_bytes)


class _Cursor:
    """A place in the header."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def text(self) -> str:
        (length,) = self.take("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise IndexError
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def value(self, kind: GGUFValueType) -> Any:
        return self.text() if kind is GGUFValueType.STRING else self.take(SCALARS[kind])[0]

    def array(self, types: list[GGUFValueType]) -> Any:
        """The values, or their number where there are many; its members' type is added to `types`."""
        kind, count = GGUFValueType(self.take("<I")[0]), self.take("<Q")[0]
        types.append(kind)
        if kind is GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        if count > MAX_ARRAY:
            self._skip(kind, count)
            return count
        return list(self._values(kind, count))

    def _values(self, kind: GGUFValueType, count: int) -> Iterator[Any]:
        for _ in range(count):
            yield self.value(kind)

    def _skip(self, kind: GGUFValueType, count: int) -> None:
        if kind is not GGUFValueType.STRING:
            self.position += struct.calcsize(SCALARS[kind]) * count
            return
        position, data, size = self.position, self.data, len(self.data)
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, position)
            position += 8 + length
            if position > size:
                raise IndexError
        self.position = position
