"""Long English documents: consecutive pieces of a text, by default the prose that every Python carries.

The default text is the language reference behind `help()`, whose paragraphs are taken once each (topics repeat one
another, and a repeated paragraph would be read by copying), then the docstrings of the standard library's modules in
alphabetical order. The same Python version gives the same documents.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REFERENCE = "the language reference (pydoc_data.topics)"
DOCSTRINGS = "docstrings of the standard library"

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Document:
    """`name` says where the text is from, for the report: never a path."""

    name: str
    token_ids: tuple[int, ...]


class TextTooShort(ValueError):
    """The text does not have that many tokens."""


def default_texts() -> Iterator[tuple[str, str]]:
    """`(name, text)`, made one at a time: the second is only needed for many or long documents."""
    yield REFERENCE, reference_text()
    yield DOCSTRINGS, docstring_text(Path(sysconfig.get_path("stdlib")))


def reference_text() -> str:
    """All topics in alphabetical order, each paragraph once."""
    from pydoc_data.topics import topics

    paragraphs = (paragraph.strip("\n") for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    first_of = {" ".join(paragraph.split()): paragraph for paragraph in reversed(list(paragraphs))}
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
