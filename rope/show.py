"""Seeing what a method does: the distance at which each query sees each key, and wavelengths, drawn to PNG.

    python -m prerope.rope.show rerope yarn:factor=8 dynamic_leaky --length 4096
    python -m prerope.rope.show auto --model path/to/model        (a folder or hub id: its config, not its weights)
    python -m prerope.rope.show --docs                            (writes METHODS.md and its figures beside this file)

Without `--model` the example is a model trained at 1024 with D = 64 and b = 10 000. A map's colour is the distance of
the slowest pair, which is the one that extrapolation breaks: red where it is one that training never showed, grey where
a key is not read at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from prerope.rope.frequencies import Rotary, plain
from prerope.rope.methods import method_table, resolve
from prerope.rope.model import FULL_ATTENTION
from prerope.rope.reading import UNBOUNDED, MethodError, PositionMethod, Reading
from prerope.rope.registry import MethodEntry
from prerope.rope.spec import ALIASES, RopeSpec
from torch import Tensor

FOLDER = Path(__file__).parent
EXAMPLE = Rotary(head_dim=64, dim=64, base=10000.0, rope_type="default", train_length=1024, max_length=1024)
GRID = 192  # rows and keys of a map
UNREAD = -1.0
OF_A_MODEL: dict[str, dict[str, Any]] = {
    "longrope": {"short_factor": [1.0] * 32, "long_factor": [1 + m / 8 for m in range(32)], "factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.25},
}
"""Config parameters of methods that only a trained model has, made up for the example."""

PREAMBLE = """# Position methods

Written by `python -m prerope.rope.show --docs` from the registry. L is the trained length, w the window, s the factor,
n the row length, d = i − j the distance from query i to key j. Pictures show a model trained at 1024, read to 4096: the
colour of (query, key) is the distance that the slowest pair of dims sees, red where training never showed it, grey
where the key is not read. All are chunk-invariant: a row is read by its own length, never by a chunk's or a batch's.

"""


def seen(method: PositionMethod, rows: Tensor, keys: Tensor, pair: int = -1) -> Tensor:
    """The distance at which a pair of dims of each row sees each key, in tokens as trained: [R, n] fp64.

    NaN for keys after the row, `UNREAD` for those that the method leaves out.
    """
    trained = method.rotary.base ** (-2.0 * (pair % (method.rotary.dim // 2)) / method.rotary.dim)
    distances = torch.full((len(rows), len(keys)), UNREAD, dtype=torch.float64)
    for reading, places in _by_reading(method, rows):
        at = rows[places]
        for part in reading.parts:
            angles = part.query.angles(at)[:, None, pair] - part.key.angles(keys)[None, :, pair]
            distances[places] = torch.where(part.reads(at, keys), angles / trained, distances[places])
    return distances.masked_fill(keys > rows[:, None], torch.nan)


def _by_reading(method: PositionMethod, rows: Tensor) -> list[tuple[Reading, Tensor]]:
    """(reading, indices of the rows that read so), each reading once."""
    readings = [method.reading_of(row) for row in rows.tolist()]
    places: dict[Reading, list[int]] = {}
    for place, reading in enumerate(readings):
        places.setdefault(reading, []).append(place)
    return [(reading, torch.tensor(indices)) for reading, indices in places.items()]


def draw(method: PositionMethod, length: int, path: Path) -> None:
    """The map of `length` rows and keys, and the wavelengths of the last row, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.0), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    positions = torch.linspace(0, length - 1, min(GRID, length)).long()
    colours = colormaps["viridis"].with_extremes(over="crimson", under="lightgrey", bad="white")
    image = left.imshow(
        seen(method, positions, positions).numpy(), cmap=colours, vmin=0, vmax=method.train_length,
        extent=(0, length, length, 0), interpolation="nearest",
    )  # fmt: skip
    figure.colorbar(image, ax=left, extend="max", label="distance seen")
    left.set(title=method.name, xlabel="key", ylabel="query")
    trained = plain(method.rotary.dim, method.rotary.base)
    right.plot(2 * torch.pi / trained.numpy(), "--", color="grey", label="as trained")
    for label, theta in _frequencies(method, length - 1):
        right.plot(2 * torch.pi / theta.masked_fill(theta == 0, torch.nan).numpy(), label=label)
    right.axhline(method.train_length, color="crimson", linewidth=0.8, label="trained length")
    right.set(yscale="log", title="wavelength", xlabel="dimension pair", ylabel="tokens")
    right.legend(fontsize="small")
    figure.savefig(path)


