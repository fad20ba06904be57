"""A GGUF file as an ordinary checkpoint: bf16 safetensors in parts, with config and tokenizer beside them.

Tensors are dequantised one by one and written in parts of half a GiB, so memory holds one part. A part that is there
is whole: it is written aside and renamed, and a conversion that was killed goes on after its last part. transformers
supplies the config, the names and what each architecture's tensors need; it is told to read our header instead of
parsing the file again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
from gguf import GGUFValueType, ReaderField
from prerope.server.errors import ConfigurationError, first_line
from prerope.server.models.folder import INDEX, WEIGHTS, some
from prerope.server.models.gguf.header import SCALARS, Header, StoredTensor, read_header
from prerope.server.models.gguf.parts import parts_of
from prerope.server.models.gguf.rope import set_rope
from prerope.server.models.weights import incomplete
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

PART_BYTES = 512 * 2**20
REPORT_EVERY_S = 5.0
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` whose tokenizers split every digit off before the byte-level split."""

STATED = {
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
}
"""What a file states and transformers leaves at its class's default, in part of the families: attribute → key."""

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Under `tokenizer.ggml.`: end of text, of a turn, of a message."""


def convert(file: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Fill `folder`, going on from what a killed conversion of the same file left there."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    header = read_header(file)
    try:
        with _parsed(header):
            config, tokenizer = _config(header), _tokenizer(header)
        folder.mkdir(parents=True, exist_ok=True)
        if is_gguf_arch_supported(header.architecture):
            _write_by_transformers(header, config, folder)
        else:
            _Weights(header, config, folder, report).write()
    except (ConfigurationError, OSError):
        raise
    except Exception as error:  # readers of a format that grows raise whatever they meet
        raise ConfigurationError(f"transformers cannot read {file.name}: {first_line(error)}") from error
    config.save_pretrained(folder)
    _generation_config(header, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- config and tokenizer ---------------------------------------------------------------------------------------------


def _config(header: Header) -> Any:
    """transformers' config of the file, with what it leaves out."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        header.file.parent, gguf_file=header.file.name, local_files_only=True, trust_remote_code=False
    )
    config.dtype = torch.bfloat16
    embedding = header.tensor("token_embd.weight")
    if embedding is not None:
        config.vocab_size = embedding.shape[0]
    for name, key in STATED.items():
        value = header.own(key)
        if isinstance(value, int | float) and hasattr(config, name) and not hasattr(config, f"global_{name}"):
            setattr(config, name, value)
    if getattr(config, "rope_parameters", None):
        tensors = {name: _dequantised(tensor) for name in ROPE_TENSORS if (tensor := header.tensor(name))}
        set_rope(config, header, tensors)
    return config


def _generation_config(header: Header, config: Any) -> Any:
    """All ends that the file names: chat models end at one, documents at another."""
    from transformers import GenerationConfig

    generation = GenerationConfig.from_model_config(config)
    named = [header.values.get(f"tokenizer.ggml.{name}") for name in ENDS]
    ends = list(dict.fromkeys(int(token_id) for token_id in named if token_id is not None))
    if ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    return generation


def _tokenizer(header: Header) -> Any:
    """transformers drops `tokenizer.ggml.pre`; without it "\\n\\n1" and the like get other tokens than in training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        header.file.parent, gguf_file=header.file.name, local_files_only=True, trust_remote_code=False
    )
    if header.values.get("tokenizer.ggml.pre") in DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


@contextmanager
def _parsed(header: Header) -> Iterator[None]:
    """Inside, transformers gets the header that is known already for the gguf package's reader, vocabulary left out."""
    reader = _Parsed(header)
    with patch.object(gguf, "GGUFReader", lambda *_: reader):
        yield


class _Parsed:
    """As much of a `GGUFReader` as transformers' reading of a config takes."""

    def __init__(self, header: Header) -> None:
        self.fields = {name: _field(name, header.values[name], types) for name, types in header.types.items()}
        self.fields = {name: field for name, field in self.fields.items() if field is not None}
        self.tensors = header.tensors
        rows = header.tensor("token_embd.weight")
        name = f"{header.architecture}.vocab_size"
        if rows is not None:
            self.fields[name] = _field(name, rows.shape[0], [GGUFValueType.UINT32])

    def get_field(self, name: str) -> ReaderField | None:
        return self.fields.get(name)


def _field(name: str, value: Any, types: list[GGUFValueType]) -> ReaderField | None:
    """None for an array that was left as its length."""
    if types[0] is GGUFValueType.ARRAY and not isinstance(value, list):
        return None
    values = value if isinstance(value, list) else [value]
    parts: list[Any] = [
        np.frombuffer(one.encode(), dtype=np.uint8)
        if types[-1] is GGUFValueType.STRING
        else np.array([one], dtype=np.dtype(SCALARS[types[-1]]))
        for one in values
    ]
    return ReaderField(0, name, parts, list(range(len(parts))), types)


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_by_transformers(header: Header, config: Any, folder: Path) -> None:
    """For the families whose weights transformers reads by another way than names, all at once."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if len(parts_of(header.file)) > 1:
        raise ConfigurationError(
            f"{header.file.name}: split files of {header.architecture} models are not read in parts; join them once "
            "with llama.cpp's gguf-split --merge"
        )
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


class _Weights:
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
        self.expected = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())
        self.header, self.folder, self.report = header, folder, report
        self.written: dict[str, str] = {}
        self.began, self.told = time.monotonic(), time.monotonic()

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
            self._add(tensor, tensors)
            done += _bytes([tensor])
            self._tell(done, total, done - resumed)
        aside = part.with_suffix(".aside")
        save_file(
            {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, aside, {"format": "pt"}
        )
        os.replace(aside, part)

    def _add(self, tensor: StoredTensor, tensors: dict[str, Tensor]) -> None:
        """What the family's processor makes of a tensor; some put it into `tensors` themselves."""
        result = self.processor.process(
            weights=_dequantised(tensor),
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": tensors},
        )
        if result.name in self.names:
            tensors[self.names[result.name]] = torch.from_numpy(np.array(result.weights)).to(torch.bfloat16)

    def _tell(self, done: int, total: int, new: int) -> None:
        now = time.monotonic()
        if now - self.told < REPORT_EVERY_S:
            return
        self.told = now
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
    """Of tensors in bf16."""
    return sum(2 * int(np.prod(tensor.shape)) for tensor in tensors)


def _names_in(part: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(part, framework="pt") as stored:
        return list(stored.keys())


def _dequantised(tensor: StoredTensor) -> Any:
    """fp32 numbers, in torch's shape."""
    raw = np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.num_bytes,))
    shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
    if tensor.kind == gguf.GGMLQuantizationType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return gguf.quants.dequantize(raw.reshape(shape), tensor.kind).reshape(tensor.shape)
