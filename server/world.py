"""What workers know of the server they work for: sent to their zygote once, as a pickle. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class World:
    """The served model's text side."""

    tokenizer: Tokenizer

    def prepare(self) -> None:
        """Import and build, in the zygote, what every task would otherwise begin with."""
        from prerope.server.structured.compile import warm_up

        warm_up(self.tokenizer)
