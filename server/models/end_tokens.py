"""Which tokens end a reply: the one home of that question.

Checkpoints spread the answer over their generation config, config and tokenizer, and fine-tunes often correct one of
them alone: a chat model whose config still names the base model's end of text would never stop. So it is the union of
all that name one, and of the special tokens by which families end a turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint

END_OF_TURN = frozenset(
    {
        "<|im_end|>",  # ChatML: Qwen, SmolLM, Hermes, Yi, InternLM
        "<|eot_id|>",  # Llama 3
        "<|eom_id|>",  # Llama 3, before a tool's answer
        "<|eot|>",  # Llama 4
        "<|eom|>",
        "<end_of_turn>",  # Gemma 1 to 3
        "<turn|>",  # Gemma 4
        "<|end|>",  # Phi
        "<|end_of_turn|>",  # OpenChat
        "<|return|>",  # gpt-oss
        "<|call|>",
        "<|endofturn|>",  # HyperCLOVA
        "<|END_OF_TURN_TOKEN|>",  # Command R
        "<|end_of_text|>",  # Llama 3, Granite
        "<|endoftext|>",  # GPT-2 and its heirs, Qwen, Phi
        "<｜end▁of▁sentence｜>",  # DeepSeek
        "<end_of_utterance>",  # SmolVLM, Idefics
        "[EOT]",
        "<EOT>",
    }
)
"""Special tokens after which no model goes on. GPT-OSS's `<|end|>` is another matter: see `_turn_ends`."""


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> dict[int, str]:
    """Token id → who names it. tokenizer: transformers' own."""
    from transformers import GenerationConfig

    ends: dict[int, str] = {}
    config = checkpoint.config()
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.source, revision=checkpoint.revision)
    except Exception:  # many checkpoints have none, and one with strange values is no reason not to serve
        generation = None
    for named, source in (
        (getattr(generation, "eos_token_id", None), "generation config"),
        (getattr(config, "eos_token_id", None), "config"),
        (getattr(config.get_text_config(), "eos_token_id", None), "config"),
        (tokenizer.eos_token_id, "tokenizer"),
        (_turn_ends(tokenizer), "chat format"),
    ):
        for token_id in _ids(named):
            ends.setdefault(token_id, source)
    return ends


def describe(ends: dict[int, str], tokenizer: Any) -> str:
    """For the log: each token as it is written, its id, and who names it. tokenizer: transformers' own."""
    pieces = {token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in ends}
    written = [f"{piece} ({token_id}, {ends[token_id]})" for token_id, piece in pieces.items() if piece is not None]
    unknown = [f"{token_id} ({ends[token_id]})" for token_id, piece in pieces.items() if piece is None]
    told = "replies end at " + (", ".join(written) if written else "no token: only max_tokens and stop end them")
    return told + (f"; warning: its tokenizer has no token {', '.join(unknown)}" if unknown else "")


def _turn_ends(tokenizer: Any) -> list[int]:
    """The special tokens of this vocabulary by which a family ends a turn."""
    added = {str(token.content): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    ends = END_OF_TURN
    if "<|return|>" in added:
        ends = ends - {"<|end|>"}  # there it ends the reasoning, and the answer follows
    return sorted(token_id for text, token_id in added.items() if text in ends)


def _ids(named: object) -> Iterable[int]:
    values = named if isinstance(named, list | tuple) else [named]
    return [value for value in values if type(value) is int and 0 <= value < 2**31]
