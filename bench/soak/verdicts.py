"""What a soak holds: each rule as a verdict with what was found.

**Memory.** The cache is zeros that take memory when they are first written to, so the warm-up writes to all of it, and
only what follows is judged. Traffic itself takes memory: a body of 16 MiB that waits for a worker is there until it is
read, for minutes on a slow machine. So traffic comes in cycles, at whose ends nothing is under way, and memory is that
of a server at rest after each: its floor, which a leak raises. A least-squares line through the floors gives the slope
and its 95 % interval. Neighbouring floors may be alike, as an allocator keeps what one cycle took for the next: with
residuals that follow one another by ρ, as they would in a process of order one, there are (1 − ρ) / (1 + ρ) times as
many floors as were seen. Memory is flat where the interval contains zero or lies below one MiB an hour. Of floors that
scatter widely any slope is flat by that, so there is a second rule: the interval's *upper* end, held for all of it,
adds less than 3 % to the mean. Where that is not so, a rise was not seen but is not ruled out: soak for longer. Beside
it stands the slope of memory less what /metrics counts in caches: what is left once their filling is taken off.

**Streams.** A gap is what a client sees, so on a machine that others use it is theirs as well: the bound is ten times
STREAM_GAP_S.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.soak.client import Outcome
from bench.soak.watch import Sample

LEAST_FLOORS = 6
MOST_ALIKE = 0.8
"""ρ is taken for no more: so few floors could not tell."""
MEMORY_SHARE = 0.03
MEBIBYTE = 2**20
LEAST_SLOPE = MEBIBYTE / 3600
"""Bytes a second that are no growth."""
ORDINARY, GAP_BOUND_S = ("short", "shared"), 5.0
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rule, whether it held, and the figures."""

    rule: str
    held: bool
    finding: str


