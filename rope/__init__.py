"""Positions: frequencies, rotations, and the methods that say how a query reads raw keys. Knows torch only.

For a model of one's own: `RotaryEmbedding` and what goes with it, imported when first asked for, because `rope.spec` is
a leaf that loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prerope.rope.embedding.axial import apply_learned_rotations, apply_rotary_emb, broadcat
    from prerope.rope.embedding.module import RotaryEmbedding

__all__ = ["RotaryEmbedding", "apply_learned_rotations", "apply_rotary_emb", "broadcat"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = "prerope.rope.embedding.module" if name == "RotaryEmbedding" else "prerope.rope.embedding.axial"
        return getattr(importlib.import_module(home), name)
