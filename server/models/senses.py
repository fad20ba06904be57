"""What sees and hears in a multimodal model, and what speaks, is left out: a text reaches its decoder alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SPEAKS = ("talker.", "token2wav.", "code2wav.")
"""Of weights that are of what speaks."""


def thinking_part(config: Any) -> Any:
    """The config of what reads and thinks, in a model that speaks beside it (Qwen Omni); else the config itself."""
    return getattr(config, "thinker_config", None) or config


def drop_other_senses(model: Any) -> list[str]:
    """Take what sees and hears out of a multimodal model, which a text never reaches; the names of what was taken.

    Embeddings of other senses stay: where ids of all senses are one vocabulary, a text's forward asks where it ends.
    """
    decoder = model.get_decoder()
    inner = getattr(model, "model", None)
    if model.config is model.config.get_text_config() or inner is None or decoder is inner:
        return []
    others = [
        name
        for name, child in inner.named_children()
        if not name.startswith("embed") and not any(module is decoder for module in child.modules())
    ]
    for name in others:
        setattr(inner, name, _LeftOut(decoder))
    return others


def of_senses(dropped: Sequence[str]) -> tuple[str, ...]:
    """How names of weights begin that are of what was taken out: a folder may come without them."""
    return tuple(f"model.{name}." for name in dropped)


class _LeftOut(nn.Identity):
    """In place of what was taken out: a forward may ask it where it lies, whatever it is given."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._decoder = [decoder]  # out of the module tree

    @property
    def device(self) -> torch.device:
        return next(self._decoder[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._decoder[0].parameters()).dtype


@contextmanager
def without_timm() -> Iterator[None]:
    """Inside, what sees by the package timm is made empty (Gemma 3n): it is left out anyway, and would need it."""
    from transformers import PreTrainedModel
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

    def empty(self: Any, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        PreTrainedModel.post_init(self)

    own = TimmWrapperModel.__init__
    TimmWrapperModel.__init__ = empty
    try:
        yield
    finally:
        TimmWrapperModel.__init__ = own


def unseen(model: Any, names: set[str]) -> set[str]:
    """The weights that nothing reads: of modules that speak, and of those that `without_timm` has emptied."""
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

    empty = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TimmWrapperModel))
    return {name for name in names if name.startswith((*SPEAKS, *empty))}
