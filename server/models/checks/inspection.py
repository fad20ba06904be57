"""What each attention layer of a model does with positions, found by trying rather than by a list of families.

The probe prompt is run with cos = 1 and sin = 0, then again with one rotary group turned by a quarter (cos = 0,
sin = 1), each layer's input held fixed. A layer belongs to the group whose turn changes its keys, and the change must
be exactly that quarter turn, in the half or in the interleaved pairing: a norm after the rotation shows here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from prerope.rope.frequencies import ALIBI, Rotary, unrotated
from prerope.server.errors import first_line, words_of
from prerope.server.models.attention.interface import OWN_MASK
from prerope.server.models.checks.counting import counts_from_zero, counts_positions
from prerope.server.models.checks.hooks import hooked
from prerope.server.models.checks.masks import check_mask
from prerope.server.models.checks.numbers import check_numbers
from prerope.server.models.checks.trials import (
    PROBE_LENGTH,
    Seen,
    mixed,
    probe_ids,
    run_trial,
)
from prerope.server.models.checks.turning import RawKeyLayer, Turning, as_found, find_turning, raw_key_layer
from prerope.server.models.raw_keys import RawKeyModel, cannot_serve
from prerope.server.models.recurrent.finding import attends_on_its_own, keeps_states
from prerope.server.models.recurrent.layers import RecurrentLayer
from torch import Tensor, nn

LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length")
COUNTS = "it counts positions itself, so a chunk of a prompt cannot be told where in the prompt it is"
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""Of a forward that is not what it is taken for."""

BLOOM_LENGTH = 2048
"""What BLOOM was trained at, which most of its configs do not say."""


def inspect_layers(
    raw: RawKeyModel, recurrent: Collection[RecurrentLayer] = ()
) -> tuple[list[RawKeyLayer], dict[str, Rotary]]:
    """Attention layers in call order, and group → rotary embedding as trained.

    recurrent: modules whose states are kept, so that they may take something from one token to the next.

    Raises ConfigurationError, with the model type and the reason, for a model that cannot be served from raw keys.
    """
    reason = _refusal(raw.model.config)
    if reason is not None:
        raise cannot_serve(raw, reason)
    base = first_run(raw)
    check_numbers(raw, base)
    for seen in base:
        check_mask(raw, seen)
    if not base and keeps_states(raw):
        raise cannot_serve(raw, "none of its layers attends: it keeps recurrent states alone, and no keys")
    _check_rows(raw, base)
    _check_count(raw, base, recurrent)
    _check_first_position(raw)
    if counts_positions(raw, base):
        raise cannot_serve(raw, COUNTS)
    names = {module: name for name, module in raw.model.named_modules()}
    turnings, groups, rotaries = _turn_each_group(raw, base, names)
    layers = [
        raw_key_layer(
            seen.module,
            names[seen.module],
            groups.get(seen.module),
            seen.key,
            seen.value,
            turnings.get(seen.module),
        )
        for seen in base
    ]
    _drop_rotation(raw, base)
    return layers, rotaries


def inputs_of(base: list[Seen]) -> dict[nn.Module, Tensor]:
    """What entered attention modules, to be held in another trial run."""
    return {seen.module: seen.inputs for seen in base if seen.inputs is not None}


def _drop_rotation(raw: RawKeyModel, base: list[Seen]) -> None:
    """Take the rotary arithmetic out of attention where queries and keys then are what they were."""
    raw.drop_rotation(seen.module for seen in base)
    without = run_trial(raw, inputs_of(base))
    for was, now in zip(base, without, strict=True):
        if not torch.equal(was.key, now.key) or not torch.equal(was.query, now.query):
            raw.keep_rotation(was.module)


def first_run(raw: RawKeyModel) -> list[Seen]:
    """A trial run with masks as rules. Whatever it raises is a family that does something of its own."""
    try:
        with raw.showing_masks():
            return run_trial(raw, {})
    except FAILURES as error:
        if "MaskRule" in str(error):
            raise cannot_serve(raw, OWN_MASK) from error
        raise cannot_serve(raw, _why_it_does_not_run(error)) from error


