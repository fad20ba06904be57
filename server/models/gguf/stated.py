"""What a GGUF file states of its model: what must be there, and what changes its maths and reaches no config.

transformers takes the default of a model's class for what it does not find, and leaves unread what it does not know; a
check against its own forward sees neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
from prerope.server.models.gguf.faults import refused
from prerope.server.models.gguf.header import Header
from prerope.server.models.gguf.rope import KNOWN

IN_SAFETENSORS = "take the model's checkpoint in safetensors"
NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
OF_TOKENIZERS = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores"), "t5": ("tokens", "scores")}
IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")

KINDS_OF_NUMBERS = frozenset({gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits})
"""Of tensors that are read: the gguf package dequantises these."""

MATHS = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale"),
)
OF_MATHS = {
    "scale": re.compile("scal|mult"),
    "attention.scale": re.compile("scal|mult|query_pre_attn|head_dim"),
    "softcapping": re.compile("cap"),
    "clamp": re.compile("clip|clamp"),
    "window": re.compile("window"),
    "alibi": re.compile("alibi"),
}
"""In names that configs have for these, by what a key contains; the longest that it does."""

NONE = (0, 1)
"""Of these, what changes nothing."""

OTHER_KINDS = {
    "adapter": "an adapter: merge it into its base once (llama.cpp's export-lora)",
    **dict.fromkeys(("mmproj", "clip"), "the part of a model that sees or hears: give the file of its text model"),
    "imatrix": "a table of importances, by which others are quantised: give the model's file",
    "vocab": "a vocabulary without weights: give the model's file",
}
"""By `general.type`, or by the architecture."""

NOT_READ = {
    "gemma4": "its layers have heads of several sizes and read each other's keys, of which transformers takes nothing "
    f"from such a file; {IN_SAFETENSORS}",
    **dict.fromkeys(("t5", "t5encoder"), "it has an encoder, and decoders that stand alone are served"),
}
"""Architectures whose files transformers reads, and not as a model that is served."""


def check_stated(header: Header) -> None:
    """Raises ConfigurationError for a file of another kind, without what it must state, or with ids of no token."""
    values = header.values
    if other := OTHER_KINDS.get(str(values.get("general.type"))) or OTHER_KINDS.get(header.architecture):
        raise refused(header, f"it is {other}")
    _check_architecture(header)
    _check_kinds(header)
    absent = [f"{header.architecture}.{key}" for key in NEEDED if header.own(key) is None]
    absent += [f"{header.architecture}.{EPSILONS[0]}"] * all(header.own(key) is None for key in EPSILONS)
    kind = values.get("tokenizer.ggml.model")
    for key in ("model", *OF_TOKENIZERS.get(str(kind), ())):
        absent += [f"tokenizer.ggml.{key}"] * (values.get(f"tokenizer.ggml.{key}") is None)
    if absent:
        raise refused(header, f"it does not state {', '.join(absent)}: it is damaged or incomplete; download it again")
    tokens = values.get("tokenizer.ggml.tokens", ())
    count = tokens if isinstance(tokens, int) else len(tokens)
    for key in IDS:
        token_id = values.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int) and not 0 <= token_id < count:
            raise refused(header, f"its {key} is {token_id}, and it has {count} tokens: download it again")


def _check_architecture(header: Header) -> None:
    """Check the names of the model's and its tokenizer's architecture."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    own, known = header.architecture, {*GGUF_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    if own in NOT_READ:
        raise refused(header, f"it is of architecture {own!r}: {NOT_READ[own]}")
    if re.sub("[-_]", "", own) not in {re.sub("[-_]", "", name) for name in known}:
        names = ", ".join(sorted(known - set(NOT_READ)))
        reason = f"transformers reads no GGUF files of architecture {own[:40]!r} (but of {names})"
        raise refused(header, f"{reason}; {IN_SAFETENSORS}")
    tokenizer = header.values.get("tokenizer.ggml.model")
    if tokenizer is not None and tokenizer not in GGUF_TOKENIZER_TYPES:
        kinds = ", ".join(sorted(GGUF_TOKENIZER_TYPES))
        reason = f"its tokenizer is of kind {str(tokenizer)[:40]!r}, and transformers makes those of {kinds}"
        raise refused(header, f"{reason}; {IN_SAFETENSORS}")


def _check_kinds(header: Header) -> None:
    """Check the kinds of tensors and of numbers."""
    for tensor in header.tensors:
        if tensor.kind not in KINDS_OF_NUMBERS:
            raise refused(
                header,
                f"its tensor {tensor.name[:80]} is stored as {tensor.kind.name}, and weights are read that are F32, "
                "F16, BF16 or of llama.cpp's quantised kinds: convert the model anew with llama.cpp's "
                f"convert_hf_to_gguf.py, or {IN_SAFETENSORS}",
            )
    ropes = [f"rope.{key}" for key in KNOWN - {"scaling.type"}]
    for key in (*NEEDED, *EPSILONS, *MATHS, *ropes):
        value = header.own(key)
        if isinstance(value, str):
            raise refused(header, f"its {key} is the text '{value[:32]}', and it is a number: download it again")
        if key in NEEDED[1:] and isinstance(value, int) and value < 1:
            raise refused(header, f"its {key} is {value}, and it is a number from 1 up: download it again")


def check_heard(header: Header, config: Any) -> None:
    """Raises ConfigurationError for what changes the maths and is in none of the config's values."""
    if header.own("attention.causal") is False:
        raise refused(header, "its tokens read what follows them, too (attention.causal is false)")
    for key in MATHS:
        value = header.own(key)
        if not isinstance(value, int | float) or value in NONE:
            continue
        if key == "attention.sliding_window" and value >= header.own("context_length"):
            continue
        named = OF_MATHS[max((part for part in OF_MATHS if part in key), key=len)]
        known = list(_numbers(config.to_dict(), named))
        same = [number for one in known for number in (one, *[one**-0.5] * (key == "attention.scale"))]
        if not any(math.isclose(value, number, rel_tol=1e-5) for number in same):
            raise refused(
                header,
                f"it states {key} {value:.6g}, which transformers leaves unread in a model of this kind: "
                f"{IN_SAFETENSORS}",
            )


def _numbers(values: Mapping[str, Any], named: re.Pattern[str]) -> Iterator[float]:
    """Those above 0 of a config, however deep, under names like these."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, named)
        elif type(value) in (int, float) and value > 0 and named.search(name):
            yield float(value)
