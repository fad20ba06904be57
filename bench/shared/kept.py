"""Figures that were measured already, one JSON line each: a long run resumes, and runs side by side share them.

A figure is known by what it depends on (`key_of`). The code is not part of that: delete the file to measure again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Kept:
    """The lines of one file, those among them that other runs append meanwhile. Without a file, of this run alone."""

    def __init__(self, path: Path | None = None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self._path, self._num_read = path, 0
        self._known: dict[str, Mapping[str, Any]] = {}

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What any run has written by now."""
        if key not in self._known and self._path is not None:
            with self._path.open("rb") as file:
                file.seek(self._num_read)
                for line in file:
                    if not line.endswith(b"\n"):  # of another run, which is writing it
                        break
                    self._num_read += len(line)
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry
        return self._known.get(key)

    def add(self, key: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """One write of one line: other runs append too."""
        if self._path is None:
            self._known[key] = entry
        else:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **entry}) + "\n")
        return entry


def key_of(*parts: Any) -> str:
    """A digest of all that a figure depends on, which must be JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
