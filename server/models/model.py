"""The model: a transformers causal LM, our cache and attention under it. One forward of one `Batch`.

    Chunk, one a sequence ─ build_batch ─ Batch: packed ids, positions, slots, tables ─ Model.forward ─ logits

A batch goes to the device in one piece, which does not wait for what runs there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.dispatch import attention_on
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.blocks.states import StateRows
from prerope.cache.storage import KVStorage, StateShape
from prerope.cache.transfer import send
from prerope.rope.frequencies import Rotary
from prerope.rope.model import ModelPositions, parted, resolve_model
from prerope.rope.reading import UNBOUNDED, MethodError
from prerope.rope.spec import LayerMethods, RopeSpec
from prerope.server.config import Quantization
from prerope.server.errors import ConfigurationError
from prerope.server.models.attention.interface import AttentionCall
from prerope.server.models.checks.inspection import inspect_layers
from prerope.server.models.checks.turning import RawKeyLayer
from prerope.server.models.cpu import products as cpu_kernels
from prerope.server.models.cpu import stack as cpu_stack
from prerope.server.models.cpu.settle import settle
from prerope.server.models.cuda import products as cuda_kernels
from prerope.server.models.cuda import stack as cuda_stack
from prerope.server.models.layers import Stack, layers_of, plain_layers
from prerope.server.models.modules import Kernels, fast_modules
from prerope.server.models.quantized.int8 import check_quantization, quantize
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.models.recurrent.finding import find_recurrent
from prerope.server.models.recurrent.layers import StepStates, running
from prerope.server.models.shares import share_out
from prerope.server.models.weights import load_weights
from prerope.server.ranks.group import ALONE, Ranks
from torch import Tensor, nn

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint


Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(SequenceRows):
    """What a sequence contributes to a step: its rows, whose blocks are allocated, with their tokens.

    `first` may be left to `build_batch`.

    num_logits: how many of its last rows want logits.
    pending_place: where its last token is among those that the step before samples; None: it is in `token_ids`.
    state: the slots of its state, where layers keep one.
    """

    token_ids: Sequence[int]
    num_logits: int
    pending_place: int | None = None
    state: StateRows | None = None

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        start: int,
        block_table: Sequence[int] | Ints,
        positions: ModelPositions,
        num_logits: int,
        pending_place: int | None = None,
        state: StateRows | None = None,
        selects_from: int = UNBOUNDED,
    ) -> Chunk:
        """Tokens at positions `start`, `start` + 1, …; block_table: at least the blocks up to the last of them.

        An int64 array is taken as it is, without a copy.
        """
        blocks = torch.from_numpy(np.asarray(block_table, dtype=np.int64))
        return cls(
            first=0,
            count=len(token_ids),
            start=start,
            block_table=blocks,
            positions=positions,
            selects_from=selects_from,
            token_ids=token_ids,
            num_logits=num_logits,
            pending_place=pending_place,
            state=state,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids, position_ids [T] int64; logit_rows [N] int64: packed rows, in chunk order.

    states: of each sequence, where layers keep one.
    """

    input_ids: Tensor
    position_ids: Tensor
    logit_rows: Tensor
    metadata: AttentionMetadata
    states: Sequence[StateRows] = ()


