"""What a measurement of steps beside the floor found, and what it is to reach."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.shared.clock import over
from bench.shared.report import NOTHING, Report, Table, Target, target_data, target_table

Cell = tuple[str, int, int]  # method, rows, context


@dataclass(slots=True)
class Found:
    """The first method is the one that others are compared with.

    Attributes:
        weight_bytes: that every step reads.
        token_bytes: K and V of a token in all layers.
        decode: seconds of a step, a value a round.
        prefill: tokens a second by method, a value a round.
        left_out, failures: why, by case.
    """

    methods: Sequence[str]
    weight_bytes: int
    token_bytes: int
    about: Mapping[str, Any]
    decode: dict[Cell, list[float]] = field(default_factory=dict)
    prefill: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def floor(self, rows: int, context: int) -> float:
        """Seconds in which memory gives a step what it must read."""
        return float((self.weight_bytes + rows * context * self.token_bytes) / self.about["copy_bytes_per_s"])

    def over_floor(self, cell: Cell) -> float:
        return statistics.median(self.decode[cell]) / self.floor(*cell[1:])

    def over_first(self, cell: Cell) -> float:
        """Time over the first method's."""
        return over(self.decode[cell], self.decode.get((self.methods[0], *cell[1:]), ()))

    def prefill_over_first(self, method: str) -> float:
        return over(self.prefill.get(self.methods[0], ()), self.prefill[method])

    def targets(self) -> list[Target]:
        batches = sorted({rows for _, rows, _ in self.decode} | {1, 8})
        found = [
            Target(
                f"decode step ÷ floor, batch {batch}",
                1.25,
                False,
                {f"{m}, {n:,}": self.over_floor((m, rows, n)) for m, rows, n in self.decode if rows == batch},
            )
            for batch in batches
        ]
        others = [name for name in self.methods[1:] if name == "rerope"]
        steps = {f"{r} x {n:,}": self.over_first((m, r, n)) for m, r, n in self.decode if m in others}
        prompts = {f"{self.about['prompt']:,}": self.prefill_over_first(m) for m in others if m in self.prefill}
        found.append(Target(f"decode step, rerope ÷ {self.methods[0]}", 1.0, False, steps, "{:.3f}"))
        found.append(Target(f"prefill time, rerope ÷ {self.methods[0]}", 1.05, False, prompts, "{:.3f}"))
        return found

    def rows(self) -> list[list[str]]:
        found = []
        for cell, taken in sorted(self.decode.items(), key=lambda item: item[0][:0:-1]):
            method, rows, context = cell
            seconds, floor = statistics.median(taken), self.floor(rows, context)
            figures = [f"{seconds * 1e3:.3f}", f"{floor * 1e3:.3f}", f"{seconds / floor:.2f}", f"{rows / seconds:,.0f}"]
            found.append([f"decode {rows} x {context:,}", method, *figures, f"{self.over_first(cell):.3f}"])
        for method, rates in self.prefill.items():
            rate, prompt = statistics.median(rates), self.about["prompt"]
            figures = [f"{prompt / rate * 1e3:,.0f}", NOTHING, NOTHING, f"{rate:,.0f}"]
            found.append([f"prefill {prompt:,}", method, *figures, f"{self.prefill_over_first(method):.3f}"])
        return found

    def notes(self) -> list[str]:
        about = self.about
        return [
            f"{about['shape']} with random weights, {about['dtype']}, on {about['device']}, torch {about['torch']}, "
            f"{about['date']}: medians of {about['rounds']} rounds of {about['steps']} steps of the engine as served; "
            f"prefill in chunks of {about['budget']:,} tokens.",
            f"floor = ({self.weight_bytes / 1e9:.2f} GB of weights + {self.token_bytes:,} bytes a token of context) ÷ "
            f"{about['copy_bytes_per_s'] / 1e12:.2f} TB/s, the copy bandwidth measured in this run. "
            f"× {self.methods[0]}: time over its time.",
            f"Fused stack: {about['stack']}; CUDA graphs: {about['graphs']}.",
            *(f"left out: {case}: {why}" for case, why in self.left_out.items()),
            *(f"failed: {case}: {why}" for case, why in self.failures.items()),
        ]


def report(found: Found) -> Report:
    headings = ["step", "method", "ms", "floor ms", "× floor", "tokens/s", f"× {found.methods[0]}"]
    targets = found.targets()
    decode = []
    for cell, taken in found.decode.items():
        told = dict(zip(("method", "rows", "context"), cell, strict=True)) | {"seconds": taken}
        decode.append(told | {"floor_seconds": found.floor(*cell[1:]), "over_floor": found.over_floor(cell)})
    data = {
        "machine": dict(found.about),
        "weight_bytes": found.weight_bytes,
        "token_bytes": found.token_bytes,
        "decode": decode,
        "prefill_tokens_per_s": found.prefill,
        "targets": target_data(targets),
        "left_out": found.left_out,
        "failures": found.failures,
    }
    return Report("step", [Table(headings, found.rows(), found.notes(), left=(0, 1)), target_table(targets)], data)
