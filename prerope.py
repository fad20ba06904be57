"""prerope: one import name for the packages `rope`, `cache` and `server`, which stand beside this file.

In the repository they are top-level folders, and this file makes one package of them. An installation has them under
`prerope/`, a namespace package, and nothing beside it. In both, a module is imported as `prerope.cache.storage`.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]
