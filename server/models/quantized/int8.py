"""Weights in int8 by torchao, with a scale for each output; activations keep their dtype (weight-only).

A weight becomes torchao's tensor, so transformers' own forward runs on it too, and the load-time probe compares ours
with that. Every linear layer is quantised but the output head, which often is the embedding, and whose errors would go
straight into the logits. Norms, embeddings, and experts that are no linear layers stay in the model's dtype.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from prerope.server.config import Quantization
from prerope.server.errors import ConfigurationError
from torch import Tensor, nn

INSTALL = "pip install 'torchao>=0.18,<0.19'"


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """ConfigurationError if weights cannot be quantised here: known before they are read."""
    if quantization == "none":
        return
    if device.type != "cpu":
        raise ConfigurationError(
            f"WEIGHT_QUANTIZATION is {quantization}, but the model runs on {device}: int8 weights are for the CPU. "
            "Use WEIGHT_QUANTIZATION=none, or DEVICE=cpu"
        )
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"WEIGHT_QUANTIZATION is {quantization}, but torchao is not installed. Run: {INSTALL}"
        ) from error


def quantize(model: Any) -> str:
    """Give a transformers model int8 weights, in place; what came of it, in words. Raises ConfigurationError."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigurationError(
            "WEIGHT_QUANTIZATION is int8, but the checkpoint is quantised already. Use WEIGHT_QUANTIZATION=none"
        )
    head = model.get_output_embeddings()
    before = _num_bytes(model)
    linears = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    _quantize(model, {id(linear) for linear in linears})
    _release_memory(model)
    after = _num_bytes(model)
    return f"{len(linears)} linear layers in int8: weights of {before / 2**20:.0f} MiB are {after / 2**20:.0f} MiB"


def _quantize(model: nn.Module, chosen: set[int]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # set_inductor_config would change torch's compiler for the whole process.
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), lambda module, _name: id(module) in chosen)


def _release_memory(model: nn.Module) -> None:
    """Let go of the checkpoint's file, which stays mapped as long as one tensor lies in it, and of freed memory.

    glibc keeps what torchao worked with: for a small model, as much as its weights.
    """
    for parameter in model.parameters():
        if int8_rows(parameter) is None:
            parameter.data = parameter.data.clone()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is a tensor of another type, such as torchao's, that only looks like a plain one."""
    return type(weight) not in (Tensor, nn.Parameter)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """A weight as `quantize` makes it: (data [features, in] int8, scales [features] fp32), contiguous; else None.

    The weight is data·scales[:, None] and nothing else happens in its product: torchao's tensors can also have zero
    points, and quantise or scale the activations.
    """
    data, scales, zero_points = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    if data is None or scales is None or data.dtype != torch.int8 or scales.dtype != torch.float32:
        return None
    if any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale")):
        return None
    symmetric = zero_points is None or not zero_points.any()
    fits = data.device.type == "cpu" and data.is_contiguous() and scales.shape == (len(data), 1)
    return (data, scales.view(-1)) if symmetric and fits else None


def _num_bytes(model: nn.Module) -> int:
    parts = (int8_rows(parameter) or (parameter,) for parameter in model.parameters())
    return sum(tensor.nbytes for tensors in parts for tensor in tensors)
