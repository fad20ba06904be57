"""LongRoPE's long factors, in a family whose rotary embedding leaves them unread.

Phi-3.5-MoE's asks transformers for frequencies without saying how long the prompt is, and so gets the short ones at any
length, where its makers' code, and every other family with LongRoPE, turns to the long ones past the trained length.
The embedding of this model object is told the length, so that the check compares with what the model was taught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from prerope.server.errors import ConfigurationError
from torch import Tensor, nn

ORIGINAL = "original_max_position_embeddings"


def read_long_factors(model: nn.Module) -> None:
    """Tell the length to every rotary embedding of `model` that was seen to leave long factors unread."""
    for module in model.modules():
        config = getattr(module, "config", None)
        parameters = getattr(config, "rope_parameters", None) or {}
        if type(module).__name__.endswith("RotaryEmbedding") and parameters.get("rope_type") == "longrope":
            original = parameters[ORIGINAL] = _trained_length(config)
            if getattr(config, ORIGINAL, original) is None:  # null here would be put there again
                setattr(config, ORIGINAL, original)
            if _leaves_them_unread(module, original):
                _tell_the_length(module)


def _trained_length(config: Any) -> int:
    """The trained length as transformers fills it in: beside the rotation, else in it, else the whole length."""
    given = (
        getattr(config, ORIGINAL, None),
        config.rope_parameters.get(ORIGINAL),
        getattr(config, "max_position_embeddings", None),
    )
    length = next((value for value in given if value is not None), None)
    if not isinstance(length, int | float) or length < 1:
        raise ConfigurationError(
            f"MODEL_ID: this model's rotation is LongRoPE's, and its config says {length!r} for {ORIGINAL}, past which "
            "the long factors begin: give the length in tokens that it was trained at first"
        )
    return int(length)


@torch.inference_mode()
def _leaves_them_unread(embedding: Any, original: int) -> bool:
    """Whether the angle of position 1 is the same in a prompt that ends past the trained length, and should not be."""
    parameters = embedding.config.rope_parameters
    if parameters["short_factor"] == parameters["long_factor"]:
        return False
    (short, long) = (_angles(embedding, last) for last in (1, original))
    return torch.allclose(short, long, atol=1e-5)


def _angles(embedding: Any, last: int) -> Tensor:
    """The angles of position 1 in a prompt whose last position is `last`."""
    device = next((buffer.device for buffer in embedding.buffers()), torch.device("cpu"))
    cos, sin = embedding(torch.zeros(1, 2, 1, device=device), torch.tensor([[1, last]], device=device))
    return torch.atan2(sin[0, 0], cos[0, 0])


def _tell_the_length(embedding: Any) -> None:
    own: Callable[..., Any] = embedding.rope_init_fn
    length = [0]

    def note(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions = options["position_ids"] if "position_ids" in options else arguments[1]
        length[0] = int(positions.max()) + 1

    def frequencies(config: Any, *arguments: Any, **options: Any) -> Any:
        return own(config, *arguments, **{"seq_len": length[0], **options})

    embedding.register_forward_pre_hook(note, with_kwargs=True)
    embedding.rope_init_fn = frequencies
