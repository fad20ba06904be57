"""Layers of a model one by one, each on what entered it in transformers' own bf16 forward: rounding cannot add up.

Where there are experts, another rounding chooses another expert now and then, and every later row that reads such a
row is another one, too: how far two forwards are apart is chance then. On the same inputs a flip stays in its layer and
row.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from prerope.cache.blocks.states import StateRows
from prerope.cache.storage import KVStorage
from prerope.server.models.checks.trials import layer_inputs, layer_outputs
from prerope.server.models.model import Chunk, Model, build_batch, own_positions
from torch import Tensor, nn

BLOCK_SIZE = 16

Layers = list[nn.Module]


def layers_of(transformers_model: Any) -> Layers:
    """Of all stacks in which there is attention, in order."""
    attentions = Model(copy.deepcopy(transformers_model)).layers
    modules: dict[str, Any] = dict(transformers_model.named_modules())
    stacks = dict.fromkeys(re.sub(r"\.\d+\..*", "", attention.name) for attention in attentions)
    return [layer for stack in stacks for layer in modules[stack]]


@torch.inference_mode()
def stock_layers(
    transformers_model: Any, ids: list[int], layers: Layers, held: Mapping[nn.Module, Tensor]
) -> tuple[dict[nn.Module, Tensor], list[Tensor]]:
    """What entered each layer, and what left it [T, hidden]; the logits come last. held: what enters instead."""
    entered, left = dict[nn.Module, Tensor](), dict[nn.Module, Tensor]()
    with layer_inputs(layers, entered, held), layer_outputs(layers, left):
        logits = transformers_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return entered, [*(left[layer][0].float() for layer in layers), logits.float()]


@torch.inference_mode()
def our_layers(
    model: Model, ids: list[int], chunk: int, layers: Layers, held: Mapping[nn.Module, Tensor]
) -> list[Tensor]:
    """What leaves each of our layers in chunks of a prompt, and the logits, through a cache of the model's dtype."""
    positions = own_positions(model)
    blocks = list(range(-(-len(ids) // BLOCK_SIZE)))[::-1]
    shapes = [layer.shape for layer in model.layers]
    storage = KVStorage(shapes, len(blocks), BLOCK_SIZE, model.dtype, model.device, model.states, 1)
    found: list[list[Tensor]] = []
    for start in range(0, len(ids), chunk):
        part, state = ids[start : start + chunk], StateRows(0 if start else None, 0) if model.recurrent else None
        batch = build_batch(
            [Chunk.of(part, start, blocks, positions, len(part), state=state)], BLOCK_SIZE, model.device
        )
        left = dict[nn.Module, Tensor]()
        inputs = {layer: entered[:, start : start + chunk] for layer, entered in held.items()}
        with model.layer_by_layer(), layer_inputs(layers, {}, inputs), layer_outputs(layers, left):
            logits = model.forward(batch, storage)
        found.append([*(left[layer].flatten(0, -2).float() for layer in layers), logits])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
