"""A rank's share of a model's weights: by transformers' own plan, along whole KV heads, checked against the whole.

The plan (`base_model_tp_plan` of a family's config) says which layers are split by what they give (colwise) and which
by what they take (rowwise). What a rowwise layer gives is a part of a sum: it is summed over the ranks, which is the
one collective of a sublayer. Everything else is computed by every rank alike, and so are hidden states; the head's
logits are gathered.

Attention is split along KV heads, with the queries that read them: the plan's even split could cut through a head.
How many there are is seen in a trial run. Weights stay plain tensors, of which the devices' kernels know the address.

A plan is words, so it is held to what comes out: each sublayer on what entered it in the whole model, queries, keys and
values, and the logits. A family whose plan gives anything else is refused, by the name of the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.checks.inspection import first_run
from prerope.server.models.checks.trials import Seen, layer_inputs, layer_outputs, relative_difference, run_trial
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.models.recurrent.finding import find_recurrent
from prerope.server.ranks.group import Ranks, shares
from torch import Tensor, nn

SPLIT = frozenset(("colwise", "packed_colwise", "rowwise", "packed_rowwise"))
SUMMED = "moe_tp_experts"
WHOLE = frozenset(("replicated_with_grad_allreduce", "replicate", "local_params", "mla_kv_a_proj", "embedding_rowwise"))
"""What every rank keeps whole. The embedding too, whose split would cost a collective to save little."""

UNIT = 32
"""Features of an MLP are split in such steps, which the kernels want."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative, rms: of sums in another order, rounded once more. A wrong share is of order 1."""

Whole = Callable[[Tensor], Tensor]
_JOIN = "prerope_join"


def join_of(module: nn.Module) -> Whole | None:
    """What makes whole a result of this module's forward, of which this rank computes a share; None: it is whole.

    Calling the module makes it whole, too.
    """
    join: Whole | None = getattr(module, _JOIN, None)
    return join


def _join(module: nn.Module, join: Whole) -> None:
    setattr(module, _JOIN, join)
    module.register_forward_hook(lambda _module, _arguments, output: join(output))


def share_out(model: Any, ranks: Ranks) -> str:
    """Leave a transformers causal LM this rank's share of its weights; what came of it, in words.

    Raises ConfigurationError for a model that cannot be shared by so many.
    """
    plan = _plan(model, ranks)
    raw = RawKeyModel(model)
    if find_recurrent(raw):
        raise _refusal(raw, ranks, "it has layers that keep a state beside keys and values")
    heads = {seen.module: seen.key.shape[1] for seen in first_run(raw)}
    few = min(heads.values())
    if few < ranks.size:
        raise _refusal(raw, ranks, f"its attention has {few} heads of keys and values, and a rank needs one")
    whole = _record(raw, plan)
    _split(model, plan, heads, ranks)
    _check(raw, ranks, whole, _record(raw, plan, whole))
    raw.release()
    local = {len(share[ranks.rank]) for share in (shares(count, ranks.size) for count in heads.values())}
    attended = any(name in plan for module in heads for name in _names_in(model, module))
    shared = f"{'/'.join(map(str, sorted(local)))} of {few} heads of keys and values" if attended else "all keys"
    return f"rank {ranks.rank} of {ranks.size} computes with {shared}"


# --- the plan ---


@dataclass(frozen=True, slots=True)
class _Entry:
    """A module, or a parameter of one, and the style that the plan names for it."""

    owner: nn.Module
    parameter: str | None
    style: str

    @property
    def summed(self) -> bool:
        """Whether what this module gives is a part of a sum over the ranks."""
        return self.parameter is None and self.style in ("rowwise", "packed_rowwise", SUMMED)


def _plan(model: Any, ranks: Ranks) -> dict[str, _Entry]:
    """Full name → entry, of everything that the plan names. ConfigurationError where it says what is not known here."""
    styles: dict[str, str] = getattr(model, "tp_plan", None) or {}
    found = {}
    for name, module in model.named_modules():
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None:
            found[name] = _Entry(module, None, style)
    for name, _ in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None and name not in found:
            found[name] = _Entry(model.get_submodule(owner), attribute, style)
    raw_name = model.config.model_type
    head = model.get_output_embeddings()
    for name, entry in found.items():
        gathered_head = entry.owner is head and entry.style == "colwise_gather_output"
        if not gathered_head and entry.style not in SPLIT | WHOLE | {SUMMED}:
            raise ConfigurationError(
                f"TENSOR_PARALLEL_SIZE is {ranks.size}, but model type {raw_name!r} cannot be shared: transformers' "
                f"plan for {name} is {entry.style!r}, which needs more than one collective a sublayer; use 1"
            )
    if not any(entry.style == "rowwise" for entry in found.values()):
        raise ConfigurationError(
            f"TENSOR_PARALLEL_SIZE is {ranks.size}, but transformers has no plan to share model type {raw_name!r}; "
            "use 1, and more servers behind a router"
        )
    return found


def _names_in(model: Any, module: nn.Module) -> Iterator[str]:
    prefix = next(name for name, other in model.named_modules() if other is module)
    yield from (f"{prefix}.{name}" for name, _ in module.named_modules() if name)


def _refusal(raw: RawKeyModel, ranks: Ranks, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"TENSOR_PARALLEL_SIZE is {ranks.size}, but model type {raw.family!r} cannot be shared by so many: {reason}; "
        "lower it, or use 1 and more servers behind a router"
    )


# --- the split ---


