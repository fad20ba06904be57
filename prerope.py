"""prerope: one import name for the packages `rope`, `cache` and `server`, which stand beside this file.

In the repository they are top-level folders; an installation has them under `prerope/` alone, where this file is
`prerope/__init__.py`. In both, a module is imported as `prerope.cache.storage`, never as `cache.storage`.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]
