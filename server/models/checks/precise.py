"""A transformers model whose modules compute in fp32 for a while, on the same numbers: what low precision is held to.

Weights are widened when a module is called and let go after it, so that a large model is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from prerope.server.models.checks.hooks import hooked
from prerope.server.models.quantized.int8 import is_quantized
from torch import Tensor, nn


@contextmanager
def in_fp32(model: nn.Module, modules: Sequence[nn.Module] | None) -> Iterator[None]:
    """Inside, these modules take, compute and give fp32, but what they give is handed on in the model's dtype.

    With None it is the whole model, end to end. Rotary embeddings give fp32 either way: what they would round is read
    by attention alone.
    """
    rotaries = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    handles: list[Any] = []
    for root in [model] if modules is None else modules:
        for module in root.modules():
            if any(True for _ in module.parameters(recurse=False)):
                handles += _widened_while_called(module)
    for module in [*rotaries, *(modules or ())]:
        handles.append(module.register_forward_pre_hook(_widen_arguments, with_kwargs=True))
    if modules is not None:
        handles += [module.register_forward_hook(_narrow(next(module.parameters()).dtype)) for module in modules]
    with hooked(handles):
        yield


def _widened_while_called(module: nn.Module) -> list[Any]:
    """Hooks that give a module fp32 parameters of its own, and take them back.

    Its children's, too: one that has some itself (Mamba's) may read theirs without calling them.
    """
    kept: list[list[tuple[nn.Module, dict[str, Any]]]] = []

    def widen(module: nn.Module, _arguments: Any) -> None:
        kept.append([(owner, dict(owner._parameters)) for owner in (module, *module.children())])
        for owner, parameters in kept[-1]:
            for name, parameter in parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    owner._parameters[name] = nn.Parameter(_wide(parameter), requires_grad=False)

    def restore(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        for owner, parameters in kept.pop():
            owner._parameters.update(parameters)

    return [module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)]


def _wide(parameter: Tensor) -> Tensor:
    return parameter.dequantize().float() if is_quantized(parameter) else parameter.detach().float()


def _widen_arguments(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return tuple(map(_widen, arguments)), {name: _widen(value) for name, value in options.items()}


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) is tuple:
        return tuple(map(_widen, value))
    return {key: _widen(member) for key, member in value.items()} if type(value) is dict else value


def _narrow(dtype: torch.dtype) -> Any:
    def narrow(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return tuple(map(narrow, output)) if isinstance(output, tuple) else narrow(output)

    return hook