def _frequencies(method: PositionMethod, row: int) -> list[tuple[str, Tensor]]:
    """Labelled θ of the row's parts, each vector once; a part that does not turn keys has none."""
    found: list[tuple[str, Tensor]] = []
    for number, part in enumerate(method.reading_of(row).parts):
        theta = part.key.theta / (part.key.group if part.key.groups is None else part.key.groups)
        if not part.key.unrotated and not any(torch.equal(theta, other) for _, other in found):
            found.append((f"row {row}" + (", far" if number else ""), theta))
    return found


def describe(method: PositionMethod, length: int) -> str:
    """Resolved parameters and what follows from them, a line each."""
    last = method.reading_of(length - 1)
    facts: dict[str, Any] = {"method": method.name, "train_length": method.train_length} | method.parameters
    facts["attention_factor"] = round(last.attention_factor, 6)
    facts["farthest distance seen"] = round(float(_farthest(method, length)), 1)
    facts["rows that read plainly"] = "all" if method.plain_rows >= UNBOUNDED else method.plain_rows
    facts["slowest wavelength"] = round(float((2 * torch.pi / last.theta[last.theta > 0]).max()), 1)
    return "\n".join(
        f"{name:24} {value if isinstance(value, str) else json.dumps(value)}" for name, value in facts.items()
    )


def _farthest(method: PositionMethod, length: int) -> Tensor:
    """In tokens as trained, of the slowest pair that turns."""
    distances = seen(method, torch.tensor([length - 1]), torch.arange(length))
    return distances.nan_to_num().max()


# --- the page of all methods ------------------------------------------------------------------------------------------


def example(entry: MethodEntry) -> PositionMethod:
    """The method on the example model, read to four times its trained length."""
    rotary = EXAMPLE
    if entry.name in OF_A_MODEL:
        rotary = Rotary(64, 64, 10000.0, entry.name, 1024, 4096, OF_A_MODEL[entry.name])
    return resolve(RopeSpec(method=entry.name), rotary, 4096)


def page() -> str:
    """METHODS.md: every method with formula, parameters, picture, source and use."""
    return PREAMBLE + "\n".join(_section(entry) for entry in method_table())


def _section(entry: MethodEntry) -> str:
    takes = ", ".join(f"`ROPE_{name.upper()}`" for name in entry.takes) or "none"
    others = ", ".join(f"`{alias}`" for alias, name in ALIASES.items() if name == entry.name)
    called = f" (also {others})" if others else ""
    return (
        f"## `{entry.name}`{called}\n\n{entry.summary}\n\n- **When:** {entry.use}\n- **Parameters:** {takes}\n"
        f"- **Source:** {entry.source}\n\n![{entry.name}](figures/{entry.name}.png)\n"
    )


def write_docs() -> None:
    (FOLDER / "figures").mkdir(exist_ok=True)
    (FOLDER / "METHODS.md").write_text(page(), encoding="utf-8")
    for entry in method_table():
        draw(example(entry), 4096, FOLDER / "figures" / f"{entry.name}.png")


# --- the command ------------------------------------------------------------------------------------------------------


def rotary_of(model: str) -> Rotary:
    """From the config of a folder or hub id: its full-attention layers, where it has several kinds."""
    from transformers import AutoConfig

    (rotary,) = rotaries_of_config(
        AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    ).values()
    return rotary


def rotaries_of_config(config: Any) -> dict[str, Rotary]:
    """The group that a chosen method applies to, by its name, of a text model's config."""
    group = FULL_ATTENTION if FULL_ATTENTION in config.rope_parameters else None
    return {group or "": Rotary.from_config(config, group)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m prerope.rope.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="NAME, or NAME:parameter=value:…:logn")
    parser.add_argument("--model", help="folder or hub id whose config to resolve for; default: the example")
    parser.add_argument("--length", type=int, help="rows and keys; default: four times the trained length")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the PNGs; default: here")
    parser.add_argument("--docs", action="store_true", help="write METHODS.md and its figures")
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs()
        return 0
    if not options.methods:
        parser.error("name at least one method, as in: python -m prerope.rope.show rerope yarn")
    try:
        _show(options)
    except (MethodError, ValueError, OSError) as error:
        print(f"rope.show: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def _show(options: argparse.Namespace) -> None:
    rotary = EXAMPLE if options.model is None else rotary_of(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    for text in options.methods:
        length = options.length or 4 * rotary.train_length
        if length < 2:
            raise ValueError(f"--length {length}: a map has at least 2 rows")
        method = resolve(RopeSpec.parse(text), rotary, length)
        path = options.out / f"{text.replace(':', '-')}.png"
        draw(method, length, path)
        print(f"{describe(method, length)}\n{'picture':24} {path.name}\n")


if __name__ == "__main__":
    sys.exit(main())
