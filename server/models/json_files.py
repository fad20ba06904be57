"""Text and JSON files of a model's folder, read as transformers reads them, or refused with what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prerope.server.errors import ConfigurationError
from prerope.server.models.stored import POINTER, pointer
from prerope.server.nesting import nests_deeper

MARKS = {
    b"\xef\xbb\xbf": "begins with a byte order mark, which JSON has none of: save it as UTF-8 without one (BOM)",
    b"\xff\xfe": "is text in UTF-16, and JSON is in UTF-8: save it as UTF-8",
    b"\xfe\xff": "is text in UTF-16, and JSON is in UTF-8: save it as UTF-8",
}
"""How files begin that some editors save as JSON."""

AGAIN = "download it again"
DEEPEST = 100
"""More levels than any file of a model has, and fewer than the interpreter follows."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object that a file holds. Raises ConfigurationError."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise refused(folder, unreadable(name, error)) from error
    if data.startswith(POINTER):
        raise refused(folder, pointer(name))
    if mark := next((said for mark, said in MARKS.items() if data.startswith(mark)), None):
        raise refused(folder, f"{name} {mark}")
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise refused(folder, f"{name} is no text in UTF-8 (byte {error.start} of {len(data)}): {AGAIN}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}; {len(data)} bytes"
        raise refused(folder, f"{name} is no JSON ({where}), or is cut short: {AGAIN}, or correct it") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; levels beyond counting
        raise refused(folder, f"{name} is no JSON of a model ({len(data)} bytes): {AGAIN}") from error
    if not isinstance(value, dict):
        raise refused(folder, f"{name} is no JSON object: {AGAIN}")
    if nests_deeper(value, DEEPEST):
        raise refused(folder, f"{name} nests deeper than {DEEPEST} levels: {AGAIN}")
    return value


def read_text(folder: Path, name: str) -> str:
    """Raises ConfigurationError, and FileNotFoundError or IsADirectoryError where there is no such file."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refused(folder, f"{name} is no text in UTF-8: {AGAIN}") from error
    except PermissionError as error:
        raise refused(folder, unreadable(name, error)) from error


def unreadable(name: str, error: OSError) -> str:
    """Why a file cannot be read, with the remedy, as a clause."""
    reason = (error.strerror or str(error)).lower()
    if isinstance(error, PermissionError):
        return f"{name} cannot be read: {reason}; let the user that the server runs as read it (chmod, chown)"
    if isinstance(error, IsADirectoryError):
        return f"{name} is a folder, and it should be a file: {AGAIN}"
    return f"{name} cannot be read: {reason}"


def refused(folder: Path, reason: str) -> ConfigurationError:
    """What stops a start on this folder."""
    return ConfigurationError(f"MODEL_ID={folder} cannot be served: {reason}.")
