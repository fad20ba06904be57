"""A checkpoint that loads in a moment: a random Llama of two layers, and a tokenizer with one token for each byte.

For tests of whole processes: 49,000 words are most of a tiny server's start, and nothing in them is about words.
"""

from __future__ import annotations

from pathlib import Path

import torch

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ("<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")


def byte_level(
    folder: Path,
    *,
    chat_template: str | None = CHATML,
    special: tuple[str, ...] = SPECIAL,
    max_position_embeddings: int = 256,
) -> Path:
    """Written into this folder, which is made."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<|endoftext|>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", extra_special_tokens=list(special)
    )
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
