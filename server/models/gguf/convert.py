"""A GGUF file as an ordinary checkpoint: bf16 safetensors with config and tokenizer beside them.

transformers supplies the config, the tokenizer, the names and what each architecture's tensors need; it is told to read
our header instead of parsing the file again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFValueType, ReaderField
from prerope.server.errors import ConfigurationError, first_line
from prerope.server.models.config.values import wrong_in
from prerope.server.models.gguf.header import SCALARS, Header, read_header
from prerope.server.models.gguf.rope import set_rope
from prerope.server.models.gguf.splitting import set_splitting
from prerope.server.models.gguf.stated import check_heard, check_stated
from prerope.server.models.gguf.tensors import ROPE_TENSORS, Weights, dequantised, write_by_transformers

STATED = {
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "sliding_window": "attention.sliding_window",
}
"""What a file states and transformers leaves at its class's default, in part of the families: attribute → key."""

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Under `tokenizer.ggml.`: end of text, of a turn, of a message."""


def convert(file: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Fill `folder`, going on from what a killed conversion of the same file left there."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    header = read_header(file)
    try:
        check_stated(header)
        with _parsed(header):
            config, tokenizer = _config(header), _tokenizer(header, report)
        check_heard(header, config)
        if wrong := wrong_in(config.to_dict()):
            raise ConfigurationError(f"{file.name} cannot be served: it says, in a config's words, that {wrong}")
        folder.mkdir(parents=True, exist_ok=True)
        if is_gguf_arch_supported(header.architecture):
            write_by_transformers(header, config, folder)
        else:
            Weights(header, config, folder, report).write()
        config.save_pretrained(folder)
        _generation_config(header, config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (ConfigurationError, OSError):
        raise
    except Exception as error:  # readers of a format that grows raise whatever they meet
        raise ConfigurationError(
            f"transformers cannot read {file.name}: {_why(error)}. The file is damaged, or of a model that this "
            "version does not know: download it again, or take the model in safetensors"
        ) from error


def _why(error: Exception) -> str:
    if of_a_field := re.search(r"Validation error for field '(\w+)'", str(error)):
        return f"its {of_a_field[1]} is of another kind than a model of this architecture has, such as one a layer"
    return first_line(error)


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
        tensors = {name: dequantised(tensor) for name in ROPE_TENSORS if (tensor := header.tensor(name))}
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


def _tokenizer(header: Header, report: Callable[[str], None]) -> Any:
    """transformers' tokenizer of the file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        header.file.parent, gguf_file=header.file.name, local_files_only=True, trust_remote_code=False
    )
    set_splitting(tokenizer, header, report)
    return tokenizer


@contextmanager
def _parsed(header: Header) -> Iterator[None]:
    """Inside, transformers gets the header that is known already for the gguf package's reader, vocabulary left out.

    It looks the class up in that package at each call. Nothing else in a server that starts reads GGUF files.
    """
    reader, original = _Parsed(header), gguf.GGUFReader
    setattr(gguf, "GGUFReader", lambda *_: reader)  # noqa: B010 - an assignment would be one to a type
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", original)  # noqa: B010


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
