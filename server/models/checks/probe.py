"""The load-time probe: our forward against transformers' own eager forward, on the real weights.

A model is served only when they agree, layer by layer and in the logits. Each layer is given the input that the stock
layer had, so that errors do not add up and the layer that differs is the one that is named. What is run is what is
served:

- the probe prompt in chunks, and in steps of 1, 2 and 8 rows through the decode kernels and the stack, with a cache of
  the served dtype. A sliding window is shrunk below the prompt meanwhile, on both sides, so that rows cross its edge;
- a few rows around every length that the config names, between and beyond, up to four times the trained length, read by
  the specification of attention, so that what a layer does with far positions shows without a prompt of that length.

In low precision both forwards round, so both are held against the same layer in fp32 (`precise`), and ours may be
farther from it than transformers' by a little only. There is no switch to skip this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from prerope.cache.attention.reference import attend_sequence
from prerope.cache.attention.types import SequenceRows
from prerope.cache.blocks.states import StateRows
from prerope.cache.storage import KVStorage
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED
from prerope.server.errors import ConfigurationError
from prerope.server.models.attention.interface import AttentionCall, AttentionHandler
from prerope.server.models.checks.numbers import check_logits
from prerope.server.models.checks.precise import in_fp32
from prerope.server.models.checks.trials import (
    LONGEST,
    PROBE_LENGTH,
    layer_inputs,
    layer_outputs,
    named_lengths,
    probe_ids,
    relative_difference,
)
from prerope.server.models.model import Chunk, Model, build_batch, own_positions
from prerope.server.models.raw_keys import REMEDY
from prerope.server.models.recurrent.layers import Prompts, running
from torch import Tensor, nn

STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 7),),
    ((7, 13),),
    ((13, 14),),
    ((14, 15), (15, 16)),
    tuple((row, row + 1) for row in range(16, PROBE_LENGTH)),
)
"""The rows of each step, in sequences that share the cache blocks of one: two chunks, then 1, 2 and 8 single rows."""

BLOCK_SIZE = 8
WINDOW = 5
FAR_ROWS = 8
MOST_WINDOWS = 10
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Of the rms difference over the rms of an fp32 layer. A missed norm or a wrong pairing is of order 1."""

WORSE = 2.0
"""In low precision a layer of ours may be so many times as far from the fp32 one as transformers' own layer is."""

LOGITS_SLACK = 8
"""In low precision rounding adds up over the layers: what the tolerance is multiplied by for logits."""


