"""Where this user's files lie, by the environment. Imports nothing else, so that what has no settings can ask it."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path


def default_cache_dir() -> Path:
    """Where converted checkpoints are kept: the XDG cache folder of the user, or a temporary one without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    if base:
        return Path(base) / "prerope"
    try:
        return Path.home() / ".cache" / "prerope"
    except RuntimeError:  # neither HOME nor an entry for this user, as in containers with a number for a user
        return temporary_folder()


@lru_cache
def temporary_folder() -> Path:
    """This user's alone: kernels are loaded from it, so one that others could have made or may write is not taken."""
    folder = Path(tempfile.gettempdir(), f"prerope-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="prerope-"))