def build_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device, sampled: Tensor | None = None) -> Batch:
    """Pack chunks, in order. sampled: [n] int64 on the device: the tokens of the step before, computed or not yet."""
    ids, positions, slots, logit_rows = array("q"), array("q"), array("q"), array("q")
    pending_rows, pending_places = array("q"), array("q")
    packed: list[Chunk] = []
    for chunk in chunks:
        num_blocks = -(-chunk.length // block_size)
        if chunk.first != len(ids) or len(chunk.block_table) != num_blocks:
            chunk = replace(chunk, first=len(ids), block_table=chunk.block_table[:num_blocks])
        packed.append(chunk)
        ids.extend(chunk.token_ids)
        positions.extend(range(chunk.start, chunk.length))
        slots.extend(_slots(chunk, block_size))
        logit_rows.extend(range(len(ids) - chunk.num_logits, len(ids)))
        if chunk.pending_place is not None:
            pending_rows.append(len(ids) - 1)
            pending_places.append(chunk.pending_place)
    parts = (ids, positions, slots, logit_rows, pending_rows, pending_places)
    numbers = torch.frombuffer(bytearray().join(parts), dtype=torch.int64)
    sent = numbers if device.type == "cpu" else send(numbers, device)
    sizes = [len(part) for part in parts]
    input_ids, position_ids, slot_mapping, rows, pending, places = torch.split_with_sizes(sent, sizes)
    if pending_rows:
        assert sampled is not None
        input_ids.index_copy_(0, pending, sampled.index_select(0, places))
    states = [chunk.state for chunk in chunks if chunk.state is not None]
    return Batch(input_ids, position_ids, rows, AttentionMetadata(packed, slot_mapping, block_size), states)


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    """Where K and V of its rows go."""
    blocks = chunk.block_table[chunk.start // block_size :].tolist()
    slots = [slot for block in blocks for slot in range(block * block_size, (block + 1) * block_size)]
    return slots[chunk.start % block_size :][: chunk.count]


@dataclass(frozen=True, slots=True)
class Backend:
    """What a device has in place of transformers' modules, and of its whole forward."""

    kernels: Kernels
    find_stack: Callable[[RawKeyModel, Sequence[nn.Module], Sequence[str | None]], Stack | None]


BACKENDS = {
    "cpu": Backend(cpu_kernels.KERNELS, cpu_stack.find_stack),
    "cuda": Backend(cuda_kernels.KERNELS, cuda_stack.find_stack),
}
"""The backends by type of device. On any other device transformers' modules run as they are."""


class Model:
    """Runs batches. Not thread-safe: one engine thread owns it.

    Attributes:
        attention: of the model's device, over the cache's keys.
        layers: attention layers in order, with shapes and rotary groups.
        rotaries: rotary group → the embedding as trained.
        recurrent: modules that keep a state of a sequence beside keys and values.
        eos_token_ids: tokens that end a reply. From the model's own configs, until `load_engine` knows them all.
        stack: runs whole steps, where the model has the shape for it: of few rows on the CPU, any on CUDA.
    """

    def __init__(
        self,
        transformers_model: Any,
        backend: Backend | None = None,
        ranks: Ranks = ALONE,
        layer_methods: LayerMethods = MappingProxyType({}),
    ) -> None:
        """backend: that of the model's device, unless another is given. ranks: it holds a share of each.

        layer_methods: what `auto` is in some of the layers. ConfigurationError where it has no such layers.
        """
        self.raw = RawKeyModel(transformers_model, ranks)
        self.device: torch.device = self.raw.model.device
        self.attention = attention_on(self.device)
        self.recurrent = find_recurrent(self.raw)
        self.layers, self.rotaries = _parted(*inspect_layers(self.raw, self.recurrent), layer_methods)
        backend = backend or BACKENDS.get(self.device.type)
        self.stack = None if backend is None else self._hasten(backend)
        self._place = {layer.module: place for place, layer in enumerate(self.layers)}
        named = getattr(self.raw.model.generation_config, "eos_token_id", None)
        named = getattr(self.raw.text_config, "eos_token_id", None) if named is None else named
        self.eos_token_ids = frozenset([named] if isinstance(named, int) else named or ())

    def _hasten(self, backend: Backend) -> Stack | None:
        """Give modules the forwards of their device; the stack, if the whole has one."""
        attentions = [layer.module for layer in self.layers]
        for module, forward in list(fast_modules(self.raw, backend.kernels)):
            self.raw.replace_forward(module, forward)
        for module, forward in list(plain_layers(self.raw, attentions)):
            self.raw.replace_forward(module, forward)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # merged weights have left holes, which are the cache's from now on
        plain = [one.order is None and one.shape.key_dim == one.shape.value_dim for one in self.layers]
        if self.recurrent or not all(plain):
            return None
        return backend.find_stack(self.raw, layers_of(self.raw, attentions), [layer.group for layer in self.layers])

    @contextmanager
    def layer_by_layer(self) -> Iterator[None]:
        """Inside, no stack runs: hooks see what enters and leaves each module."""
        stack, self.stack = self.stack, None
        try:
            yield
        finally:
            self.stack = stack

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.raw.model.dtype
        return dtype

    @property
    def states(self) -> tuple[StateShape, ...]:
        """The shapes of one sequence's states, in all layers that keep any."""
        return tuple(shape for layer in self.recurrent for shape in layer.shapes)

    @property
    def vocab_size(self) -> int:
        head = self.raw.model.get_output_embeddings()
        return int(getattr(head, "whole_features", head.weight.shape[0]))

    @torch.inference_mode()
    def forward(self, batch: Batch, storage: KVStorage, out: Tensor | None = None) -> Tensor:
        """Store the batch's K and V, and return logits [N, V] fp32 of its `logit_rows`; written to `out` if given."""
        metadata, attention = batch.metadata, self.attention
        if storage.bounds is not None:
            storage.bounds.forget(metadata.slot_mapping)
            storage.bounds.prepare(metadata.sequences)
            metadata.bounds = storage.bounds

        def attend(place: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
            storage.store(place, key, value, metadata.slot_mapping)
            return attention(query, storage.keys[place], storage.values[place], metadata, options)

        def attend_in(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
            place = self._place[module]
            layer = self.layers[place]
            return attend(place, *layer.arrange(query, key, value), call.options(layer.group))

        if self.stack is not None:
            logits = self.stack.logits(batch, storage, attend)
        else:
            states = running(StepStates(metadata.sequences, batch.states, storage)) if self.recurrent else nullcontext()
            with states:
                logits = self.raw.forward(batch.input_ids, batch.position_ids, batch.logit_rows, attend_in)
        return logits.float() if out is None else out.copy_(logits)


def load_model(
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    report: Callable[[str], None],
    quantization: Quantization = "none",
    ranks: Ranks = ALONE,
    layer_methods: LayerMethods = MappingProxyType({}),
) -> Model:
    """Weights from a local folder or a hub id, this rank's share of them, on one device; the rest as in `Model`.

    ConfigurationError names what is wrong.
    """
    from transformers.utils import logging

    chosen_device = choose_device(device, ranks)
    check_quantization(quantization, chosen_device)
    logging.disable_progress_bar()
    report(f"loading {checkpoint.name}")
    model = load_weights(checkpoint, dtype, report)
    if not ranks.alone:
        report(share_out(model, ranks))
    model = model.to(chosen_device)
    if chosen_device.type == "cuda":
        torch.cuda.set_device(model.device)  # of this thread: where events, graphs and their streams are made
    if quantization != "none":
        report(quantize(model))
    if chosen_device.type == "cpu":
        settle(model)
    report(f"inspecting {model.config.model_type}, {model.config.get_text_config().num_hidden_layers} layers")
    return Model(model, ranks=ranks, layer_methods=layer_methods)


def _parted(
    layers: list[RawKeyLayer], rotaries: dict[str, Rotary], methods: LayerMethods
) -> tuple[list[RawKeyLayer], dict[str, Rotary]]:
    """Layers with methods of their own in groups of their own."""
    try:
        groups, parts = parted([layer.group for layer in layers], rotaries, methods)
    except MethodError as error:
        raise ConfigurationError(str(error)) from error
    return [replace(layer, group=group) for layer, group in zip(layers, groups, strict=True)], parts


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """auto is the first CUDA device, else the CPU; of several ranks each has the GPU of its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not ranks.alone and torch.cuda.is_available():
        return torch.device("cuda", ranks.rank)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"DEVICE is {name}, but torch sees no CUDA device; use DEVICE=cpu or auto")
    return torch.device(name)


def own_positions(model: Model) -> ModelPositions:
    """The model as its config says, in the reading of transformers, which knows no chunks: what the probe compares."""
    rotaries = {group: replace(rotary, dual_chunk=None) for group, rotary in model.rotaries.items()}
    return resolve_model(RopeSpec(method="model"), rotaries, None)


def resolve(model: Model, spec: RopeSpec, max_model_len: int, error: Callable[[str], Exception]) -> ModelPositions:
    """A position method for this model; where it does not take it, `error` with the reason is raised."""
    try:
        return resolve_model(spec, model.rotaries, max_model_len)
    except MethodError as reason:
        raise error(str(reason)) from reason
