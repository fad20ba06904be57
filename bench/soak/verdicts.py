"""What a soak holds: each rule as a verdict with what was found.

**Memory.** The cache is zeros that take memory when they are first written to, so the warm-up writes to all of it, and
only what follows is judged. The samples after the warm-up are averaged over 20 equal windows, since neighbouring
seconds are alike; a least-squares line through the windows gives the slope and, by Student's t with 18 degrees of
freedom, its 95 % interval. Memory is flat where the *upper* end of the interval, held for the whole time, adds less
than 3 % to the mean; a rise that is not there but cannot be ruled out fails, too, and asks for a longer run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.soak.client import Outcome
from bench.soak.watch import Sample

NUM_WINDOWS = 20
STUDENT_T = 2.1009  # 97.5 % of the distribution with NUM_WINDOWS − 2 degrees of freedom
MEMORY_SHARE = 0.03
SHOWN = 5
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rule, whether it held, and the figures."""

    rule: str
    held: bool
    finding: str


@dataclass(frozen=True, slots=True)
class Trend:
    """A line through windows: slope and its 95 % interval, in units a second; mean of the values; seconds covered."""

    slope: float
    low: float
    high: float
    mean: float
    seconds: float


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares through the means of NUM_WINDOWS equal windows of time.

    Raises:
        ValueError: a window has no sample; the run was too short.
    """
    at, seconds = np.asarray(times) - min(times), max(times) - min(times)
    places = np.minimum(NUM_WINDOWS - 1, (at / (seconds or 1.0) * NUM_WINDOWS).astype(int))
    counts = np.bincount(places, minlength=NUM_WINDOWS)
    if not counts.all():
        told = f"{len(times)} samples over {seconds:.0f} s do not fill {NUM_WINDOWS} windows: soak for longer"
        raise ValueError(told)
    xs, ys = (np.bincount(places, weights, NUM_WINDOWS) / counts for weights in (at, values))
    (slope, _), covariance = np.polyfit(xs - xs.mean(), ys, 1, cov=True)
    half = STUDENT_T * np.sqrt(covariance[0, 0])
    return Trend(float(slope), float(slope - half), float(slope + half), float(ys.mean()), seconds)


def judge_memory(samples: Sequence[Sample], before: Sample, after: Sample) -> tuple[Verdict, Trend | None]:
    """Of the samples taken under traffic, after the warm-up; `before` and `after` it, idle, are told beside it."""
    rule = f"resident memory flat: the slope's upper end adds less than {MEMORY_SHARE:.0%} over the run"
    try:
        line = trend([sample.at for sample in samples], [sample.rss for sample in samples])
    except ValueError as error:
        return Verdict(rule, False, str(error)), None
    slope, low, high = (60 * value / MEBIBYTE for value in (line.slope, line.low, line.high))
    added = line.high * line.seconds / line.mean
    finding = (
        f"{line.mean / MEBIBYTE:,.0f} MiB; slope {slope:+.2f} MiB/min, 95 % interval {low:+.2f} to {high:+.2f}; "
        f"its upper end adds {added:+.1%} over {line.seconds / 60:.1f} min; "
        f"idle: {before.rss / MEBIBYTE:,.0f} MiB before and {after.rss / MEBIBYTE:,.0f} after"
    )
    return Verdict(rule, added < MEMORY_SHARE, finding), line


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
