"""What we keep between runs, with the proof that it is as it was written: a file by its name, a folder by a list.

A crash, a full disk or a bad one leaves files that are there and wrong. To load half a library is the end of a process
without a word, and half a model's weights look like another architecture. So each is read once before it is trusted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS = "SHA256SUMS"
"""In a sealed folder, as `sha256sum` writes it: `sha256sum -c SHA256SUMS` says what is damaged."""

NAME_DIGITS = 16


def digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. OSError where it cannot be read."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sealed_name(file: Path, stem: str) -> str:
    """A name for `file` that says what it holds."""
    return f"{stem}-{digest(file)[:NAME_DIGITS]}{file.suffix}"


def find_sealed(folder: Path, stem: str, suffix: str) -> tuple[Path | None, int]:
    """(a file of this stem that holds what its name says, how many were found that do not: those are removed)."""
    num_damaged = 0
    for file in sorted(folder.glob(f"{stem}-*{suffix}")):
        if file.name == sealed_name(file, stem):
            return file, num_damaged
        file.unlink(missing_ok=True)
        num_damaged += 1
    return None, num_damaged


def seal(folder: Path) -> None:
    """List what a folder holds now, in every folder below it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What in a sealed folder differs from its list, in words; None where nothing does."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"{SUMS} cannot be read"
    if not lines:
        return f"{SUMS} is empty"
    for line in lines:
        expected, _, name = line.partition("  ")
        try:
            intact = digest(folder / name) == expected
        except OSError:
            return f"{name} cannot be read"
        if not intact:
            return f"{name} is not what was written"
    return None
