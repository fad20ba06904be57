"""What a soak looks like: latencies by class, the verdicts, and memory, latency and the cache over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.shared.report import NOTHING, Report, Table, plain_log_axis
from bench.soak.client import Outcome
from bench.soak.verdicts import MEBIBYTE, Trend, Verdict
from bench.soak.watch import Sample

PERCENTS = (50, 90, 99)
ORDER = ("short", "shared", "crowd", "slow", "abort", "bad")  # long ones come after these, by name


@dataclass(frozen=True, slots=True)
class Soaked:
    """`warm_up` and `outcomes` are what came before and after its end, `samples` are all of both.

    Traffic ran from `begin` to `end` seconds.
    """

    about: Mapping[str, Any]
    warm_up: Sequence[Outcome]
    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    begin: float
    end: float
    verdicts: Sequence[Verdict]
    memory: Trend | None = None

    @property
    def held(self) -> bool:
        return all(verdict.held for verdict in self.verdicts)

    @property
    def kinds(self) -> list[str]:
        """Classes that occurred, in the order of the table."""
        present = {outcome.kind for outcome in self.outcomes}
        long = sorted(present - set(ORDER), key=lambda kind: (len(kind), kind))
        return [kind for kind in ORDER if kind in present] + long

    def minutes(self, at: float) -> float:
        return (at - self.begin) / 60

    def row(self, kind: str) -> list[str]:
        """Of one class: TTFT of its whole streams, and all gaps between their tokens."""
        outcomes = [outcome for outcome in self.outcomes if outcome.kind == kind]
        statuses = Counter("aborted" if o.aborted else str(o.status or "none") for o in outcomes)
        shown = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        ttfts = [o.ttft for o in outcomes if o.ttft is not None]
        gaps = [gap for o in outcomes for gap in o.gaps if kind != "slow"]  # a slow reader's own pauses
        times = [f"{np.percentile(v, p):.2f}" if v else NOTHING for v in (ttfts, gaps) for p in PERCENTS]
        return [kind, str(len(outcomes)), shown, str(len(ttfts)), *times]

    def summary(self) -> str:
        about, first, last = self.about, self.samples[0].gauges, self.samples[-1].gauges
        return (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores. {self.minutes(self.end):.1f} min of traffic "
            f"after the warm-up, {about['clients']} clients and one of long prompts, seed {about['seed']}: "
            f"{len(self.outcomes)} requests, {last.prompt_tokens - first.prompt_tokens:,} prompt tokens read and "
            f"{last.generation_tokens - first.generation_tokens:,} generated, warm-up included; "
            f"{last.preemptions} preemptions."
        )


def report(soaked: Soaked) -> Report:
    times = [f"{name} p{percent}, s" for name in ("TTFT", "between tokens") for percent in PERCENTS]
    headings = ["class", "requests", "statuses", "streams", *times]
    found = [[v.rule, "yes" if v.held else "**no**", v.finding] for v in soaked.verdicts]
    tables = [
        Table(headings, [soaked.row(kind) for kind in soaked.kinds], [soaked.summary()], left=(0, 2)),
        Table(["rule", "held", "found"], found, left=(0, 1, 2)),
    ]
    return Report("soak", tables, asdict(soaked) | {"held": soaked.held}, lambda figure: draw(soaked, figure))


def draw(soaked: Soaked, figure: Any) -> None:
    figure.set_size_inches(10, 11)
    memory, ttft, gaps, cache = figure.subplots(4, 1, sharex=True)
    _draw_memory(memory, soaked)
    _draw_latency(ttft, soaked, "TTFT of streams, s", lambda outcome: outcome.ttft)
    _draw_latency(gaps, soaked, "longest gap between two tokens, s", lambda o: max(o.gaps, default=None))
    ats = [soaked.minutes(sample.at) for sample in soaked.samples]
    for name, label, color in (("cached_blocks", "with known content", "0.6"), ("held", "held by sequences", "C0")):
        gauges = [sample.gauges for sample in soaked.samples]
        blocks = [g.blocks - g.free_blocks if name == "held" else g.cached_blocks for g in gauges]
        shares = [100 * number / g.blocks for number, g in zip(blocks, gauges, strict=True)]
        cache.plot(ats, shares, linewidth=1, color=color, label=label)
    cache.legend(ncols=2, fontsize=8, loc="center left")
    cache.set(ylim=(0, 105), title="cache blocks, %", xlabel="minutes since the traffic began; before it, the warm-up")
    for panel in (memory, ttft, gaps, cache):
        panel.axvline(0, color="0.7", linewidth=1, zorder=0)


def _draw_memory(panel: Any, soaked: Soaked) -> None:
    seen = [(soaked.minutes(s.at), s.rss / MEBIBYTE) for s in soaked.samples if s.rss is not None]
    panel.plot([at for at, _ in seen], [rss for _, rss in seen], linewidth=1, color="C0")
    if (line := soaked.memory) is not None:
        ends = [(line.mean + sign * line.slope * line.seconds / 2) / MEBIBYTE for sign in (-1, 1)]
        panel.plot([0, line.seconds / 60], ends, color="C3", linestyle="--", label="least squares")
        panel.legend(loc="lower right", fontsize=8)
    panel.set(ylim=(0, 1.2 * max([rss for _, rss in seen], default=1.0)), title="resident memory of the server, MiB")


def _draw_latency(panel: Any, soaked: Soaked, title: str, value: Callable[[Outcome], float | None]) -> None:
    """A dot a stream, where it began."""
    for i, kind in enumerate(soaked.kinds):
        dots = [(soaked.minutes(o.started), v) for o in soaked.outcomes if o.kind == kind and (v := value(o))]
        if dots and kind not in ("slow", "abort"):
            xs, ys = zip(*dots, strict=True)
            panel.scatter(xs, ys, s=14, color=f"C{i}", label=kind, alpha=0.8, linewidths=0)
    plain_log_axis(panel)
    panel.margins(y=0.25)
    panel.set_title(title)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(ncols=5, fontsize=8, loc="upper left")
