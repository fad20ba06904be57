"""What workers know of the server they work for: sent to their zygote once, as a pickle. Imports no torch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prerope.server.api.requests.reading import ModelText
    from prerope.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class World:
    """The served model's text side."""

    text: ModelText

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    def prepare(self) -> None:
        """Import and build, in the zygote, what every task would otherwise begin with."""
        from prerope.server.api.chat.trial import guard
        from prerope.server.api.openai.schemas import ChatRequest
        from prerope.server.api.requests.reading import read_body
        from prerope.server.errors import InvalidRequest
        from prerope.server.structured.compile import warm_up

        warm_up(self.tokenizer)
        guard(self.tokenizer)
        with contextlib.suppress(InvalidRequest):
            read_body(ChatRequest, b'{"messages": [{"role": "user", "content": "Hello"}]}', self.text)