def _split(model: Any, plan: dict[str, _Entry], heads: dict[nn.Module, int], ranks: Ranks) -> None:
    units = {child: count for module, count in heads.items() for child in module.modules()}
    head = model.get_output_embeddings()
    for entry in plan.values():
        if entry.owner is head:
            _split_head(head, ranks)
        elif entry.style in SPLIT:
            _split_entry(entry, units.get(entry.owner), ranks)
        if entry.summed:
            _join(entry.owner, ranks.sum)


def _split_entry(entry: _Entry, num_heads: int | None, ranks: Ranks) -> None:
    owner, dim = entry.owner, -2 if entry.style.endswith("colwise") else -1
    packed = entry.style.startswith("packed")
    names = [entry.parameter] if entry.parameter else [name for name, _ in owner.named_parameters(recurse=False)]
    for name in names:
        parameter = getattr(owner, name)
        if parameter.dim() == 1:  # a bias, or a number a head
            if dim == -2:
                _keep(owner, name, -1, _own(parameter.shape[-1], num_heads, ranks, packed=packed))
            elif ranks.rank:
                parameter.data = torch.zeros_like(parameter)  # of a sum it is added once
            continue
        _keep(owner, name, dim, _own(parameter.shape[dim], num_heads, ranks, packed=packed))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def _own(count: int, num_heads: int | None, ranks: Ranks, *, packed: bool) -> Tensor:
    """Which of so many features are this rank's: of whole heads, or in steps of `UNIT`; packed: of two halves each."""
    if packed:
        own = _own(count // 2, num_heads, ranks, packed=False)
        return torch.cat([own, own + count // 2])
    if num_heads is not None and count % num_heads == 0:
        unit, part = count // num_heads, shares(num_heads, ranks.size)[ranks.rank]
        return torch.arange(part.start * unit, part.stop * unit)
    unit = UNIT if count % UNIT == 0 and count // UNIT >= ranks.size else 1
    part = shares(count, ranks.size, unit)[ranks.rank]
    return torch.arange(part.start, part.stop)


@torch.no_grad()
def _keep(owner: nn.Module, name: str, dim: int, own: Tensor) -> None:
    parameter = getattr(owner, name)
    kept = parameter.detach().index_select(dim % parameter.dim(), own).contiguous()
    setattr(owner, name, nn.Parameter(kept, requires_grad=False))


def _split_head(head: Any, ranks: Ranks) -> None:
    """Its own rows of the vocabulary: of a tied head a view of the embedding, which stays whole."""
    parts = shares(head.weight.shape[0], ranks.size, UNIT)
    own, widths = parts[ranks.rank], [len(part) for part in parts]
    for name, parameter in list(head.named_parameters(recurse=False)):
        setattr(head, name, nn.Parameter(parameter.detach()[own.start : own.stop], requires_grad=False))
    head.out_features = len(own)
    head.whole_features = sum(widths)
    _join(head, lambda logits: ranks.gather(logits, widths))


# --- the check ---


@dataclass(slots=True)
class _Record:
    """A trial run: what entered and left sublayers and left the head, and attention's calls."""

    entered: dict[nn.Module, Tensor] = field(default_factory=dict)
    left: dict[nn.Module, Tensor] = field(default_factory=dict)
    calls: list[Seen] = field(default_factory=list)


def _record(raw: RawKeyModel, plan: dict[str, _Entry], held: _Record | None = None) -> _Record:
    """Record the sublayers whose outputs are summed over ranks; `held` is the run whose inputs they get."""
    parents = {child: parent for parent in raw.model.modules() for child in parent.children()}
    sublayers = list({parents[entry.owner]: None for entry in plan.values() if entry.summed})
    record, head = _Record(), raw.model.get_output_embeddings()
    inputs = {} if held is None else held.entered
    with layer_inputs(sublayers, record.entered, inputs), layer_outputs([*sublayers, head], record.left):
        record.calls = run_trial(raw, {})
    return record


def _check(raw: RawKeyModel, ranks: Ranks, whole: _Record, ours: _Record) -> None:
    """The share of a rank against the whole: ConfigurationError names the layer that differs."""
    names = {module: name for name, module in raw.model.named_modules()}
    names[raw.model.get_output_embeddings()] = "the logits"
    pairs = [(names[module], ours.left[module], left) for module, left in whole.left.items()]
    for was, now in zip(whole.calls, ours.calls, strict=True):
        name = names[was.module]
        pairs += [(f"{name}'s {what}", mine, theirs) for what, mine, theirs in _heads(was, now, ranks)]
    for name, mine, theirs in pairs:
        tolerance = TOLERANCE[theirs.dtype]
        error = relative_difference(mine, theirs)
        if not error <= tolerance:
            raise _refusal(
                raw,
                ranks,
                f"with transformers' plan {name} differ from the whole model's by {error:.2g} relative (at most "
                f"{tolerance:.2g} is rounding)",
            )


def _heads(was: Seen, now: Seen, ranks: Ranks) -> Sequence[tuple[str, Tensor, Tensor]]:
    """Queries, keys, values, sinks and slopes of this rank beside those heads of the whole model."""
    own = shares(was.key.shape[1], ranks.size)[ranks.rank]
    if now.key.shape[1] == was.key.shape[1]:  # attention is not in the plan
        own = range(was.key.shape[1])
    group = was.query.shape[1] // was.key.shape[1]
    queries = slice(own.start * group, own.stop * group)
    keys = slice(own.start, own.stop)
    found = [
        ("queries", now.query, was.query[:, queries]),
        ("keys", now.key, was.key[:, keys]),
        ("values", now.value, was.value[:, keys]),
    ]
    if was.call.sinks is not None and now.call.sinks is not None:
        found.append(("sinks", now.call.sinks, was.call.sinks[queries]))
    if was.call.slopes is not None and now.call.slopes is not None:
        found.append(("slopes", now.call.slopes, was.call.slopes[queries]))
    return found
