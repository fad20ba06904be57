"""How a GGUF file's tokenizer cuts text before it looks for tokens: by the name that `tokenizer.ggml.pre` has for it.

transformers knows part of the names, and takes GPT-2's way for all others; cut in another way than in training, digits,
lines and signs get other tokens. What is not known here is told in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prerope.server.models.gguf.header import Header
from tokenizers import Regex, pre_tokenizers

DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Every digit is split off before GPT-2's way."""

AS_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"})
ALIKE = {"chatglm-bpe": "llama-bpe", "stablelm2": "qwen2", "hunyuan": "qwen2", "solar-open": "qwen2", "grok-2": "qwen2"}
"""Names that transformers does not know, of ways that it does."""


def set_splitting(tokenizer: Any, header: Header, report: Callable[[str], None]) -> None:
    """tokenizer: transformers' own, as read from the file. report: gets a line where the way is not known."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as KNOWN

    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return  # the others cut nothing before
    name = str(header.values.get("tokenizer.ggml.pre"))
    if name in DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name in ALIKE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(KNOWN[ALIKE[name]]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif name not in KNOWN and name not in AS_GPT2:
        said = "nothing" if name in ("None", "default") else f"'{name[:32]}', which is not known here"
        report(
            f"warning: of how text is cut before it becomes tokens, {header.file.name} says {said} "
            "(tokenizer.ggml.pre). It is cut as for GPT-2: where the model learned otherwise, digits, lines and signs "
            "become other tokens than in training; take the model's checkpoint in safetensors, or a newer file"
        )