def _why_it_does_not_run(error: Exception) -> str:
    said = first_line(error)
    if missing := re.search(r"missing \d+ required .*argument.*?: (.*)", said):
        return f"its forward needs {missing[1]} beside tokens"
    if re.search("pixel_values|image_|input_features", said):
        return f"its forward needs more than tokens ({said})"
    reason = f" ({words})" if (words := words_of(error)) else ""
    return (
        f"transformers' own forward of it fails on a prompt of tokens alone{reason}; where its type is one that is "
        "served, its config.json is another model's, or damaged"
    )


def _check_first_position(raw: RawKeyModel) -> None:
    """Refuse a model whose own forward, where nobody says positions, does not begin at 0: it would be read askew."""
    try:
        if not counts_from_zero(raw):
            raise cannot_serve(raw, "where it counts positions itself, it does not begin at 0, as chunks do")
    except FAILURES as error:
        raise cannot_serve(raw, _why_it_does_not_run(error)) from error


def _check_rows(raw: RawKeyModel, base: list[Seen]) -> None:
    """Refuse a model that takes something from one token to the next beside keys and values.

    In a trial run attention gives every row its own value, so another first token must change no other row.
    """
    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    other = ids.clone()
    other[0] = (other[0] + 1) % raw.text_config.vocab_size
    again = run_trial(raw, {}, other)
    calls = zip(base, again, strict=True)
    if not base or any(mixed(was.key[1:], now.key[1:]) or mixed(was.value[1:], now.value[1:]) for was, now in calls):
        raise cannot_serve(raw, _mixing_module(raw, ids, other))


def _mixing_module(raw: RawKeyModel, ids: Tensor, other: Tensor) -> str:
    """The innermost module whose rows depend on another row, or the attention that it is in, as a reason."""
    names = {module: name for name, module in raw.model.named_modules()}
    alone = attends_on_its_own(raw)
    if alone is not None:
        return (
            f"{names[alone]} attends in code of its own and not through transformers' attention interface"
            f"{_alibi(raw)}, so its keys cannot be kept raw"
        )
    before, after = (_every_output(raw, prompt) for prompt in (ids, other))
    for (module, was), (_, now) in zip(before, after, strict=True):
        if mixed(was[:, 1:], now[:, 1:]):
            where = names[module]
            break
    else:
        return "none of its layers attends through transformers' attention interface"
    return (
        f"{where} takes something from earlier tokens in code of its own: neither through transformers' attention "
        "interface nor as a state in transformers' cache, so a chunk of a prompt cannot be given it"
    )


def _alibi(raw: RawKeyModel) -> str:
    """A remark on models whose scores have a bias by distance."""
    entries = [vars(raw.text_config), vars(getattr(raw.text_config, "attn_config", None) or object)]
    told = [entry["alibi"] for entry in entries if isinstance(entry.get("alibi"), bool)]
    builds = any("alibi" in name for name in vars(sys.modules[type(raw.model).__module__]))
    return ", with a bias by distance (ALiBi) on its scores" if (any(told) if told else builds) else ""


