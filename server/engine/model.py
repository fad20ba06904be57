"""The model: a transformers causal LM, our cache and attention under it. One forward of one `Batch`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cache.attention import paged_attention
from cache.storage import KVStorage
from rope.model_positions import ModelPositions, resolve_model
from rope.spec import RopeSpec
from server.engine.batch import Batch
from server.engine.config import Quantization
from server.engine.cpu_layers import layers_of, plain_layers
from server.engine.cpu_modules import fast_modules
from server.engine.cpu_stack import Stack, find_stack
from server.engine.inspection import inspect_layers
from server.engine.quantization import check_quantization, quantize
from server.engine.raw_keys import AttentionCall, RawKeyModel
from server.errors import ConfigurationError

if TYPE_CHECKING:
    from server.checkpoint import Checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Model:
    """Runs batches. Not thread-safe: one engine thread owns it.

    Attributes:
        layers: attention layers in order, with shapes and rotary groups.
        rotaries: rotary group → the embedding as trained.
        eos_token_ids: from the model's generation config.
        stack: what runs decode steps of few rows on the CPU, where the model has the shape for it.
    """

    def __init__(self, transformers_model: Any) -> None:
        self.raw = RawKeyModel(transformers_model)
        self.layers, self.rotaries = inspect_layers(self.raw)
        self.raw.drop_rotation(layer.module for layer in self.layers)
        if self.device.type == "cpu":
            for find in (fast_modules, self._plain_layers):
                for module, forward in list(find(self.raw)):
                    self.raw.replace_forward(module, forward)
        self.stack = self._find_stack() if self.device.type == "cpu" else None
        self._place = {layer.module: place for place, layer in enumerate(self.layers)}

    def _plain_layers(self, raw: RawKeyModel) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        return plain_layers(raw, [layer.module for layer in self.layers])

    def _find_stack(self) -> Stack | None:
        modules = layers_of(self.raw, [layer.module for layer in self.layers])
        return find_stack(self.raw, modules, [layer.group for layer in self.layers])

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.raw.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.raw.model.device
        return device

    @property
    def vocab_size(self) -> int:
        return int(self.raw.model.get_output_embeddings().weight.shape[0])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        eos = self.raw.model.generation_config.eos_token_id
        eos = self.raw.text_config.eos_token_id if eos is None else eos
        return frozenset([eos] if isinstance(eos, int) else eos or ())

    @torch.inference_mode()
    def forward(self, batch: Batch, storage: KVStorage) -> Tensor:
        """Store the batch's K and V, and return logits [N, V] fp32 of its `logit_rows`."""

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
            place = self._place[module]
            storage.store(place, key, value, batch.metadata.slot_mapping)
            options = call.options(self.layers[place].group)
            return paged_attention(query, storage.keys[place], storage.values[place], batch.metadata, options)

        logits = None if self.stack is None else self.stack.logits(batch, storage)
        if logits is None:
            logits = self.raw.forward(batch.input_ids, batch.position_ids, batch.logit_rows, attend)
        return logits.float()


def load_model(
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    report: Callable[[str], None],
    quantization: Quantization = "none",
) -> Model:
    """Weights from a local folder or a hub id, on one device. ConfigurationError names what is wrong.

    Only safetensors are read, and no code that comes with a checkpoint is run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    chosen_device = choose_device(device)
    check_quantization(quantization, chosen_device)
    logging.disable_progress_bar()
    report(f"loading {checkpoint.name}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.source,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            **_same_commit(checkpoint),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"MODEL_ID: {checkpoint.name!r} cannot be loaded: {_reason(error)}") from error
    model.eval().to(chosen_device)
    if quantization != "none":
        report(quantize(model))
    report(f"inspecting {model.config.model_type}, {model.config.get_text_config().num_hidden_layers} layers")
    return Model(model)


def _same_commit(checkpoint: Checkpoint) -> dict[str, str]:
    """The revision to read the weights at: the commit that the config is of, for a hub id.

    By a branch's name transformers would ask a public service to convert pickled weights, and load what it proposes.
    """
    from transformers.utils import cached_file, extract_commit_hash

    given = {"revision": checkpoint.revision} if checkpoint.revision else {}
    commit = extract_commit_hash(cached_file(checkpoint.source, "config.json", **given), None)
    return {"revision": commit} if commit else given


def _reason(error: Exception) -> str:
    """The first line of what transformers says, and the remedy where there are no weights that may be read."""
    if "model.safetensors" in str(error):
        return (
            "no safetensors are found there (or, without a network, in the hub's cache). Weights in pickle files, such "
            "as pytorch_model.bin, can run code when they are read, so they are refused; where you trust them, convert "
            "them once with transformers' save_pretrained, or choose a REVISION that has model.safetensors"
        )
    return str(error).strip().splitlines()[0].replace(os.path.expanduser("~"), "~")


def choose_device(name: str) -> torch.device:
    """auto is the first CUDA device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"DEVICE is {name}, but torch sees no CUDA device; use DEVICE=cpu or auto")
    return torch.device(name)


def own_positions(model: Model) -> ModelPositions:
    """The model as its config says: what the probe compares against transformers."""
    return resolve_model(RopeSpec(method="model"), model.rotaries, None)
