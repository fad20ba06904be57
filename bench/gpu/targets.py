"""The table of targets in docs/comparison.md, filled from what runs of bench.gpu left: the worst figure of each.

python -m bench.gpu.targets bench/out/gpu bench/out/gpu-again           # prints it; what is in both is the last's
python -m bench.gpu.targets bench/out/gpu bench/out/gpu-again --docs    # writes it into the page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.kernels.cases import FULL
from bench.kernels.report import Found
from bench.shared import options
from bench.shared.report import NOTHING, Target
from bench.step.report import Found as FoundOfSteps

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"
BEGIN, END = "<!-- targets: begin -->", "<!-- targets: end -->"
SHAPE = "llama-3-8b"


def targets() -> list[Target]:
    """What a card is asked for, with nothing found."""
    kernels = Found(replace(FULL, models={SHAPE: FULL.models[SHAPE]}), {})
    steps = FoundOfSteps(["rope", "rerope"], 0, 0, {"prompt": 32768})
    return [*kernels.targets(), *steps.targets()]


def found_in(folders: Sequence[Path]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """({target: {case: figure}}, the cards and days)."""
    found: dict[str, dict[str, float]] = {}
    machines = dict[str, None]()
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        data = json.loads(path.read_text(encoding="utf-8"))
        for target in data.get("targets", ()):
            found.setdefault(target["name"], {}).update(target["found"])
            machines[f"{data['machine']['device']}, torch {data['machine']['torch']}, {data['machine']['date']}"] = None
    return found, list(machines)


def table(folders: Sequence[Path]) -> str:
    found, machines = found_in(folders)
    heading = "; ".join(machines) or "figure"
    lines = [["target", "wanted", heading, "worst case"], ["---"] * 4]
    for target in targets():
        name, wanted, figure, case, verdict = replace(target, found=found.get(target.name, {})).row()
        told = "not yet measured" if verdict == "not measured" else f"{figure}, {verdict}"
        lines.append([name, wanted, told, "" if case == NOTHING else case])
    return "\n".join("  | " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("gpu.targets", __doc__, "gpu")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--docs", action="store_true", help="write it into docs/comparison.md")
    asked = parser.parse_args(arguments)
    text = table(asked.folders)
    print(text)
    if asked.docs:
        head, begin, rest = PAGE.read_text(encoding="utf-8").partition(f"  {BEGIN}\n")
        _, end, tail = rest.partition(f"\n  {END}")
        assert end, f"the page has no {BEGIN} and {END}"
        PAGE.write_text(head + begin + text + end + tail, encoding="utf-8")
    return 0


if __name__ == "__main__":
    options.run("gpu.targets", main)
