"""What the stages of a run left: tables in results.md, and every figure in results.json, beside an earlier run's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.running import Ending
from bench.shared.report import NOTHING, Table


def save(endings: Sequence[Ending], command: str, folder: Path, beside: Path | None) -> None:
    text = results(endings, command, folder, beside)
    (folder / "results.md").write_text(text, encoding="utf-8")
    found = {"card": card(endings, folder), "command": command, "figures": figures(endings, folder)}
    found["endings"] = {ending.name: ending.told for ending in endings}
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def results(endings: Sequence[Ending], command: str, folder: Path, beside: Path | None) -> str:
    """A section for RESULTS.md: the card, how each stage ended, and the tables of those that measured."""
    shown = [[ending.name, f"{ending.seconds:.0f}", ending.told] for ending in endings]
    parts = [f"## GPU: {card(endings, folder)}", f"```sh\n{command}\n```"]
    parts.append(Table(["stage", "seconds", "ended"], shown, left=(0, 2)).markdown())
    if beside is not None:
        parts += ["### Beside an earlier run", compared(figures(endings, folder), beside).markdown()]
    for ending in endings:
        tables = folder / f"{ending.name}.md"
        told = tables.read_text(encoding="utf-8") if tables.exists() else f"Its last line: `{ending.last}`"
        parts += [f"### {ending.name}", told.strip()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def card(endings: Sequence[Ending], folder: Path) -> str:
    machines = (data["machine"] for _, data in _measured(endings, folder) if "machine" in data)
    return str(next((machine["device"] for machine in machines), "not measured"))


def figures(endings: Sequence[Ending], folder: Path) -> dict[str, float]:
    """Milliseconds of every case, rates, and errors of checks, by name."""
    found: dict[str, float] = {}
    for stage, data in _measured(endings, folder):
        for result in data.get("results", ()):
            case = f"{result['kernel']} {result['model']} {result['batch']} x {result['context']:,} {result['method']}"
            found[f"{stage}: {case}, ms"] = 1e3 * result["seconds"]
        for cell in data.get("decode", ()):
            taken = sorted(cell["seconds"])
            case = f"decode {cell['rows']} x {cell['context']:,} {cell['method']}"
            found[f"{stage}: {case}, ms"] = 1e3 * taken[len(taken) // 2]
        for point in data.get("points", ()):
            case = f"{point['prompt_tokens']:,} x {point['num_streams']}"
            times = ("ttft", "time_per_token") if point["figures"] else ()
            found |= {f"{stage}: {case} {name}, ms": 1e3 * point["figures"][name] for name in times}
        for name, value in data.get("errors over a torch run's", {}).items():
            found[f"{stage}: {name}, error"] = value
        found |= {f"{stage}: T{unit}": value / 1e12 for unit, value in data.get("rates", {}).items()}
        found |= {f"{stage}: {name}, ms": value for name, value in data.get("ms", {}).items()}
    return found


def compared(now: dict[str, float], beside: Path) -> Table:
    earlier = json.loads(beside.read_text(encoding="utf-8"))
    before: dict[str, float] = earlier["figures"]
    rows = []
    for name in [*now, *(name for name in before if name not in now)]:
        values = [before.get(name), now.get(name)]
        ratio = NOTHING if None in values or not before[name] else f"{now[name] / before[name]:.3f}"
        rows.append([name, *(NOTHING if value is None else f"{value:.4g}" for value in values), ratio])
    return Table(["figure", "before", "now", "now ÷ before"], rows, [f"Before: {earlier['card']}."])


def _measured(endings: Sequence[Ending], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for ending in endings:
        path = folder / f"{ending.name}.json"
        if path.exists():
            yield ending.name, json.loads(path.read_text(encoding="utf-8"))