@dataclass(frozen=True, slots=True)
class Trend:
    """A line through floors: slope and its 95 % interval, in units a second; mean of the values; seconds covered."""

    slope: float
    low: float
    high: float
    mean: float
    seconds: float


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares, its interval by Student's t and as wide as residuals that follow one another make it.

    Raises:
        ValueError: there are too few values.
    """
    xs, ys, count = np.asarray(times, dtype=float), np.asarray(values, dtype=float), len(times)
    if count < LEAST_FLOORS:
        raise ValueError(f"{count} cycles of traffic are too few for a line, {LEAST_FLOORS} at least: soak for longer")
    away = xs - xs.mean()
    slope = float(away @ ys / (away @ away))
    rest = ys - ys.mean() - slope * away
    squares = float(rest @ rest)
    alike = float(rest[1:] @ rest[:-1]) / squares if squares else 0.0
    alike = min(max((alike + 2 / count) / (1 - 4 / count), 0.0), MOST_ALIKE)  # a line takes some of it away
    error = np.sqrt(squares / (count - 2) / (away @ away) * (1 + alike) / (1 - alike))
    half = float(students_t(count - 2) * error)
    return Trend(slope, slope - half, slope + half, float(ys.mean()), float(xs[-1] - xs[0]))


def students_t(freedom: int) -> float:
    """97.5 % of Student's distribution, by its expansion about the normal one's; to 1 % from four degrees on."""
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def judge_memory(floors: Sequence[Sample], before: Sample) -> tuple[list[Verdict], Trend | None]:
    """Of the server at rest after each cycle of traffic; `before` it, after the warm-up, is told beside it."""
    flat = "memory at rest is flat: the slope's interval contains zero or is below 1 MiB/h"
    sure = f"a rise is ruled out: the interval's upper end adds less than {MEMORY_SHARE:.0%} over the run"
    try:
        line, own = (
            trend([one.at for one in floors], values)
            for values in ([one.rss for one in floors], [one.uncounted for one in floors])
        )
    except ValueError as error:
        return [Verdict(rule, False, str(error)) for rule in (flat, sure)], None
    added = line.high * line.seconds / line.mean
    finding = (
        f"{line.mean / MEBIBYTE:,.0f} MiB after each of {len(floors)} cycles; slope {_slope(line)}; less what caches "
        f"count {_slope(own)}; "
        f"{before.rss / MEBIBYTE:,.0f} MiB before, then {', '.join(f'{one.rss / MEBIBYTE:,.0f}' for one in floors)}"
    )
    is_flat, is_sure = line.low <= 0 or line.high < LEAST_SLOPE, added < MEMORY_SHARE
    told = f"{added:+.1%} over {line.seconds / 60:.1f} min"
    if is_flat and not is_sure:
        told += ": soak for longer to tell"
    return [Verdict(flat, is_flat, finding), Verdict(sure, is_sure, told)], line


def _slope(line: Trend) -> str:
    slope, low, high = (60 * value / MEBIBYTE for value in (line.slope, line.low, line.high))
    return f"{slope:+.2f} MiB/min, 95 % interval {low:+.2f} to {high:+.2f}"


def judge_streams(outcomes: Sequence[Outcome]) -> Verdict:
    """Gaps between the tokens of ordinary streams."""
    gaps = [gap for outcome in outcomes if outcome.kind in ORDINARY for gap in outcome.gaps]
    rule = f"no ordinary stream waits more than {GAP_BOUND_S:g} s for a token"
    if not gaps:
        return Verdict(rule, False, "no stream had two tokens")
    half, most, worst = (float(value) for value in (*np.percentile(gaps, (50, 99)), max(gaps)))
    finding = f"{len(gaps)} gaps: median {half:.2f} s, p99 {most:.2f} s, longest {worst:.2f} s"
    return Verdict(rule, worst <= GAP_BOUND_S, finding)


def judge_blocks(final: Sample) -> Verdict:
    gauges = final.gauges
    held = gauges.blocks - gauges.free_blocks
    finding = f"{held} of {gauges.blocks} blocks held, {gauges.running} sequences running, {gauges.waiting} waiting"
    return Verdict("no leaked block: all free or cached", held == 0 and gauges.idle, finding)


def judge_resources(before: Sample, after: Sample) -> list[Verdict]:
    """Idle, after the warm-up and after the traffic."""
    first, last = asdict(before.resources), asdict(after.resources)
    names = {"threads": "thread", "sockets": "socket", "files": "file descriptor"}
    return [
        Verdict(f"no leaked {name}", last[key] <= first[key], f"{first[key]} after warm-up, {last[key]} at the end")
        for key, name in names.items()
    ]


def judge_replies(outcomes: Sequence[Outcome], final: Sample, expected: int) -> list[Verdict]:
    """`expected`: tasks that were begun."""
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    aborted = sum(outcome.aborted for outcome in outcomes)
    refused = sum(outcome.status >= 400 and not outcome.problem for outcome in outcomes)
    answered = len(outcomes) - aborted - refused - len(problems)
    finding = f"{answered} answered, {refused} refused, {aborted} aborted by their client, of {expected}"
    if problems:
        finding += f"; {len(problems)} otherwise: {_shown(problems)}"
    errors = final.gauges.server_errors
    complete = not problems and len(outcomes) == expected
    return [
        Verdict("every request answered or refused as declared", complete, finding),
        Verdict("no reply of 500 or above", errors == 0, f"{errors} counted by the server"),
    ]


def judge_watch(failures: Sequence[str], num_samples: int) -> Verdict:
    failed = f", {len(failures)} failed: {_shown(failures)}" if failures else ""
    held = not failures and num_samples > 0
    return Verdict("/metrics always answered", held, f"{num_samples} scrapes answered{failed}")


def judge_log(log: Path) -> Verdict:
    """The server's log in JSON: no line is an error, and none is anything else, as a traceback's are."""
    lines = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = {"level": "error", "event": line}
        if entry.get("level") in ("error", "critical"):
            lines.append(f"{entry.get('event')} {entry.get('exception', '')}"[:200])
    finding = f"{len(lines)} errors" + (f": {'; '.join(lines[:SHOWN])}" if lines else "")
    return Verdict("no error in the server's log", not lines, finding)


def _shown(problems: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(problems[:SHOWN]))
