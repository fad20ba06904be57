"""A GGUF file as an ordinary checkpoint: bf16 safetensors with config and tokenizer beside them.

transformers supplies the config, the tokenizer, the names and what each architecture's tensors need; it is told to read
our header instead of parsing the file again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFValueType, ReaderField
from prerope.server.models.config.values import wrong_in
from prerope.server.models.gguf.faults import OF_MODEL, OF_TOKENIZER, read_as, refused
from prerope.server.models.gguf.header import SCALARS, Header, read_header
from prerope.server.models.gguf.rope import set_rope
from prerope.server.models.gguf.splitting import set_splitting
from prerope.server.models.gguf.stated import EPSILONS, check_heard, check_stated
from prerope.server.models.gguf.tensors import ROPE_TENSORS, Weights, dequantised, write_by_transformers

STATED = {
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "sliding_window": "attention.sliding_window",
    "max_position_embeddings": "context_length",
}
"""What a file states and transformers leaves at its class's default, in part of the families: attribute → key."""

NORMS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
"""Names that families have for one number, for which a file has two (`EPSILONS`)."""

SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""The sizes of Gemma, by their number of layers, whose scores are scaled by the model's width a head (27B)."""

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Under `tokenizer.ggml.`: end of text, of a turn, of a message."""


def convert(file: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Fill `folder`, going on from what a killed conversion of the same file left there."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    header = read_header(file)
    check_stated(header)
    with _parsed(header):
        with read_as(header, OF_MODEL):
            config = _config(header)
        with read_as(header, OF_TOKENIZER):
            tokenizer = _tokenizer(header, report)
    check_heard(header, config)
    if wrong := wrong_in(config.to_dict()):
        raise refused(header, f"it says, in a config's words, that {wrong}")
    folder.mkdir(parents=True, exist_ok=True)
    with read_as(header, OF_MODEL, writes=True):
        if is_gguf_arch_supported(header.architecture):
            write_by_transformers(header, config, folder)
        else:
            Weights(header, config, folder, report).write()
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
        if isinstance(value, int | float) and hasattr(config, name):
            setattr(config, name, value)
    epsilon = next(value for key in EPSILONS if (value := header.own(key)) is not None)
    for name in NORMS:
        if hasattr(config, name):
            setattr(config, name, epsilon)
    if hasattr(config, "num_attention_heads"):
        set_sizes_of_heads(config, header)
    if getattr(config, "rope_parameters", None):
        tensors = {name: dequantised(tensor) for name in ROPE_TENSORS if (tensor := header.tensor(name))}
        set_rope(config, header, tensors)
    return config


def set_sizes_of_heads(config: Any, header: Header) -> None:
    """What llama.cpp takes for a head where a file does not state it: its size, and Gemma's scale of scores."""
    known, heads, queries = config.to_dict(), config.num_attention_heads, header.tensor("blk.0.attn_q.weight")
    if header.own("attention.key_length") is None and queries is not None and "head_dim" in known:
        of_queries = queries.shape[0] // heads
        turning = header.own("rope.dimension_count")  # which the family's mapping takes for it
        config.head_dim = of_queries if of_queries == turning else header.own("embedding_length") // heads
    if "query_pre_attn_scalar" in known:
        of_width = header.own("block_count") == SCALED_BY_WIDTH.get(header.architecture)
        config.query_pre_attn_scalar = header.own("embedding_length") // heads if of_width else config.head_dim


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
    """The part of a `GGUFReader` that transformers needs to read a config."""

    def __init__(self, header: Header) -> None:
        self.fields = {name: _field(name, header.values[name], types) for name, types in header.types.items()}
        # Scaling is `gguf.rope`'s: transformers fails on it in one family (gpt-oss), and leaves it in the others.
        self.fields = {n: field for n, field in self.fields.items() if field is not None and ".rope.scaling." not in n}
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
