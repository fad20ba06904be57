"""Tensors of a GGUF file as bf16 safetensors under transformers' names, in parts that a killed conversion goes on from.

Tensors are dequantised one by one and written in parts of a quarter GiB, or of a layer where that is more, so memory
holds one part. A part that is there is whole, after a power cut too: it is written aside, to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.checks.loaded import incomplete
from prerope.server.models.folder import INDEX, WEIGHTS
from prerope.server.models.gguf.faults import AGAIN, OF_MODEL, read_as, refused
from prerope.server.models.gguf.header import Header, StoredTensor
from prerope.server.models.gguf.parts import parts_of
from prerope.server.models.stored import some
from safetensors.torch import save_file
from torch import Tensor

PART_BYTES = 256 * 2**20
REPORT_EVERY_S = 5.0
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Not weights but what `gguf.rope` reads."""


def write_by_transformers(header: Header, config: Any, folder: Path) -> None:
    """For the families whose weights transformers reads by another way than names, all at once."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if len(parts_of(header.file)) > 1:
        raise ConfigurationError(
            f"{header.file.name}: split files of {header.architecture} models are not read in parts; join them once "
            "with llama.cpp's gguf-split --merge"
        )
    with read_as(header, OF_MODEL):
        model, info = AutoModelForCausalLM.from_pretrained(
            header.file.parent,
            gguf_file=header.file.name,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if wrong := incomplete(info):
        raise ConfigurationError(f"{header.file.name} cannot be served: {wrong}")
    model.save_pretrained(folder)
    config.architectures = [type(model).__name__]


class Weights:
    """Tensors of a file, under transformers' names, into parts of a checkpoint."""

    def __init__(self, header: Header, config: Any, folder: Path, report: Callable[[str], None]) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config.architectures = [type(model).__name__]
        self.processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
        self.names: dict[str, str] = get_gguf_hf_weights_map(model, self.processor)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.expected = set(self.shapes) - set(getattr(model, "all_tied_weights_keys", None) or ())
        self.header, self.folder, self.report = header, folder, report
        self.written: dict[str, str] = {}
        self.began, self.reported = time.monotonic(), time.monotonic()

    def write(self) -> None:
        """All parts, then their index. ConfigurationError where the file lacks weights, or has some without a place."""
        groups = self._groups()
        total, done, resumed = sum(_bytes(group) for group in groups), 0, 0
        self._sweep({self._part(number, len(groups)) for number in range(len(groups))})
        for number, group in enumerate(groups):
            part = self.folder / self._part(number, len(groups))
            if part.is_file():
                resumed += _bytes(group)
            else:
                self._write_part(part, group, total, done, resumed)
            self.written |= dict.fromkeys(_names_in(part), part.name)
            done += _bytes(group)
        missing = sorted(self.expected - set(self.written))
        if missing:
            raise ConfigurationError(
                f"{self.header.file.name} lacks {len(missing)} weights of a {self.header.architecture} model: "
                f"{some(missing)}. It is damaged or incomplete, or of a newer kind; download it again"
            )
        if len(groups) == 1:
            return
        index = {"metadata": {"total_size": 2 * total}, "weight_map": dict(sorted(self.written.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _groups(self) -> list[list[StoredTensor]]:
        """Tensors by part; those of one layer are together, since some families merge them."""
        layers: dict[str, list[StoredTensor]] = {}
        for tensor in self.header.tensors:
            if tensor.name not in ROPE_TENSORS:
                self._check_place(tensor.name)
                layers.setdefault(".".join(tensor.name.split(".")[:2]), []).append(tensor)
        groups: list[list[StoredTensor]] = [[]]
        for layer in layers.values():
            if groups[-1] and _bytes(groups[-1]) + _bytes(layer) > PART_BYTES:
                groups.append([])
            groups[-1] += layer
        return groups

    def _check_place(self, name: str) -> None:
        stem = name.removesuffix(".weight")
        if name in self.names or stem in self.names or name == "output.weight":
            return
        raise ConfigurationError(
            f"{self.header.file.name} holds {name}, for which transformers has no place in a "
            f"{self.header.architecture} model, so it would be read wrongly: take the checkpoint in safetensors"
        )

    def _write_part(self, part: Path, group: list[StoredTensor], total: int, done: int, resumed: int) -> None:
        tensors: dict[str, Tensor] = {}
        for tensor in group:
            known = set(tensors)
            with read_as(self.header, self._misfit(tensor)):
                self._add(tensor, tensors)
            for name in tensors.keys() - known:
                if tuple(tensors[name].shape) != self.shapes.get(name, tuple(tensors[name].shape)):
                    raise refused(self.header, f"{self._misfit(tensor, self.shapes[name])}: {AGAIN}")
            done += _bytes([tensor])
            self._tell(done, total, done - resumed)
        aside = part.with_suffix(".aside")
        save_file(
            {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, aside, {"format": "pt"}
        )
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(aside, part)

    def _add(self, tensor: StoredTensor, tensors: dict[str, Tensor]) -> None:
        """What the family's processor makes of a tensor; some put it into `tensors` themselves."""
        result = self.processor.process(
            weights=dequantised(tensor),
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": tensors},
        )
        if result.name in self.names:
            tensors[self.names[result.name]] = torch.from_numpy(np.array(result.weights)).to(torch.bfloat16)

    def _misfit(self, tensor: StoredTensor, wanted: tuple[int, ...] | None = None) -> str:
        made = f", which make it {list(wanted)}" if wanted else ""
        return (
            f"its tensor {tensor.name} is {list(tensor.shape)}, and does not fit what the file states of sizes and "
            f"heads ({self.header.architecture}.*){made}"
        )

    def _tell(self, done: int, total: int, new: int) -> None:
        now = time.monotonic()
        if now - self.reported < REPORT_EVERY_S:
            return
        self.reported = now
        left = (total - done) * (now - self.began) / max(new, 1)
        self.report(f"Converting {self.header.file.name}: {100 * done // total} %, about {left:.0f} s left")

    def _sweep(self, parts: set[str]) -> None:
        """Only whole parts of a killed conversion stay."""
        for path in self.folder.iterdir():
            if path.name not in parts and path.is_file():
                path.unlink()

    @staticmethod
    def _part(number: int, count: int) -> str:
        return WEIGHTS if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _bytes(tensors: list[StoredTensor]) -> int:
    """The bytes that these tensors take in bf16."""
    return sum(2 * int(np.prod(tensor.shape)) for tensor in tensors)


def _names_in(part: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(part, framework="pt") as stored:
        return list(stored.keys())


def dequantised(tensor: StoredTensor) -> Any:
    """fp32 numbers, in torch's shape. Read, not mapped: a page that cannot be read would end the process."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        raw = np.frombuffer(stream.read(tensor.num_bytes), dtype=np.uint8)
    if len(raw) < tensor.num_bytes:
        raise ConfigurationError(
            f"{tensor.file.name} has become shorter while it was read: start again once it is whole"
        )
    shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
    if tensor.kind == gguf.GGMLQuantizationType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return gguf.quants.dequantize(raw.reshape(shape), tensor.kind).reshape(tensor.shape)
