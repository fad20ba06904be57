"""What a soak looks like: latencies by class, the verdicts, and memory, latency and the cache over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
    floors: Sequence[Sample] = ()
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
    """Minutes since the traffic began, and before it the warm-up; a dot a stream, where it began."""
    figure.set_size_inches(10, 11)
    memory, ttft, gaps, cache = figure.subplots(4, 1, sharex=True)
    ats, gauges = [soaked.minutes(sample.at) for sample in soaked.samples], [s.gauges for s in soaked.samples]
    memory.plot(ats, [sample.rss / MEBIBYTE for sample in soaked.samples], linewidth=1)
    if (line := soaked.memory) is not None:
        rests = [soaked.minutes(sample.at) for sample in soaked.floors]
        memory.plot(rests, [sample.rss / MEBIBYTE for sample in soaked.floors], "o", color="C3", label="at rest")
        ends = [(line.mean + sign * line.slope * line.seconds / 2) / MEBIBYTE for sign in (-1, 1)]
        memory.plot([rests[0], rests[-1]], ends, color="C3", linestyle="--", label="least squares")
    most = max([sample.rss for sample in soaked.samples], default=MEBIBYTE) / MEBIBYTE
    memory.set(ylim=(0, 1.15 * most), title="resident memory of the server, MiB")
    for kind in (kind for kind in soaked.kinds if kind not in ("slow", "abort")):
        streams = [o for o in soaked.outcomes if o.kind == kind and o.ttft is not None and o.gaps]
        began = [soaked.minutes(o.started) for o in streams]
        ttft.scatter(began, [o.ttft for o in streams], s=14, label=kind)
        gaps.scatter(began, [max(o.gaps) for o in streams], s=14, label=kind)
    for panel, title in ((ttft, "TTFT of streams, s"), (gaps, "longest gap between two tokens, s")):
        plain_log_axis(panel)
        panel.set_title(title)
    cache.plot(ats, [100 * g.cached_blocks / g.blocks for g in gauges], color="0.6", label="with known content")
    cache.plot(ats, [100 * (1 - g.free_blocks / g.blocks) for g in gauges], label="held by sequences")
    cache.set(ylim=(0, 105), title="cache blocks, %", xlabel="minutes")
    for panel in (memory, ttft, gaps, cache):
        panel.axvline(0, color="0.7", linewidth=1, zorder=0)
        panel.legend(ncols=5, fontsize=8)