@dataclass(slots=True)
class Trace:
    """One forward: what entered and left each attention module [1, T, hidden], and the logits [T, V] in fp32."""

    entered: dict[nn.Module, Tensor] = field(default_factory=dict)
    left: dict[nn.Module, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def probe(model: Model, cache_dtype: torch.dtype | None = None, block_size: int = BLOCK_SIZE) -> float:
    """The largest relative difference found; ConfigurationError, naming model type and layer, where it is too large.

    cache_dtype, block_size: of keys and values as they will be served, so that the GPU's kernels are compiled for
    nothing else. None: the model's own.
    """
    positions = own_positions(model)
    with _short_window(model):
        worst = _Judge(model, cache_dtype or model.dtype, block_size).worst(positions)
        starts = far_windows(model, positions)
        # transformers reads all rows of a forward as its last one, so windows of other runs are not read with it.
        apart = positions.methods[positions.main].run_end(0) != UNBOUNDED
        for side_by_side in [[start] for start in starts] if apart else [starts] * bool(starts):
            worst = max(worst, _Judge(model, model.dtype, block_size, side_by_side).worst(positions))
    return worst


def far_windows(model: Model, positions: ModelPositions) -> list[int]:
    """First rows of the windows of `FAR_ROWS` rows that are probed beyond the prompt, near ones first."""
    method = positions.methods[positions.main]
    trained = method.train_length
    lengths = {*named_lengths(model.raw), trained, method.rotary.max_length, 5 * trained // 2, 4 * trained}
    starts = set()
    for length in lengths:
        if method.run_end(0) == UNBOUNDED:
            starts.add(length - FAR_ROWS // 2)
            continue
        # transformers reads all rows of a forward as its last one: a window lies in one run, at its end.
        for end in map(method.run_end, (length - 1, length)):
            starts.add(length if end == UNBOUNDED else end - FAR_ROWS)
    if model.raw.reach is not None:
        starts.add(model.raw.reach - FAR_ROWS)
    last = LONGEST if model.raw.reach is None else model.raw.reach - FAR_ROWS
    chosen = sorted(start for start in starts if 0 < start <= last)
    if len(chosen) > MOST_WINDOWS:
        chosen = [chosen[place * len(chosen) // MOST_WINDOWS] for place in range(MOST_WINDOWS - 1)] + chosen[-1:]
    return chosen


class _Judge:
    """Compares forwards of the prompt, through the cache and the steps as they are served, or of windows of its rows.

    starts: the first rows of the windows, which are read side by side; none: the prompt.
    """

    def __init__(self, model: Model, cache_dtype: torch.dtype, block_size: int, starts: Sequence[int] = ()) -> None:
        self.model, self.cache_dtype, self.block_size, self.starts = model, cache_dtype, block_size, starts
        ids = probe_ids(model.raw.text_config.vocab_size, model.device)
        self.ids = ids[:FAR_ROWS].repeat(len(starts)) if starts else ids
        self.num_rows = FAR_ROWS if starts else len(ids)
        first = torch.tensor(starts or [0], device=ids.device)[:, None]
        self.rows = first + torch.arange(self.num_rows, device=ids.device)  # [windows, rows of each]
        self.compared = _compared(model)

    def worst(self, positions: ModelPositions) -> float:
        """The largest relative difference; ConfigurationError where one is too large."""
        model = self.model
        stock = self._stock()
        check_logits(model.raw, stock.logits)
        exact = model.dtype == torch.float32
        precise = stock if exact else self._stock(held=stock, fp32=True)
        with model.layer_by_layer():
            ours = self._ours(positions, stock)
        # Far rows run through no stack, and what stands around attention shows in the logits of held layers, too.
        free = ours if self.starts else self._ours(positions, None)
        worst = 0.0
        for place in range(len(self.rows)):
            window = _Window(self, place)
            for module, name in self.compared.items():
                theirs = window.difference(stock.left[module], precise.left[module])
                error = window.difference(ours.left[module], precise.left[module])
                worst = max(worst, error)
                window.check(name, error, theirs)
            worst = max(worst, self._logits(window, free.logits, stock.logits, exact=exact))
        return worst

    def _logits(self, window: _Window, ours: Tensor, stock: Tensor, *, exact: bool) -> float:
        error = window.difference(ours, stock)
        if exact or error <= LOGITS_SLACK * window.tolerance:
            window.check("the logits", error, 0.0, LOGITS_SLACK * window.tolerance if not exact else None)
            return error
        precise = self._stock(fp32=True).logits
        error = window.difference(ours, precise)
        window.check("the logits", error, window.difference(stock, precise), LOGITS_SLACK * window.tolerance)
        return error

    @torch.inference_mode()
    def _stock(self, held: Trace | None = None, *, fp32: bool = False) -> Trace:
        """transformers' own forward. fp32: of its attention modules on what entered those of `held`, or of all."""
        raw, trace = self.model.raw, Trace()
        modules = list(self.compared)
        inputs = {} if held is None else held.entered
        ids = self.ids.view(self.rows.shape)
        widened = in_fp32(raw.model, None if held is None else modules) if fp32 else nullcontext()
        with raw.stock(), layer_inputs(modules, trace.entered, inputs), layer_outputs(modules, trace.left), widened:
            output = raw.model(input_ids=ids, position_ids=self.rows, use_cache=False)
        trace.logits = output.logits.float()
        return trace

    def _ours(self, positions: ModelPositions, held: Trace | None) -> Trace:
        """With `held`, each layer gets the input that it had in that trace."""
        if not self.starts:
            return self._stepped(positions, held)
        raw, trace = self.model.raw, Trace()
        modules, wanted = list(self.compared), torch.arange(len(self.ids), device=self.ids.device)
        packed = {} if held is None else {module: x.reshape(1, -1, x.shape[-1]) for module, x in held.entered.items()}
        replaced = layer_inputs(modules, trace.entered, packed) if packed else nullcontext()
        with torch.inference_mode(), replaced, layer_outputs(modules, trace.left), running(Prompts(FAR_ROWS)):
            trace.logits = raw.forward(self.ids, self.rows.flatten(), wanted, self._far_attention(positions)).float()
        return trace

    def _far_attention(self, positions: ModelPositions) -> AttentionHandler:
        """The specification of attention, over the keys of each window's rows alone."""
        windows = [SequenceRows(0, FAR_ROWS, start, torch.empty(0), positions) for start in self.starts]
        layers = {layer.module: layer for layer in self.model.layers}

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
            layer = layers[module]
            parts = [torch.split(part.float(), FAR_ROWS) for part in layer.arrange(query, key, value)]
            options, given = call.options(layer.group), zip(*parts, windows, strict=True)
            rows = [attend_sequence(q, k, v, window, options) for q, k, v, window in given]
            return torch.cat(rows).to(query.dtype)

        return attend

    def _stepped(self, positions: ModelPositions, held: Trace | None) -> Trace:
        """Steps through a small cache, whose blocks lie in no order.

        States are kept on the way of one chunk of the whole prompt before; each step then begins with these.
        """
        model = self.model
        blocks = list(range(-(-PROBE_LENGTH // self.block_size)))[::-1]
        storage = KVStorage(
            [layer.shape for layer in model.layers],
            len(blocks),
            self.block_size,
            self.cache_dtype,
            model.device,
            model.states,
            2 * PROBE_LENGTH,
        )

        def run(step: Iterable[tuple[int, int]], kept: tuple[tuple[int, int], ...] = ()) -> Trace:
            chunks = [self._chunk(start, stop, blocks, positions, kept) for start, stop in step]
            return self._step(chunks, storage, held)

        if model.recurrent:
            starts = sorted(start for step in STEPS for start, _ in step if start)
            run([(0, PROBE_LENGTH)], tuple((start, start) for start in starts))
        traces = [run(step) for step in STEPS]
        whole = Trace(logits=torch.cat([trace.logits for trace in traces]))
        if held is not None:
            whole.left = {module: torch.cat([one.left[module] for one in traces], dim=1) for module in self.compared}
        return whole

    def _chunk(
        self, start: int, stop: int, blocks: list[int], positions: ModelPositions, kept: tuple[tuple[int, int], ...]
    ) -> Chunk:
        """Rows of the prompt; the state before row i is kept in slot i, those behind steps beyond them."""
        state = StateRows(start or None, PROBE_LENGTH + start, kept) if self.model.recurrent else None
        ids = self.ids.tolist()[start:stop]
        return Chunk.of(ids, start, blocks, positions, len(ids), state=state)

    def _step(self, chunks: Sequence[Chunk], storage: KVStorage, held: Trace | None) -> Trace:
        trace, modules = Trace(), list(self.compared)
        rows = slice(chunks[0].start, chunks[-1].start + len(chunks[-1].token_ids))
        inputs = {} if held is None else {module: x[:, rows] for module, x in held.entered.items()}
        replaced = layer_inputs(modules, trace.entered, inputs) if inputs else nullcontext()
        with replaced, layer_outputs(modules, trace.left):
            trace.logits = self.model.forward(build_batch(chunks, self.block_size, self.model.device), storage)
        return trace


class _Window:
    """The rows of one window in what a judge compares, and what may be rounding there."""

    def __init__(self, judge: _Judge, place: int) -> None:
        self._family, self._num_rows = judge.model.raw.family, judge.num_rows
        self._rows = slice(place * judge.num_rows, (place + 1) * judge.num_rows)
        self._start = judge.starts[place] if judge.starts else None
        # fp32 angles, which transformers has, are off by this at the last of these rows.
        angle = 0.0 if self._start is None else (self._start + self._num_rows) * 2**-23
        self.tolerance = max(TOLERANCE[judge.model.dtype], TOLERANCE[judge.cache_dtype]) + angle

    def difference(self, ours: Tensor, expected: Tensor) -> float:
        """The relative rms difference of two tensors of all rows, packed or a window a row."""
        own = (x.float().reshape(-1, x.shape[-1])[self._rows] for x in (ours, expected))
        return relative_difference(*own)

    def check(self, where: str, error: float, theirs: float, tolerance: float | None = None) -> None:
        """ConfigurationError where an error is more than rounding, by what transformers' own is off."""
        allowed = max(self.tolerance if tolerance is None else tolerance, WORSE * theirs)
        if error <= allowed:
            return
        rows = "" if self._start is None else f" at rows {self._start} to {self._start + self._num_rows - 1}"
        unknown = "this family computes attention in a way that this server does not know"
        if where.startswith("recurrent"):
            unknown = "its state cannot be carried from one chunk of a prompt to the next"
        raise ConfigurationError(
            f"model type {self._family!r} cannot be served: {where}{rows} differ from transformers' own by {error:.2g} "
            f"relative (at most {allowed:.2g} is rounding), so {unknown}. {REMEDY}"
        )


def _compared(model: Model) -> dict[nn.Module, str]:
    """Modules whose results are compared, and what they are called. What lies inside of attention is not, by itself."""
    inside = {part for layer in model.layers for part in layer.module.modules()}
    named = {layer.module: f"attention layer {layer.name}" for layer in model.layers}
    return named | {one.module: f"recurrent layer {one.name}" for one in model.recurrent if one.module not in inside}


@contextmanager
def _short_window(model: Model) -> Iterator[None]:
    """Inside, every sliding window of the model is `WINDOW` tokens."""
    owners = [model.raw.text_config, *(layer.module for layer in model.layers)]
    windows = [(owner, window) for owner in owners if isinstance(window := getattr(owner, "sliding_window", None), int)]
    for owner, _ in windows:
        owner.sliding_window = WINDOW
    try:
        yield
    finally:
        for owner, window in windows:
            owner.sliding_window = window
