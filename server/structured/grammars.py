"""The grammars of one server: compiled in workers first, then here, and kept by their bytes.

Clients send the same schema again and again, so what was compiled is kept, and so is what was refused. Several are
compiled at once; requests that want the same one wait for the same work, and when all of them have left, it is killed.
Where prefixes are separated by API key, so are grammars: how soon one is there tells of nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prerope.server.byte_cache import ByteCache
from prerope.server.errors import InvalidRequest
from prerope.server.machine.threads import step_aside
from prerope.server.structured.compile import Cost, Trial, compile_here, on_a_deep_stack
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.structured.text import GrammarText
from prerope.server.workers.pool import Workers

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer

MAX_KEPT_BYTES = 256 * 2**20
MAX_REFUSED_BYTES = 2**20

LANE = "grammar"

Key = tuple[str, bytes]
"""Tenant and digest."""


@dataclass(slots=True)
class _Making:
    task: asyncio.Task[CompiledGrammar]
    num_waiting: int = 0


class Grammars:
    """Compiles and keeps grammars. All methods are called on the event loop."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], workers: Workers) -> None:
        self._tokenizer = tokenizer
        self._workers = workers
        self.kept: ByteCache[Key, CompiledGrammar] = ByteCache(MAX_KEPT_BYTES)
        self.refused: ByteCache[Key, InvalidRequest] = ByteCache(MAX_REFUSED_BYTES)
        self._making: dict[Key, _Making] = {}

    async def compile(self, wanted: GrammarText, tenant: str = "", line: str = "") -> CompiledGrammar:
        """InvalidRequest, with llguidance's reason, for what it cannot compile. Shared among requests of a tenant.

        line: among whom it waits for a worker, and whose share of what is kept it takes.
        """
        key = tenant, wanted.digest
        if (grammar := self.kept.get(key)) is not None:
            return grammar
        if (refusal := self.refused.get(key)) is not None:
            raise _renamed(wanted, refusal)
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = _Making(asyncio.create_task(self._make(key, wanted, line)))
        making.num_waiting += 1
        try:
            return await asyncio.shield(making.task)
        except InvalidRequest as refused:
            raise _renamed(wanted, refused) from None
        finally:
            making.num_waiting -= 1
            if not making.num_waiting:
                self._making.pop(key, None)
                making.task.cancel()

    async def _make(self, key: Key, wanted: GrammarText, line: str) -> CompiledGrammar:
        try:
            cost: Cost = await self._workers.run(Trial(wanted), LANE, line=line, param=wanted.param)
            tokenizer = self._tokenizer()

            def compiled() -> CompiledGrammar:
                step_aside()
                return compile_here(wanted, tokenizer, cost)

            grammar = await asyncio.wrap_future(on_a_deep_stack(compiled))
        except InvalidRequest as refused:
            self.refused.put(key, refused, 512 + len(refused.message), line)
            raise
        self.kept.put(key, grammar, grammar.num_bytes, line)
        return grammar


def _renamed(wanted: GrammarText, refusal: InvalidRequest) -> InvalidRequest:
    """The refusal of the same grammar, perhaps in another field of another request."""
    message = refusal.message.replace(f"'{refusal.param}'", f"'{wanted.param}'", 1)
    return InvalidRequest(message, param=wanted.param, code=refusal.code)
