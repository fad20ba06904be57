"""The text that small models are trained and tested on: the standard library's own sources and its language reference.

Whole files are held out, and no paragraph of the reference is in both parts. Tokens are those of a byte-level BPE
trained on the training part alone. The same Python version gives the same text.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from bench import BenchError
from bench.shared.text import TextTooShort, reference_text

END = "<|end|>"  # between two documents of the training text
HELD_OUT_EVERY = 10
REFERENCE_PIECES = 40
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
"""Folders that are no sources of the library, or tables of numbers. The reference comes from `pydoc_data` as text."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids: the training part as one stream [T] int64, and the held-out documents by name."""

    train: Tensor
    held_out: dict[str, Tensor]
    vocabulary: int


def library_documents(folder: Path) -> list[tuple[str, str]]:
    """`(name, text)` of every source file under the standard library's folder, and of the reference in pieces."""
    found: list[tuple[str, str]] = []
    for path in sorted(folder.rglob("*.py")):
        within = path.relative_to(folder)
        if not LEFT_OUT.intersection(within.parts) and not within.parts[0].startswith("config-"):
            found.append((within.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    paragraphs = reference_text().split("\n\n")
    size = -(-len(paragraphs) // REFERENCE_PIECES)
    for start in range(0, len(paragraphs), size):
        name = f"language reference, paragraphs {start} to {min(start + size, len(paragraphs)) - 1}"
        found.append((name, "\n\n".join(paragraphs[start : start + size])))
    return found


def split(documents: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held out): every tenth document is held out."""
    held_out = list(documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    names = {name for name, _ in held_out}
    return [document for document in documents if document[0] not in names], held_out


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens, `END` among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(folder: Path, vocabulary: int, documents: Sequence[tuple[str, str]] | None = None) -> Text:
    """Read, tokenise and keep the text in `folder`, or load what is kept there.

    documents: instead of the standard library's.
    Raises BenchError where `folder` holds another text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"python": platform.python_version(), "vocabulary": vocabulary}
    with FileLock(folder / "text.lock"):
        if not (folder / "text.json").exists():
            _write(folder, about, documents or library_documents(Path(sysconfig.get_path("stdlib"))))
        kept = json.loads((folder / "text.json").read_text())
        if kept["about"] != about:
            raise BenchError(f"{folder.name} holds the text of {kept['about']}, not of {about}: choose another --out")
        tokens = load_file(folder / "text.safetensors")
    pieces = torch.split(tokens["held_out"].long(), kept["held_out_lengths"])
    return Text(tokens["train"].long(), dict(zip(kept["held_out"], pieces, strict=True)), vocabulary)


def _write(folder: Path, about: dict[str, object], documents: Sequence[tuple[str, str]]) -> None:
    training, held_out = split(documents)
    tokenizer = train_tokenizer([text for _, text in training], int(str(about["vocabulary"])))
    stream = [token for _, text in training for token in (*tokenizer.encode(text).ids, tokenizer.token_to_id(END))]
    pieces = [tokenizer.encode(text).ids for _, text in held_out]
    tokens = {
        "train": torch.tensor(stream, dtype=torch.int32),
        "held_out": torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32),
    }
    save_file(tokens, folder / "text.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = [name for name, _ in held_out]
    kept = {"about": about, "held_out": names, "held_out_lengths": [len(piece) for piece in pieces]}
    write_whole(folder / "text.json", json.dumps(kept, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Either the old file or all of the new one, whenever the process ends."""
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)


def held_out_rows(text: Text, num_rows: int, length: int, train_length: int) -> dict[str, Tensor]:
    """`{"repeated", "plain"}`, each [num_rows, length + 1]: inputs and, one later, what is to be predicted.

    Plain: `length + 1` tokens of one held-out document, spread over the documents. Repeated: the first `train_length`
    of them again and again.
    Raises TextTooShort.
    """
    room = {name: (len(tokens) - 1) // length for name, tokens in text.held_out.items()}
    rows: list[Tensor] = []
    for part in range(max(room.values(), default=0)):
        start = part * length
        rows += [text.held_out[name][start : start + length + 1] for name, parts in room.items() if part < parts]
        if len(rows) >= num_rows:
            break
    if len(rows) < num_rows:
        raise TextTooShort(
            f"{num_rows} test rows of {length + 1:,} tokens are wanted, and the held-out files have {len(rows)}"
        )
    plain = torch.stack([rows[i * len(rows) // num_rows] for i in range(num_rows)])
    again = plain[:, :train_length].repeat(1, length // train_length + 1)[:, : length + 1]
    return {"repeated": again, "plain": plain}


def baselines(text: Text, rows: Tensor) -> dict[str, float]:
    """Accuracy of counting: the most frequent token, and the most frequent successor of the token before."""
    vocabulary = text.vocabulary
    pairs = torch.bincount(text.train[:-1] * vocabulary + text.train[1:], minlength=vocabulary**2)
    successor = pairs.view(vocabulary, vocabulary).argmax(1)
    most_frequent = text.train.bincount(minlength=vocabulary).argmax()
    before, target = rows[:, :-1], rows[:, 1:]
    return {
        "unigram": float((target == most_frequent).double().mean()),
        "bigram": float((target == successor[before]).double().mean()),
    }
