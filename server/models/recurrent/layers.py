"""Layers that keep a state of a sequence beside keys and values: short convolutions, gated delta nets, Mamba.

transformers' modules do the arithmetic. Each asks the cache that it is given for the states of its layer and hands the
new ones back. Their forward is called once for all single rows of a step and once for each chunk, with a cache that
holds these states and nothing else. The rest of the model runs as if there were no cache.

Some of transformers' modules begin a chunk of several tokens from nothing, whatever state they are given (Mamba 1 in
Jamba and Zamba). Behind a state, these run token by token.

In trials a row stands for itself: such a module sees each row as a prompt of one token, as attention does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from prerope.cache.attention.types import SequenceRows
from prerope.cache.blocks.states import StateRows
from prerope.cache.storage import KVStorage, StateShape
from prerope.cache.transfer import send
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

Pick = Callable[[Tensor], Tensor]
"""Some rows of a packed tensor [1, T, …] → [n, t, …]."""


@dataclass(frozen=True, slots=True)
class StateName:
    """A tensor in transformers' cache of a layer: `conv_states` or `recurrent_states`, and its number there."""

    kind: str
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class RecurrentLayer:
    """A module that keeps states, as found.

    Attributes:
        argument: where its forward takes a cache: a name, or a place among its positional arguments.
        index, num_states: of its layer in a cache, and how many states of each kind such a layer may have.
        first: the place of its first tensor among all of the model's.
        stepwise: from a state it takes one token at a time.
    """

    module: nn.Module
    name: str
    argument: str | int
    index: int
    num_states: int
    states: tuple[StateName, ...]
    shapes: tuple[StateShape, ...]
    first: int
    forward: Callable[..., Any]
    stepwise: bool = False

    def run(self, call: Call, pick: Pick, states: Sequence[Tensor] | None) -> tuple[Any, list[Tensor]]:
        """(what the module gives for some rows, its states behind them), from these states or from nothing.

        The states given, [n, …] each, may be written to.
        """
        if not self.stepwise or states is None:
            return self._run(call, pick, states)
        given, kept = [], list(states)
        for row in range(_rows_of(call.hidden, call.num_rows, pick).shape[1]):
            one, kept = self._run(call, _only(pick, row), kept)
            given.append(one)
        return _in_turn(given), kept

    def _run(self, call: Call, pick: Pick, states: Sequence[Tensor] | None) -> tuple[Any, list[Tensor]]:
        layer = LinearAttentionLayer(number_of_states=self.num_states)
        for name, tensor in zip(self.states, states or (), strict=False):
            getattr(layer, name.kind)[name.number] = tensor
            getattr(layer, f"is_{name.kind}_initialized")[name.number] = True
            layer.has_previous_state[name.number] = True
            if name.kind == "conv_states":
                layer.conv_kernel_size[name.number] = tensor.shape[-1]
        given = self.given(call, pick, Cache(layers={self.index: layer}))
        return given, [getattr(layer, name.kind)[name.number] for name in self.states]

    def given(self, call: Call, pick: Pick, cache: Cache | None) -> Any:
        """What the module gives for some rows, with this cache or none."""
        arguments, options = list(_rows_of(call.arguments, call.num_rows, pick)), {}
        for name, value in call.options.items():
            options[name] = _rows_of(value, call.num_rows, pick)
        if isinstance(self.argument, int):
            arguments[self.argument] = cache
        else:
            options[self.argument] = cache
        return self.forward(*arguments, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's forward."""
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        return STATES.get()(self, Call(arguments, options, hidden.shape[1]))


@dataclass(frozen=True, slots=True)
class Call:
    """What a module's forward was given; tensors in it whose shape begins with [1, `num_rows`] have a row a token."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    num_rows: int

    @property
    def hidden(self) -> Tensor:
        """What it is that the rows are of."""
        hidden: Tensor = self.options["hidden_states"] if "hidden_states" in self.options else self.arguments[0]
        return hidden


StateHandler = Callable[[RecurrentLayer, Call], Any]
"""Runs a module over the rows of a call."""


def apart(layer: RecurrentLayer, call: Call) -> Any:
    """A handler: every row is a prompt of its own."""
    return _joined([(slice(None), layer.given(call, lambda x: x.transpose(0, 1), None))], call.num_rows)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A handler: every `length` rows are a prompt, from its first token on."""

    length: int

    def __call__(self, layer: RecurrentLayer, call: Call) -> Any:
        given = layer.given(call, lambda x: x.reshape(-1, self.length, *x.shape[2:]), None)
        return _joined([(slice(None), given)], call.num_rows)


STATES: ContextVar[StateHandler] = ContextVar("state_handler", default=apart)


@contextmanager
def running(handler: StateHandler) -> Iterator[None]:
    """Inside, modules that keep states run so."""
    token = STATES.set(handler)
    try:
        yield
    finally:
        STATES.reset(token)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one sequence that are read at once. copy: a slot that gets the state behind them, too."""

    rows: slice
    source: int | None
    target: int
    copy: int | None


class StepStates:
    """A handler: the rows of a step, and the states of its sequences in a storage."""

    def __init__(self, sequences: Sequence[SequenceRows], states: Sequence[StateRows], storage: KVStorage) -> None:
        self._states, self._pieces = storage.states, list[_Piece]()
        singles, copies = list[tuple[int, int, int]](), list[tuple[int, int]]()
        for own, slots in zip(sequences, states, strict=True):
            if own.count == 1 and slots.source is not None:
                singles.append((own.first, slots.source, slots.target))
                copies += [(slots.target, slot) for _, slot in slots.kept]
            else:
                self._pieces += _pieces(own, slots)
        device = storage.states[0].device
        sent = [send(torch.tensor(part).view(-1).numpy(), device) for part in (singles, copies)]
        self._rows, self._sources, self._targets = sent[0].view(-1, 3).unbind(1) if singles else (sent[0],) * 3
        self._copied, self._copies = sent[1].view(-1, 2).unbind(1) if copies else (sent[1],) * 2

    def __call__(self, layer: RecurrentLayer, call: Call) -> Any:
        states = self._states[layer.first : layer.first + len(layer.states)]
        given: list[tuple[slice | Tensor, Any]] = []
        if len(self._rows):
            given.append((self._rows, self._run_singles(layer, call, states)))
        for piece in self._pieces:
            given.append((piece.rows, _run_piece(layer, call, states, piece)))
        return _joined(given, call.num_rows)

    def _run_singles(self, layer: RecurrentLayer, call: Call, states: Sequence[Tensor]) -> Any:
        before = [tensor.index_select(0, self._sources) for tensor in states]
        given, after = layer.run(call, lambda x: x[0].index_select(0, self._rows).unsqueeze(1), before)
        for tensor, new in zip(states, after, strict=True):
            tensor.index_copy_(0, self._targets, new.to(tensor.dtype))
            if len(self._copied):
                tensor.index_copy_(0, self._copies, tensor.index_select(0, self._copied))
        return given


def _pieces(own: SequenceRows, slots: StateRows) -> Iterator[_Piece]:
    """The rows of a sequence, cut where its state is kept."""
    begin, source = own.start, slots.source
    stop = own.start + own.count
    for edge, slot in (*slots.kept, (stop, None)):
        if edge > begin:
            rows = slice(own.first + begin - own.start, own.first + edge - own.start)
            yield _Piece(rows, source, slots.target, slot)
            begin, source = edge, slots.target


def _run_piece(layer: RecurrentLayer, call: Call, states: Sequence[Tensor], piece: _Piece) -> Any:
    own = [tensor[piece.target : piece.target + 1] for tensor in states]
    if piece.source is not None and piece.source != piece.target:
        for tensor, view in zip(states, own, strict=True):
            view.copy_(tensor[piece.source : piece.source + 1])
    given, after = layer.run(call, lambda x: x[:, piece.rows], None if piece.source is None else own)
    for tensor, view, new in zip(states, own, after, strict=True):
        if new is not view:
            view.copy_(new)
        if piece.copy is not None:
            tensor[piece.copy].copy_(view[0])
    return given


def _rows_of(value: Any, num_rows: int, pick: Pick) -> Any:
    if isinstance(value, Tensor):
        return pick(value) if value.shape[:2] == (1, num_rows) else value
    if type(value) is tuple:
        return tuple(_rows_of(member, num_rows, pick) for member in value)
    return {key: _rows_of(member, num_rows, pick) for key, member in value.items()} if type(value) is dict else value


def _only(pick: Pick, row: int) -> Pick:
    """Pick one row."""
    return lambda x: pick(x)[:, row : row + 1]


def _in_turn(given: Sequence[Any]) -> Any:
    """Join consecutive rows, [n, 1, …] each, into [n, t, …]; tuples member by member."""
    if isinstance(given[0], tuple):
        return tuple(_in_turn(members) for members in zip(*given, strict=True))
    return torch.cat(list(given), dim=1) if isinstance(given[0], Tensor) else given[-1]


def _joined(given: Sequence[tuple[slice | Tensor, Any]], num_rows: int) -> Any:
    """Join what was given for rows of a step, [n, t, …] each, into [1, `num_rows`, …]; tuples member by member."""
    _, first = given[0]
    if isinstance(first, tuple):
        return tuple(_joined([(rows, one[place]) for rows, one in given], num_rows) for place in range(len(first)))
    if len(given) == 1:
        return first.reshape(1, num_rows, *first.shape[2:])
    whole = first.new_empty(1, num_rows, *first.shape[2:])
    for rows, one in given:
        whole[0, rows] = one.reshape(-1, *one.shape[2:])
    return whole
