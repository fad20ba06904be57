"""An engine over a model without weights: its logits are made of the token ids that it finds in the cache.

What a row reads, through its sequence's block table, is all tokens up to its own, as they were stored when their rows
ran. So an output is right only if every step had the right ids, wrote them where they belong, and overwrote nothing
that is still read. `expected` is the same chain without an engine.

The recurrent one makes its logits of a state alone, which says how many tokens it has seen, and which.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from prerope.cache.blocks.manager import PrefixHasher
from prerope.cache.storage import KVStorage, StateShape
from prerope.rope.frequencies import Rotary
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.memory.sizing import CacheSize
from prerope.server.engine.sampling.host import sample
from prerope.server.engine.sequence import EngineRequest, Sequence
from prerope.server.models.model import Batch, Model
from prerope.server.ranks.group import ALONE
from torch import Tensor

from tests.engine.tiny_models import prompt_of

VOCABULARY, EOS, BLOCK = 24, 2, 4
MAX_MODEL_LEN = 80
POSITIONS = resolve_model(RopeSpec(method="rope"), {"": Rotary(16, 16, 1e4, "default", 64, 64)}, None)


def logits_after(tokens: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """[V] fp32, as good as random."""
    return logits_of(zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes()))


def logits_of(checksum: int) -> Tensor:
    """Of all tokens so far."""
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(checksum))


class ScriptedModel:
    """What `Engine` asks of a model."""

    states: tuple[StateShape, ...] = ()

    def __init__(self, num_blocks: int) -> None:
        self.layers: list[Any] = []
        self.raw = SimpleNamespace(ranks=ALONE)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.vocab_size = VOCABULARY
        self.eos_token_ids = frozenset({EOS})
        self._slots = np.full(num_blocks * BLOCK, -2, dtype=np.int64)

    def forward(self, batch: Batch, _: KVStorage) -> Tensor:
        ids = batch.input_ids.numpy()
        assert ids.min() >= 0, "a token that nobody knows"
        self._slots[batch.metadata.slot_mapping.numpy()] = ids
        blocks = self._slots.reshape(-1, BLOCK)
        logits = [torch.empty(0, VOCABULARY)]
        for row in batch.logit_rows.tolist():
            own = next(s for s in batch.metadata.sequences if s.first <= row < s.first + s.count)
            read = blocks[own.block_table.numpy()].reshape(-1)[: own.start + row - own.first + 1]
            logits.append(logits_after(read)[None])
        return torch.cat(logits)


class RecurrentModel(ScriptedModel):
    """The same logits, from a state: how many tokens were seen, and their checksum."""

    states = (StateShape((2,), torch.int64),)

    def forward(self, batch: Batch, storage: KVStorage) -> Tensor:
        ids, wanted, logits = batch.input_ids.numpy(), set(batch.logit_rows.tolist()), [torch.empty(0, VOCABULARY)]
        assert ids.min() >= 0, "a token that nobody knows"
        slots = storage.states[0]
        own, ends = batch.metadata.sequences, [state.target for state in batch.states]
        assert len(set(ends)) == len(own), "two sequences end in one slot"
        given = [(0, 0) if state.source is None else slots[state.source].tolist() for state in batch.states]
        for rows, state, (count, checksum) in zip(own, batch.states, given, strict=True):
            assert count == rows.start, "the state is that of another position"
            kept = dict(state.kept)
            for row in range(rows.first, rows.first + rows.count):
                checksum, count = zlib.crc32(ids[row : row + 1].tobytes(), checksum), count + 1
                if row in wanted:
                    logits.append(logits_of(checksum)[None])
                if count in kept:
                    slots[kept.pop(count)] = torch.tensor([count, checksum])
            assert not kept, "an edge that no row comes to"
            slots[state.target] = torch.tensor([count, checksum])
        return torch.cat(logits)


class Alternating:
    """A grammar whose odd and even tokens take turns: what may come next follows from the last token alone."""

    failure, accepting, finished = "", False, False

    begun = True

    def __init__(self) -> None:
        self._odd = True

    @property
    def ready(self) -> Future[bytes]:
        future: Future[bytes] = Future()
        future.set_result(self.mask())
        return future

    def matcher(self) -> Alternating:
        return Alternating()

    def mask(self) -> bytes:
        bits = np.arange(VOCABULARY) % 2 == self._odd
        return np.packbits(bits, bitorder="little").tobytes()

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self._odd
        self._odd = not self._odd


def scripted_engine(num_blocks: int = 40, model: Any = None, num_states: int = 12, **config: Any) -> Engine:
    settings = EngineConfig(block_size=BLOCK, max_model_len=MAX_MODEL_LEN, rope=RopeSpec(method="rope"), **config)
    model = cast("Model", model or ScriptedModel(num_blocks))
    states = num_states if model.states else 0
    return Engine(model, settings, POSITIONS, CacheSize(num_blocks, 0, torch.float32, MAX_MODEL_LEN, states))


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """No special tokens."""
    return [3 + token % (VOCABULARY - 3) for token in prompt_of(length, seed)]


def expected(request: EngineRequest) -> list[int]:
    """The request's output, token after token, with nothing else around."""
    sampling, prompt = request.sampling, list(request.prompt_token_ids)
    generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
    matcher = None if sampling.grammar is None else sampling.grammar.matcher()
    one = Sequence(request, POSITIONS, PrefixHasher(BLOCK, POSITIONS, ""), generator, prompt, len(prompt), matcher)
    ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else {EOS})
    for number in range(1, sampling.max_tokens + 1):
        (token,) = sample(logits_after(np.array(one.token_ids))[None], [one], frozenset({EOS}))
        one.append(token)
        if matcher is not None:
            matcher.accept(token)
        if token in ends and number >= sampling.min_tokens:
            break
    return one.token_ids[len(request.prompt_token_ids) :]
