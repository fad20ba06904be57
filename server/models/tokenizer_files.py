"""A tokenizer's files in a model's folder: what keeps them from being read, chat templates beside them, its memory."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prerope.server.errors import words_of

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint

MAX_WORDS = 1024
"""Words whose tokens a thread of the library remembers, once it has met them. With one of 255 letters goes a record of
each: 8.4 MiB together, 13 MiB under Unigram. The library's own 10,000 are 83 MiB, and 122."""


def beyond_the_model(hf: Any, checkpoint: Checkpoint) -> str | None:
    """Why these tokens are another model's: some that stand for text have no row in this one's embedding.

    Tokens that were added to a vocabulary may lie beyond it, as they do beside many a model that was never taught them.
    """
    rows = getattr(checkpoint.config().get_text_config(), "vocab_size", None)
    highest = max(hf.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if not isinstance(rows, int) or highest < rows:
        return None
    return (
        f"its tokenizer has a token of number {highest}, and the model has {rows} (vocab_size in config.json): "
        "tokenizer.json is another model's; take both from one source"
    )


def limit_words(hf: Any) -> None:
    """Words that clients make up are never given up: `_clear_cache` makes room for others and frees nothing. A copy in
    another process has the library's own limit, and ends with its task."""
    model = hf.backend_tokenizer.model
    if hasattr(model, "_resize_cache"):  # WordPiece and WordLevel remember none
        model._resize_cache(MAX_WORDS)


def why_unread(error: Exception, checkpoint: Checkpoint) -> str:
    """Why a tokenizer's files cannot be read, as a sentence with the remedy."""
    if "contains custom code" in str(error):
        return (
            "its code comes with its files (auto_map in tokenizer_config.json), and such code is not run here. Take a "
            "version of the model with a tokenizer.json"
        )
    folder = Path(checkpoint.source)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        of_pieces = any(True for _ in folder.glob("*.model")) and find_spec("sentencepiece") is None
        needs = ", for which transformers needs more (pip install sentencepiece)" if of_pieces else ""
        return (
            f"there is no tokenizer.json, and none can be made of the files that are there{needs}. Copy the "
            "tokenizer.json of this model into the folder"
        )
    said = words_of(error) or "a value in its files is of another kind than it should be"
    return f"{said}. Download tokenizer.json and tokenizer_config.json again"


def processor_template(folder: Path) -> str | None:
    """The chat template of a multimodal folder whose processor has it and whose tokenizer has none."""
    try:
        template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None
