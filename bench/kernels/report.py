"""What a measurement of kernels found, and what it is to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.kernels.cases import RAW, Plan
from bench.kernels.rows import LIMIT
from bench.shared.report import NOTHING, Report, Table, Target, target_data, target_table


@dataclass(frozen=True, slots=True)
class Result:
    """One row. work: bytes of decode and store, FLOPs of prefill; share: of the measured copy or matmul rate."""

    kernel: str
    model: str
    method: str
    batch: int
    context: int
    seconds: float
    work: float
    share: float
    over_raw: float | None = None  # this time over the same kernel's without rotation
    over: dict[str, float] = field(default_factory=dict)  # and over a peer's

    @property
    def case(self) -> str:
        return f"{self.batch} x {self.context:,} {self.method}"


@dataclass(slots=True)
class Found:
    """Figures as they come.

    Attributes:
        rates, rates_at_end: the measured copy and matmul rates, before and after the cases.
        errors: a kernel's error over a plain torch run's, by model and method.
        failures: of ours: a wrong result, or a case that raised. left_out, silent: cases and peers without a figure.
    """

    plan: Plan
    about: Mapping[str, Any]
    rates: dict[str, float] = field(default_factory=dict)
    rates_at_end: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)

    def targets(self) -> list[Target]:
        found = [Target("error of the worst row ÷ a plain torch run's", LIMIT, False, self.errors)]
        for model, shape in self.plan.models.items():
            decode = [r for r in self.results if (r.kernel, r.model) == ("decode", model)]
            decode = [result for result in decode if result.work >= self.plan.judged_bytes]
            prefill = [r for r in self.results if (r.kernel, r.model) == ("prefill", model)]
            prefill = [result for result in prefill if result.context >= self.plan.judged_rows]
            raw, turned = ({r.case: r.share for r in decode if (r.method == RAW) == still} for still in (True, False))
            found.append(Target(f"{model}: decode, share of copy bandwidth, not rotated", 0.85, True, raw))
            found.append(Target(f"{model}: decode, share of copy bandwidth, rotated", 0.75, True, turned))
            found.append(Target(f"{model}: decode, rerope ÷ rope", 1.0, False, _over_rope(decode), "{:.3f}"))
            found.append(Target(f"{model}: prefill, rerope ÷ rope", 1.05, False, _over_rope(prefill), "{:.3f}"))
            if shape.head_dim == 128:
                rates = {r.case: r.work / r.seconds / 1e12 for r in prefill if r.method == "rope"}
                found.append(Target(f"{model}: prefill, TFLOP/s of rope", 400.0, True, rates, "{:.0f}"))
                found.append(Target(f"{model}: prefill, TFLOP/s of rope, after that", 550.0, True, rates, "{:.0f}"))
        return found

    @property
    def beside(self) -> list[str]:
        return sorted({peer for result in self.results for peer in result.over})

    def headings(self) -> list[str]:
        limits = ["ms", "GB/s or TFLOP/s", "of the limit", "over raw"]
        return ["kernel", "model", "method", "batch", "context", *limits, *(f"over {peer}" for peer in self.beside)]

    def rows(self) -> list[list[str]]:
        found = []
        for r in self.results:
            rate = r.work / r.seconds / (1e12 if r.kernel == "prefill" else 1e9)
            ratios = [_ratio(r.over_raw), *(_ratio(r.over.get(peer)) for peer in self.beside)]
            figures = [str(r.batch), f"{r.context:,}", f"{r.seconds * 1e3:.3f}", f"{rate:,.0f}", f"{r.share:.0%}"]
            found.append([r.kernel, r.model, r.method, *figures, *ratios])
        return found

    def notes(self) -> list[str]:
        about = self.about
        named = {"left out": self.left_out, "no figure of a peer": self.silent, "failed": self.failures}
        dtype = str(self.plan.dtype).removeprefix("torch.")
        return [
            f"One layer, {dtype}, on {about['device']}, torch {about['torch']}, {about['date']}. The limit: of decode "
            "and store the measured copy bandwidth, of prefill the measured rate of a square product: "
            + (", ".join(f"{value / 1e12:.3g} T{name}" for name, value in self.rates.items()) or "not measured")
            + "".join(f", at the end {value / 1e12:.3g} T{name}" for name, value in self.rates_at_end.items()),
            "Error of the worst row over a plain torch run's in the same dtype: "
            + (", ".join(f"{name} {ratio:.2f}" for name, ratio in self.errors.items()) or "not measured"),
            *(f"{what}: {case}: {why}" for what, cases in named.items() for case, why in cases.items()),
        ]


def _over_rope(results: list[Result]) -> dict[str, float]:
    """Time of rerope over rope's, by case."""
    rope = {(r.batch, r.context): r.seconds for r in results if r.method == "rope"}
    return {
        f"{r.batch} x {r.context:,}": r.seconds / rope[r.batch, r.context]
        for r in results
        if r.method == "rerope" and (r.batch, r.context) in rope
    }


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def report(found: Found, name: str = "kernels") -> Report:
    targets = found.targets()
    data = {
        "machine": dict(found.about),
        "rates": found.rates,
        "rates_at_end": found.rates_at_end,
        "errors over a torch run's": found.errors,
        "targets": target_data(targets),
        "results": [asdict(result) for result in found.results],
        "left_out": found.left_out,
        "silent_peers": found.silent,
        "failures": found.failures,
    }
    table = Table(found.headings(), found.rows(), found.notes(), left=(0, 1, 2))
    return Report(name, [table, target_table(targets)], data)
