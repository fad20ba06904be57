"""What a GGUF file states of its model: what must be there, and what changes its maths and reaches no config.

transformers takes the default of a model's class for what it does not find, and leaves unread what it does not know; a
check against its own forward sees neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from prerope.server.errors import ConfigurationError
from prerope.server.models.gguf.header import Header

NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
OF_TOKENIZERS = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores"), "t5": ("tokens", "scores")}
IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")

MATHS = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale"),
)
OF_MATHS = re.compile("scal|mult|cap|clip|clamp|window|alibi|query_pre_attn|head_dim")
"""In names that configs have for these."""

NONE = (0, 1)
"""Of these, what changes nothing."""

OTHER_KINDS = {
    "adapter": "an adapter: merge it into its base once (llama.cpp's export-lora)",
    "mmproj": "the part of a model that sees or hears: give the file of its text model",
    "imatrix": "a table of importances, by which others are quantised: give the model's file",
    "vocab": "a vocabulary without weights: give the model's file",
}
"""By `general.type`."""


def check_stated(header: Header) -> None:
    """Raises ConfigurationError for a file of another kind, without what it must state, or with ids of no token."""
    values = header.values
    if other := OTHER_KINDS.get(str(values.get("general.type"))):
        raise _refused(header, f"it is {other}")
    absent = [f"{header.architecture}.{key}" for key in NEEDED if header.own(key) is None]
    absent += [f"{header.architecture}.{EPSILONS[0]}"] * all(header.own(key) is None for key in EPSILONS)
    kind = values.get("tokenizer.ggml.model")
    for key in ("model", *OF_TOKENIZERS.get(str(kind), ())):
        absent += [f"tokenizer.ggml.{key}"] * (values.get(f"tokenizer.ggml.{key}") is None)
    if absent:
        raise _refused(header, f"it does not state {', '.join(absent)}: it is damaged or incomplete; download it again")
    tokens = values.get("tokenizer.ggml.tokens", ())
    count = tokens if isinstance(tokens, int) else len(tokens)
    for key in IDS:
        token_id = values.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int) and not 0 <= token_id < count:
            raise _refused(header, f"its {key} is {token_id}, and it has {count} tokens: download it again")


def check_heard(header: Header, config: Any) -> None:
    """Raises ConfigurationError for what changes the maths and is in none of the config's values."""
    if header.own("attention.causal") is False:
        raise _refused(header, "its tokens read what follows them, too (attention.causal is false)")
    known = list(_numbers(config.to_dict()))
    for key in MATHS:
        value = header.own(key)
        if not isinstance(value, int | float) or value in NONE:
            continue
        if key == "attention.sliding_window" and value >= header.own("context_length"):
            continue
        same = [number for one in known for number in (one, *[one**-0.5] * (key == "attention.scale"))]
        if not any(math.isclose(value, number, rel_tol=1e-5) for number in same):
            raise _refused(
                header,
                f"it states {key} {value:.6g}, which transformers leaves unread in a model of this kind: take the "
                "model's checkpoint in safetensors",
            )


def _numbers(values: Mapping[str, Any]) -> Iterator[float]:
    """Those above 0 of a config, however deep, under names that may be of such."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif type(value) in (int, float) and value > 0 and OF_MATHS.search(name):
            yield float(value)


def _refused(header: Header, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{header.file.name} cannot be served: {reason}")
