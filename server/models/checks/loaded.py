"""Whether what transformers loaded is the whole model of its checkpoint and nothing else, and made of numbers.

Each answer is a clause with the remedy, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from prerope.server.models.stored import some
from torch import nn

UNMERGED = re.compile(r"^(?:\x1b\[\d+m)*(\S.*?)\s*\|\s*(?:\x1b\[\d+m)*CONVERSION", re.MULTILINE)
"""In the table of transformers' loading report: a weight that it makes of several, as of all experts, and could not."""

QUANTISED = re.compile(r"scale|qweight|qzeros|g_idx|zero_point|absmax|quant_map|quant_state|weight_packed|lora_[AB]")
"""In names of tensors without which the weights beside them mean something else."""

FORMER_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(bias|masked_bias)$")
"""What old checkpoints store of tables and masks, which transformers makes itself today."""

NEXT_TOKEN_LAYER = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|nextn)")
"""Of a layer past the last: one that predicts a second token (multi-token prediction), which nothing here runs."""

EVEN = "hold one number throughout"
MOST_OF_A_WEIGHT, LEAST_OF_A_WEIGHT = 1e12, 1e-30
"""Beyond what any training leaves; bytes of something else, read as floating-point numbers, mostly are."""


def incomplete(report: dict[str, Any], unneeded: tuple[str, ...] = ()) -> str | None:
    """What transformers would have drawn at random, from its loading report; None where the checkpoint has it all.

    unneeded: how the names of weights begin that are left out anyway.
    """
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unneeded))
    if missing:
        return (
            f"the checkpoint lacks {len(missing)} weights that its config asks for: {some(missing)}. The download is "
            "incomplete, or config.json is another model's; take both again, from one source"
        )
    mismatched = sorted(
        (name, tuple(stored), tuple(expected))
        for name, stored, expected in report["mismatched_keys"]
        if not name.startswith(unneeded)
    )
    fewer = [
        (name, stored, expected) for name, stored, expected in mismatched if _lacks_experts(name, stored, expected)
    ]
    if fewer and len(fewer) == len(mismatched):
        counts = [f"{name} of {stored[0]} of {expected[0]}" for name, stored, expected in fewer]
        return (
            f"the checkpoint lacks weights of experts: it has {some(counts)}. The download is incomplete, or "
            "config.json is another model's; take both again, from one source"
        )
    if mismatched:
        shapes = [f"{name} is {list(stored)}, not {list(expected)}" for name, stored, expected in mismatched]
        return (
            f"{len(shapes)} weights have another shape than its config says: {some(shapes)}. config.json is another "
            "model's, or the weights are packed by a scheme that it does not name; take both again, from one source"
        )
    return None


def _lacks_experts(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a table of all experts was made of fewer, the router being of all."""
    return "experts" in name and stored[1:] == expected[1:] and stored[:1] < expected[:1]


def unmerged(table: str) -> str | None:
    """Weights that could not be made of the stored ones; None where the table of a loading report tells of none."""
    names = UNMERGED.findall(table)
    if not names:
        return None
    return (
        f"weights that are made of several stored ones, such as those of all experts, cannot be: {some(names)}. Some "
        "are missing, or have another shape than the others: the download is incomplete or damaged; run it again"
    )


def strange(model: nn.Module, unexpected: set[str]) -> str | None:
    """What the checkpoint holds of the decoder and the model class has no place for; None where nothing matters."""
    scales = sorted(name for name in unexpected if QUANTISED.search(name))
    if scales:
        return (
            f"the checkpoint holds {some(scales)}, which its config says nothing of: the weights are quantised or "
            "adapted by a scheme that would be ignored; take the original checkpoint"
        )
    stacks = {match[1] for name, _ in model.named_parameters() if (match := re.match(r"(.*?\.)\d+\.", name))}
    second_token = {_layer(name) for name in unexpected if NEXT_TOKEN_LAYER.search(name)}
    inside = sorted(
        name
        for name in unexpected
        if any(name.startswith(stack) for stack in stacks)
        and not FORMER_BUFFERS.search(name)
        and _layer(name) not in second_token
    )
    if inside:
        return (
            f"the checkpoint holds {len(inside)} weights that its config has no place for: {some(inside)}. config.json "
            "is another model's, or this version of transformers knows the architecture in part only"
        )
    return None


def _layer(name: str) -> str:
    """The name as far as its first number: `model.layers.61.` of `model.layers.61.eh_proj.weight`."""
    match = re.match(r".*?\.\d+\.", name)
    return match[0] if match else name


def no_numbers(model: Any, report: Callable[[str], None] = lambda _: None) -> str | None:
    """Weights that no training leaves behind: NaN, infinity or beyond; and all the same, as in a file that was made of
    zeros before its download began.

    report: gets a line where a few are so, as in layers that were made to do nothing.
    """
    bad, even, tables = [], [], 0
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        low, high = map(float, torch.aminmax(parameter.detach()))  # NaN goes through it; one pass, nothing allocated
        if not -MOST_OF_A_WEIGHT < low <= high < MOST_OF_A_WEIGHT:
            bad.append(name)
        if parameter.dim() > 1 and parameter.numel() > 1:
            tables += 1
            if high - low < LEAST_OF_A_WEIGHT:
                even.append(name)
    if bad:
        return (
            f"{len(bad)} of its weights hold NaN, infinity or numbers beyond {MOST_OF_A_WEIGHT:.0e}: {some(bad)}. The "
            "file is damaged: download it again"
        )
    ends = {id(getattr(one, "weight", None)) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    vital = [name for name, parameter in model.named_parameters() if name in even and id(parameter) in ends]
    if vital or 2 * len(even) > tables:
        return (
            f"{len(even)} of its {tables} tables of weights {EVEN}: {some(vital or even)}. The "
            "file is damaged, or its download was interrupted where it began as zeros: download it again"
        )
    if even:
        report(f"warning: {len(even)} of its {tables} tables of weights {EVEN}: {some(even)}; a file may be damaged")
    return None
