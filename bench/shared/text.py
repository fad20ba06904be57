"""Long English text that every Python carries, cut into documents and prompts.

The default text of documents is the language reference behind `help()`, whose paragraphs are taken once each (topics
repeat one another, and a repeated paragraph would be read by copying), then the docstrings of the standard library's
modules in alphabetical order. The same Python version gives the same documents.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import BenchError

REFERENCE = "the language reference (pydoc_data.topics)"
DOCSTRINGS = "docstrings of the standard library"

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Document:
    """`name` says where the text is from, for the report: never a path."""

    name: str
    token_ids: tuple[int, ...]


class TextTooShort(BenchError):
    """The text does not have that many tokens."""


def default_texts() -> Iterator[tuple[str, str]]:
    """`(name, text)`, made one at a time: the second is only needed for many or long documents."""
    yield REFERENCE, reference_text()
    yield DOCSTRINGS, docstring_text(Path(sysconfig.get_path("stdlib")))


def paragraphs() -> list[str]:
    """Of all topics in alphabetical order."""
    from pydoc_data.topics import topics

    return [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]


def reference_text() -> str:
    """Each paragraph once, where it comes last."""
    first_of = {" ".join(paragraph.split()): paragraph.strip("\n") for paragraph in reversed(paragraphs())}
    return "\n\n".join(reversed([paragraph for key, paragraph in first_of.items() if key]))


def docstring_text(folder: Path, shortest: int = 200) -> str:
    """Docstrings of at least `shortest` characters, of a folder's modules with their classes and functions."""
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) >= shortest:
                    found.setdefault(docstring)
    return "\n\n".join(found)


def file_text(path: Path) -> tuple[str, str]:
    return path.name, path.read_text(encoding="utf-8", errors="replace")


def cut_documents(
    texts: Iterator[tuple[str, str]], encode: Encode, num_documents: int, num_tokens: int
) -> list[Document]:
    """The first `num_documents` pieces of `num_tokens` tokens each; a piece lies within one text.

    Raises:
        TextTooShort: the texts hold fewer.
    """
    documents: list[Document] = []
    available = []
    for name, text in texts:
        token_ids = encode(text)
        available.append(f"{name} has {len(token_ids):,}")
        for start in range(0, len(token_ids) - num_tokens + 1, num_tokens):
            piece = tuple(token_ids[start : start + num_tokens])
            documents.append(Document(f"{name}, tokens {start:,} to {start + num_tokens - 1:,}", piece))
            if len(documents) == num_documents:
                return documents
    raise TextTooShort(
        f"{num_documents} documents of {num_tokens:,} tokens are wanted and there are {len(documents)}: "
        f"{', '.join(available)} tokens; give a longer --text, fewer --documents or shorter --lengths"
    )


def context(document: Document, num_tokens: int, beginning: Sequence[int] = ()) -> list[int]:
    """The document's first tokens, `num_tokens` with the model's own `beginning` (a start token, or nothing)."""
    return [*beginning, *document.token_ids[: num_tokens - len(beginning)]]


def ending_at(token_ids: Sequence[int], stop: int, num_tokens: int, beginning: Sequence[int] = ()) -> list[int]:
    """The `num_tokens` tokens of a context that end at `stop`, the first of them replaced by the `beginning`."""
    return [*beginning, *token_ids[stop - num_tokens + len(beginning) : stop]]


def reference_words() -> list[str]:
    """Words of the reference, in a fixed order; tables and code listings are left out, they are not prose."""
    return [word for paragraph in filter(is_prose, paragraphs()) for word in paragraph.split()]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: long enough, mostly letters and spaces, no table rule."""
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    drawn = "+--" in paragraph or "===" in paragraph
    return len(paragraph) >= 80 and letters >= 0.9 * len(paragraph) and not drawn


class Library:
    """The reference text as words and as the served model's token ids, to be cut into prompts."""

    def __init__(self, tokenize: Callable[[str], Sequence[int]], num_words: int = 30_000, piece: int = 2_000) -> None:
        self._words = reference_words()[:num_words]
        starts = range(0, len(self._words), piece)
        self._ids = [i for at in starts for i in tokenize(" ".join(self._words[at : at + piece]))]

    def ids(self, draw: random.Random, num_tokens: int) -> list[int]:
        """`num_tokens` ids; the first four are drawn, so that no two prompts begin alike."""
        start, wanted = draw.randrange(len(self._ids)), num_tokens - 4
        around = [*self._ids[start:], *self._ids * (1 + wanted // len(self._ids))]
        return [*(draw.choice(self._ids) for _ in range(4)), *around[:wanted]]

    def text(self, draw: random.Random, num_tokens: int) -> str:
        """About `num_tokens` tokens of text with a label before it."""
        num_words = max(1, int(num_tokens * len(self._words) / len(self._ids)))
        start = draw.randrange(max(1, len(self._words) - num_words))
        return f"Note {draw.getrandbits(32):x}. " + " ".join(self._words[start : start + num_words])
