"""Files and folders that are named on the command line, as documents."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from prerope.server.cli.client import CallFailed, Document

SKIPPED = ("node_modules", "__pycache__")
MAX_DOCUMENTS = 1024
BINARY_WITHIN = 8192
"""Bytes at a file's beginning of which none is zero where it is text."""


def documents_of(paths: Iterable[Path]) -> list[Document]:
    """Each file, and each text in each folder, hidden ones left out; `-` is standard input. Raises CallFailed."""
    documents = [document for path in paths for document in _read(path)]
    if len(documents) > MAX_DOCUMENTS:
        raise CallFailed(f"{len(documents)} files were named: at most {MAX_DOCUMENTS} are taken; name fewer")
    return documents


def _read(path: Path) -> Iterator[Document]:
    if str(path) == "-":
        yield Document("standard input", sys.stdin.read())
    elif path.is_dir():
        for file in sorted(_inside(path)):
            text = _text(file)
            if text:
                yield Document(str(file.relative_to(path)), text)
    else:
        text = _text(path)
        if not text:
            raise CallFailed(f"{path} holds {'nothing' if text == '' else 'no text'}: leave it out")
        yield Document(path.name, text)


def _inside(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED]
        yield from (Path(place) / name for name in files if not name.startswith("."))


def _text(file: Path) -> str | None:
    """A file's text; None where it is none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CallFailed(f"{file} cannot be read: {error.strerror or error}") from error
    return None if b"\0" in data[:BINARY_WITHIN] else data.decode(errors="replace")
