"""What a deployment or a request asks of the position method, before a model is known. A leaf: not even torch."""

from __future__ import annotations

from dataclasses import dataclass

METHOD_NAMES: tuple[str, ...] = (
    "auto",
    "model",
    "rope",
    "linear",
    "dynamic_linear",
    "ntk",
    "ntk_fixed",
    "ntk_mixed",
    "dynamic_ntk",
    "yarn",
    "dynamic_yarn",
    "longrope",
    "llama3",
    "proportional",
    "rerope",
    "leaky_rerope",
    "self_extend",
    "dynamic_leaky",
)
"""Every name that ROPE_METHOD takes, beside the aliases. `rope.methods` has one entry for each but the first two."""

ALIASES: dict[str, str] = {"offset": "rope", "pi": "linear", "leaky": "leaky_rerope"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """A method by name and the parameters given for it; None is the method's default.

    Attributes:
        method: one of `METHOD_NAMES` or `ALIASES`.
        factor: target length ÷ trained length (s), or dynamic_ntk's f.
        window: w, in tokens: keys nearer than this are read at their exact distance.
        leak: k, tokens past the window that count as one position (1/k is Leaky ReRoPE's slope).
        group: tokens that share a far position (Self-Extend's G).
        logn: scale row i's query by max(1, ln(i+1) / ln L).
        train_length: L, in tokens; None takes the model config's.
    """

    method: str = "auto"
    factor: float | None = None
    window: int | None = None
    leak: float | None = None
    group: int | None = None
    logn: bool = False
    train_length: int | None = None
