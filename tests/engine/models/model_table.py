"""What becomes of every decoder type that transformers has, tried on a tiny model; as a table in docs/models.md.

python -m tests.engine.models.model_table          # writes the page anew
python -m tests.engine.models.model_table llama    # one row of it
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from prerope.cache.blocks.states import StateRows
from prerope.cache.storage import KVStorage
from prerope.server.errors import ConfigurationError
from prerope.server.models.checks.probe import probe
from prerope.server.models.model import Chunk, Model, build_batch, own_positions
from prerope.server.models.raw_keys import REMEDY
from prerope.server.models.weights import unsuited
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.models.held_layers import layers_of, our_layers, stock_layers
from tests.engine.models.model_types import LENGTH, MODEL_TYPES, VOCABULARY, NoTinyModel, tiny_of_type

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
BLOCK_SIZE = 16
HEAD = """# Model types

Every type of transformers {version} that continues a text, those that see or hear beside it included. Each was tried on
a tiny random model of its own config class: served, and then equal to transformers' own logits below and beyond
every length that the config names, in fp32 and bf16, in one piece, in chunks of 7 and one token at a time; or refused,
and why. Where there are experts, whose choice hangs on rounding, each layer is compared by itself in bf16, on what
entered transformers' own. Whether a checkpoint is served is found out anew at every start, on its own weights. Made by
`python -m tests.engine.models.model_table`, held by tests/engine/models/test_model_types.py.

Two methods differ from transformers on purpose, past the trained length L alone. Of a config with `longrope` or
`dynamic`, transformers reads all rows of a prompt by its whole length, so that a row is another one in every chunk and
after every token. Here a row is read by its own length: rows up to L keep the short factors, or the base. Replies of
such a model to prompts beyond L are not transformers'.

"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a type: served, refused, or untried, and the reason."""

    outcome: str
    reason: str = ""


