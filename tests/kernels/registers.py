"""What kernels take of registers, as the table of docs/gpu.md: of what `tests.kernels.compiled` prints.

    python -m tests.kernels.compiled 80 90 100 | python -m tests.kernels.registers           # prints the table
    python -m tests.kernels.compiled 80 90 100 | python -m tests.kernels.registers --docs    # writes it into the page

To be run with the Triton that the page names.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- registers: begin -->", "<!-- registers: end -->"
KERNELS = {"decode_kernel": "decode", "prefill_kernel": "prefill"}


def table(lines: Iterable[str]) -> str:
    found: dict[tuple[str, int, str, str], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for one in map(json.loads, lines):
        if one["kernel"] in KERNELS:
            kind = "fp32" if one["dtype"] == "torch.float32" else "bf16 and fp16"
            row = KERNELS[one["kernel"]], one["dim"], kind, ", in groups or fading" if one["more"] else ""
            found[row][one["arch"]].append(one)
    archs = sorted({arch for row in found.values() for arch in row})
    parts = [["registers a thread", *(f"sm_{arch}" for arch in archs)], ["---"] * (1 + len(archs))]
    for (kernel, dim, kind, more), row in sorted(found.items(), key=lambda item: (item[0][0], item[0][2:], item[0][1])):
        parts.append([f"{kernel}, {dim} dims, {kind}{more}", *(_range(row[arch]) for arch in archs)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in parts)


def _range(kernels: Sequence[dict[str, Any]]) -> str:
    if not (registers := [one["registers"] for one in kernels]):
        return "–"
    spilled = max((one["spilled"] for one in kernels), default=0)
    told = f"{min(registers)} to {max(registers)}" if min(registers) < max(registers) else f"{registers[0]}"
    return told + (f", {spilled} bytes spilled" if spilled else "")


if __name__ == "__main__":
    text = table(sys.stdin)
    print(text)
    if "--docs" in sys.argv[1:]:
        page = PAGE.read_text()
        whole = re.sub(f"(?s)(?<={BEGIN}\n).*(?=\n{END})", lambda _: text, page)
        assert whole != page or text in page, f"docs/gpu.md has no {BEGIN}"
        PAGE.write_text(whole)