def _every_output(raw: RawKeyModel, ids: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """What modules give in a trial run, inner ones first, where it has a row a token: [1, T, …]."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def hook(module: nn.Module, _arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.shape[:2] == (1, PROBE_LENGTH) and first.is_floating_point():
            outputs.append((module, first.clone()))

    with hooked(module.register_forward_hook(hook) for module in raw.model.modules()):
        run_trial(raw, {}, ids)
    return outputs


def _check_count(raw: RawKeyModel, base: list[Seen], recurrent: Collection[RecurrentLayer]) -> None:
    expected, modules = raw.text_config.num_hidden_layers, {seen.module for seen in base}
    if len(base) > len(modules):
        raise cannot_serve(
            raw,
            f"its {len(modules)} attention layers attend {len(base)} times in a forward, and here each attends once",
        )
    if len(base) != expected and not recurrent:
        raise cannot_serve(
            raw,
            f"on a prompt of text {len(base)} of its {expected} layers attend through transformers' attention "
            "interface, and the others attend to something else, or in code of their own",
        )


def _turn_each_group(
    raw: RawKeyModel, base: list[Seen], names: Mapping[nn.Module, str]
) -> tuple[dict[nn.Module, Turning], dict[nn.Module, str], dict[str, Rotary]]:
    turnings: dict[nn.Module, Turning] = {}
    groups: dict[nn.Module, str] = {}
    rotaries: dict[str, Rotary] = {}
    held = inputs_of(base)
    for module_name, identity in raw.identities.items():
        for layer_type in list(identity.turns):
            group = layer_type or (module_name if len(raw.identities) > 1 else "")
            identity.set_turn(layer_type, 0.0, 1.0)
            turned = run_trial(raw, held)
            identity.set_turn(layer_type, 1.0, 0.0)
            for before, after in zip(base, turned, strict=True):
                if torch.equal(before.key, after.key):
                    continue
                turning = find_turning((before.query, before.key), (after.query, after.key))
                if turning is None:
                    raise cannot_serve(
                        raw,
                        f"{names[before.module]} does more to queries and keys than rotate them, for example a norm "
                        "after the rotation",
                    )
                turnings[before.module], groups[before.module] = turning, group
                rotaries[group] = as_found(
                    _rotary(raw, layer_type, before.key.shape[-1]),
                    turning,
                    before.key.shape[-1],
                    identity.original,
                    layer_type,
                )
    if not rotaries:
        return {}, {}, {"": _without_rotation(raw, base)}
    return turnings, *_merged(raw, groups, rotaries)


def _without_rotation(raw: RawKeyModel, base: list[Seen]) -> Rotary:
    """Layers of a model without rotation: positions are in the embeddings, or scores fall with the distance."""
    named = (getattr(raw.text_config, name, None) for name in LENGTH_NAMES)
    said = next((length for length in named if length), None)
    if all(seen.call.slopes is not None for seen in base):
        return unrotated(base[0].key.shape[-1], said or BLOOM_LENGTH, ALIBI)
    reach = said if raw.identities else raw.reach
    if reach is None:
        raise cannot_serve(raw, "nothing in it turns, and its config does not say how many positions it knows")
    ids = torch.full((PROBE_LENGTH,), 7, device=raw.model.device)
    # Keys of one token: alike at one position, and at all where a rotary embedding is there that no layer uses.
    positions = torch.arange(PROBE_LENGTH) if raw.identities else torch.full((PROBE_LENGTH,), 3)
    (one, *_rest) = run_trial(raw, {}, ids, positions)
    if mixed(one.key[:1].expand_as(one.key), one.key):
        raise cannot_serve(raw, COUNTS)
    return unrotated(base[0].key.shape[-1], reach)


def _merged(
    raw: RawKeyModel, groups: dict[nn.Module, str], rotaries: dict[str, Rotary]
) -> tuple[dict[nn.Module, str], dict[str, Rotary]]:
    """Groups named by their module are one where their embeddings are equal; the only one is called ""."""
    first = {
        group: next(other for other, like in rotaries.items() if like == rotary and other in raw.identities)
        for group, rotary in rotaries.items()
        if group in raw.identities
    }
    alone = len(set(first.values())) == 1 and len(first) == len(rotaries)
    called = {group: "" if alone else first.get(group, group) for group in rotaries}
    return {module: called[group] for module, group in groups.items()}, {
        called[group]: rotary for group, rotary in rotaries.items()
    }


def _rotary(raw: RawKeyModel, layer_type: str, head_dim: int) -> Rotary:
    if not getattr(raw.text_config, "rope_parameters", None):
        raise cannot_serve(raw, "its config has no rope_parameters")
    nested = isinstance(raw.text_config.rope_parameters.get(layer_type), dict)
    rotary = Rotary.from_config(raw.text_config, layer_type if nested else None, head_dim=head_dim)
    if rotary.train_length < 1:
        raise cannot_serve(raw, f"its config says that it was trained on {rotary.train_length} tokens")
    return rotary


def _refusal(config: Any) -> str | None:
    """Why an architecture is known not to work; None when nothing is known against it."""
    text = config.get_text_config(decoder=True)
    if config.model_type == "paligemma":
        return (
            "a token of its prompt reads what follows it, too (a prefix language model), and here a token reads only "
            "what comes before it"
        )
    if getattr(text, "compress_rates", None):
        return (
            "some of its layers make one key of several tokens, and its values are turned with its keys: neither is a "
            "raw key and value of one token"
        )
    if str(text.model_type).startswith("hunyuan"):
        return "it normalises queries and keys after the rotation, and here keys are kept as they are before it"
    return None