def logits(model: Model, ids: list[int], chunk: int) -> Tensor:
    """[T, V] of a prompt read `chunk` tokens at a time, through a cache of the model's dtype."""
    positions = own_positions(model)
    blocks = list(range(-(-len(ids) // BLOCK_SIZE)))[::-1]
    shapes = [layer.shape for layer in model.layers]
    storage = KVStorage(shapes, len(blocks), BLOCK_SIZE, model.dtype, model.device, model.states, 1)
    found = []
    for start in range(0, len(ids), chunk):
        part, state = ids[start : start + chunk], StateRows(0 if start else None, 0) if model.recurrent else None
        batch = build_batch(
            [Chunk.of(part, start, blocks, positions, len(part), state=state)], BLOCK_SIZE, model.device
        )
        found.append(model.forward(batch, storage))
    return torch.cat(found)


def row_errors(ours: Tensor, expected: Tensor) -> Tensor:
    """[T]: of each row, the rms difference over the expected rms."""
    ours, expected = (x.masked_fill(x < -1e9, 0) for x in (ours, expected))  # tokens that are ruled out
    return (ours - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()


@torch.inference_mode()
def stock_logits(transformers_model: Any, ids: list[int]) -> Tensor:
    with as_people_run_it(transformers_model, len(ids)):
        output: Tensor = transformers_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return output


@contextmanager
def as_people_run_it(transformers_model: Any, length: int) -> Iterator[None]:
    """Inside, MPT makes its biases farther than it was trained, and Falcon counts its own once, as by default."""
    config, changed = transformers_model.config, dict[str, Any]()
    if config.model_type == "mpt":
        changed["max_seq_len"] = max(length, config.max_seq_len)
    if config.model_type == "falcon" and config.alibi:
        changed["_attn_implementation"] = "sdpa"
    before = {name: getattr(config, name) for name in changed}
    for name, value in changed.items():
        setattr(config, name, value)
    yield
    for name, value in before.items():
        setattr(config, name, value)


def prompt_for(model_type: str, transformers_model: Any) -> list[int]:
    """Beyond every length of its config; as long as it knows positions, where it knows so many only."""
    del model_type
    known = Model(transformers_model).raw.reach
    length = LENGTH * 3 // 2 if known is None else known
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def examine(model_type: str, **config: Any) -> Verdict:
    """Raises AssertionError where a type passes the check and is served wrongly."""
    if reason := unsuited(_some_config(model_type)):
        return Verdict("refused", f"it {reason}")
    try:
        transformers_model = tiny_of_type(model_type, **config)
    except NoTinyModel as reason:
        return Verdict("untried", str(reason))
    try:
        ids = prompt_for(model_type, transformers_model)
        transformers_model = tiny_of_type(model_type, **config)
        expected = stock_logits(transformers_model, ids)
        model = Model(transformers_model)
        probe(model)
    except ConfigurationError as refusal:
        return Verdict(
            "refused", re.sub(r"^model type '.*?' cannot be served: ", "", str(refusal)).removesuffix(f". {REMEDY}")
        )
    for chunk in (len(ids), 7, 1):
        worst = float(row_errors(logits(model, ids, chunk), expected).max())
        assert worst < 1e-3, f"{model_type}: {worst:.2g} in chunks of {chunk}, fp32"
    _examine_bf16(tiny_of_type(model_type, **config).bfloat16(), ids)
    return Verdict("served")


def _some_config(model_type: str) -> Any:
    """Its defaults, or the class that has them, where they are not one model's."""
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:  # transformers' own defaults may disagree with each other
        return CONFIG_MAPPING[model_type]


def _examine_bf16(transformers_model: Any, ids: list[int]) -> None:
    """Ours may be as far from fp32 as transformers' own bf16 is, by most rows; with experts, layer by layer."""
    if any("expert" in name for name, _ in transformers_model.named_modules()):
        _examine_layers(transformers_model, ids)
        return
    theirs = stock_logits(transformers_model, ids)
    expected = stock_logits(transformers_model.float(), ids)
    model = Model(transformers_model.bfloat16())
    probe(model)
    allowed = 2 * float(row_errors(theirs, expected).median()) + 1e-2
    for chunk in (len(ids), 7, 1):
        median = float(row_errors(logits(model, ids, chunk), expected).median())
        assert median < allowed, (
            f"{model.raw.family}: {median:.2g} in chunks of {chunk}, bf16; {allowed:.2g} is rounding"
        )


def _examine_layers(transformers_model: Any, ids: list[int]) -> None:
    """Each layer, and the logits, on what entered it in transformers' own bf16 forward."""
    layers = layers_of(transformers_model)
    with as_people_run_it(transformers_model, len(ids)):
        entered, theirs = stock_layers(transformers_model, ids, layers, {})
        widened = {layer: hidden.float() for layer, hidden in entered.items()}
        _, expected = stock_layers(transformers_model.float(), ids, layers, widened)
    model = Model(transformers_model.bfloat16())
    probe(model)
    for chunk in (len(ids), 7, 1):
        found = our_layers(model, ids, chunk, layers, entered)
        for place, (ours, stock, exact) in enumerate(zip(found, theirs, expected, strict=True)):
            median, allowed = (float(row_errors(one, exact).median()) for one in (ours, stock))
            where = f"layer {place} of {len(layers)} in chunks of {chunk}"
            assert median < 1.5 * allowed + 2e-3, (
                f"{model.raw.family}: {where}, bf16: {median:.2g} beside {allowed:.2g}"
            )


def table(verdicts: dict[str, Verdict]) -> str:
    """The whole page."""
    lines = ["| type | | reason |", "|---|---|---|"]
    for model_type, verdict in verdicts.items():
        reason = verdict.reason.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {model_type} | {verdict.outcome} | {reason} |")
    counts = {outcome: sum(v.outcome == outcome for v in verdicts.values()) for outcome in OUTCOMES}
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return HEAD.format(version=metadata.version("transformers")) + f"{told}.\n\n" + "\n".join(lines) + "\n"


OUTCOMES = ("served", "refused", "untried")


def read_table(page: str) -> dict[str, Verdict]:
    """The verdicts of such a page."""
    rows = re.findall(r"^\| ([\w.-]+) \| (\w+) \| (.*) \|$", page, re.MULTILINE)
    return {model_type: Verdict(outcome, reason.replace("\\|", "|")) for model_type, outcome, reason in rows}


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = read_table(PAGE.read_text(encoding="utf-8"))
    for name in sys.argv[1:] or MODEL_TYPES:
        print(name, file=sys.stderr)
        found[name] = examine(name)
    PAGE.write_text(table({name: found[name] for name in MODEL_TYPES}), encoding="utf-8")
