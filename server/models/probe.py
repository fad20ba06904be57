"""The load-time probe: our forward against transformers' own eager forward, on the real weights.

A model is served only when they agree, layer by layer and in the logits. Each layer is given the input that the stock
layer had, so that errors do not add up and the layer that differs is the one that is named. The prompt is run in two
chunks, through the same cache and attention as a request. A sliding window is shrunk below the prompt meanwhile, on
both sides, so that it is tested too. There is no switch to skip this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from prerope.cache.storage import KVStorage
from prerope.server.errors import ConfigurationError
from prerope.server.models.batch import Chunk, build_batch
from prerope.server.models.inspection import PROBE_LENGTH, layer_inputs, probe_ids, relative_difference
from prerope.server.models.model import Model, own_positions
from torch import Tensor, nn

SPLIT = 15  # the first chunk's rows: not a multiple of the block size below
BLOCK_SIZE = 8
WINDOW = 5
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Of the rms difference over the stock rms. A missed norm or a wrong pairing is of order 1."""


@dataclass(slots=True)
class Trace:
    """One forward: what entered and left each attention module [1, T, hidden], and the logits [T, V] in fp32."""

    entered: dict[nn.Module, Tensor] = field(default_factory=dict)
    left: dict[nn.Module, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


def probe(model: Model) -> float:
    """The largest relative difference found; ConfigurationError, naming model type and layer, where it is too large."""
    with _short_window(model):
        stock = _stock(model)
        with model.layer_by_layer():
            ours = _ours(model, stock)
        free = _ours(model, None)
    tolerance = TOLERANCE[model.dtype]
    worst = 0.0
    for layer in model.layers:
        error = _difference(ours.left[layer.module], stock.left[layer.module])
        worst = max(worst, error)
        if not error <= tolerance:
            raise _mismatch(model, f"attention layer {layer.name}", error, tolerance)
    error = _difference(free.logits, stock.logits)
    # Rounding does add up over the layers here, in a low-precision model.
    if not error <= tolerance * (1 if model.dtype == torch.float32 else 4):
        raise _mismatch(model, "the logits", error, tolerance)
    return max(worst, error)


def _mismatch(model: Model, where: str, error: float, tolerance: float) -> ConfigurationError:
    return ConfigurationError(
        f"model type {model.raw.family!r} cannot be served from raw keys: {where} differ from transformers' own by "
        f"{error:.2g} relative (at most {tolerance:g} is rounding), so this family computes attention in a way that "
        "this server does not know"
    )


def _difference(ours: Tensor | None, stock: Tensor | None) -> float:
    assert ours is not None
    assert stock is not None
    return relative_difference(ours, stock)


def _ids(model: Model) -> Tensor:
    return probe_ids(model.raw.text_config.vocab_size, model.device)


@torch.inference_mode()
def _stock(model: Model) -> Trace:
    trace = Trace()
    modules = [layer.module for layer in model.layers]
    with model.raw.stock(), layer_inputs(modules, trace.entered, {}), _layer_outputs(modules, trace.left):
        trace.logits = model.raw.model(input_ids=_ids(model)[None], use_cache=False).logits[0].float()
    return trace


def _ours(model: Model, held: Trace | None) -> Trace:
    """Two chunks through a small cache; with `held`, each layer gets the input that it had in that trace."""
    ids = _ids(model).tolist()
    blocks = list(range(-(-PROBE_LENGTH // BLOCK_SIZE)))[::-1]
    storage = KVStorage([layer.shape for layer in model.layers], len(blocks), BLOCK_SIZE, model.dtype, model.device)
    positions = own_positions(model)
    traces = []
    for start, stop in ((0, SPLIT), (SPLIT, PROBE_LENGTH)):
        trace = Trace()
        modules = [layer.module for layer in model.layers]
        inputs = {} if held is None else {m: x[:, start:stop] for m, x in held.entered.items()}
        batch = build_batch([Chunk(ids[start:stop], start, blocks, positions, stop - start)], BLOCK_SIZE, model.device)
        replaced = layer_inputs(modules, trace.entered, inputs) if inputs else nullcontext()
        with replaced, _layer_outputs(modules, trace.left):
            trace.logits = model.forward(batch, storage)
        traces.append(trace)
    first, second = traces
    assert first.logits is not None
    assert second.logits is not None
    left = {module: torch.cat([first.left[module], second.left[module]], dim=1) for module in first.left}
    return Trace(left=left, logits=torch.cat([first.logits, second.logits]))


@contextmanager
def _layer_outputs(modules: list[nn.Module], left: dict[nn.Module, Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        left[module] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
