"""Which files are one GGUF model, by their names and first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from prerope.server.errors import ConfigurationError
from prerope.server.models.json_files import unreadable
from prerope.server.models.stored import some

MAGIC = b"GGUF"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(file: Path) -> bool:
    """By its first bytes: Ollama's blobs have no suffix."""
    try:
        with file.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError as error:
        raise ConfigurationError(f"MODEL_ID={file} cannot be served: {unreadable(file.name, error)}.") from error


def parts_of(file: Path) -> list[Path]:
    """All parts of a split file, in order, by the name of any; the file itself where it is whole."""
    match = PART.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match[3])
    parts = [file.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ConfigurationError(
            f"{count - len(missing)} of {count} parts of {match[1]} are there and {some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: the download is incomplete; run it again"
        )
    return parts
