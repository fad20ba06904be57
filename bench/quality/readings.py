"""Losses that were measured already, one JSON line each: a long run resumes, and runs side by side share them.

A reading is known by what it depends on: the model, its dtype, how positions were read and the tokens. The code is not
part of that: delete the file to measure again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "quality-readings.jsonl"


class Readings:
    """Losses in nats a token, kept in `FILE` of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._path.touch()

    def get(self, key: str) -> list[float] | None:
        """What any run has written by now, so the file is read every time: a reading takes minutes."""
        for line in self._path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["key"] == key:
                return list(entry["losses"])
        return None

    def add(self, key: str, losses: Sequence[float], about: Mapping[str, Any]) -> None:
        """`about` is for people. One write of one line: other runs append too."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "losses": list(losses), **about}) + "\n")


def reading_key(about: Mapping[str, Any], token_ids: Sequence[int]) -> str:
    """A digest of all that a reading depends on; `about` must be JSON."""
    text = json.dumps([dict(about), list(token_ids)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
