"""Which method and which parameters read a user's own text best: `python -m bench.quality --calibrate`.

A search from method to window to log-n, each step keeping the best so far: a dozen readings instead of hundreds. It
looks at half of the documents; the other half, which it never chose by, says what the choice is worth beside `auto`.
A choice that does not win there is not recommended.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prerope.rope.methods import method_table
from prerope.rope.spec import RopeSpec

from bench.shared.options import label
from bench.shared.report import Table

FAMILIES = ("dynamic_leaky", "rerope", "yarn", "dynamic_yarn", "dynamic_ntk", "dual_chunk")
"""Methods that read past the trained length without fine-tuning, `auto`'s own first."""

WINDOWS = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""Of the trained length."""

Loss = Callable[[RopeSpec, int], float]
"""Nats a token of one document, by its number, read by a method."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One method on the documents that the search looks at; losses in nats a token, a document each."""

    spec: RopeSpec
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was tried, and what the best of it and `auto` lose on the documents that were held out."""

    trials: list[Trial]
    held_out: Trial
    auto: Trial

    @property
    def gain(self) -> float:
        """Nats a token below `auto` on held-out documents."""
        return self.auto.mean - self.held_out.mean

    @property
    def recommended(self) -> RopeSpec:
        return self.held_out.spec if self.gain > 0 else self.auto.spec

    def table(self) -> Table:
        by_loss = sorted(self.trials, key=lambda trial: trial.mean)
        held_out = [f"{self.held_out.mean:.4f}", *[""] * (len(by_loss) - 1)]
        rows = [[label(t.spec), f"{t.mean:.4f}", held] for t, held in zip(by_loss, held_out, strict=True)]
        verdict = "recommended" if self.gain > 0 else "not recommended: auto is as good"
        note = f"on held-out documents the best is {self.gain:+.4f} nats a token better than auto: {verdict}"
        return Table(
            ["method", "loss, searched", "loss, held out"], [*rows, ["auto", "", f"{self.auto.mean:.4f}"]], [note]
        )


def calibrate(
    loss: Loss, searched: Sequence[int], held_out: Sequence[int], train_length: int, more: Sequence[RopeSpec] = ()
) -> Calibration:
    """Search on some documents, by number, and report on others. train_length: L, in tokens; more: tried beside."""

    def trial(spec: RopeSpec, documents: Sequence[int] = searched) -> Trial:
        return Trial(spec, tuple(loss(spec, number) for number in documents))

    trials = [trial(spec) for spec in more]
    for step in (_families, _windows, _logn):
        best = min(trials, key=lambda tried: tried.mean, default=Trial(RopeSpec(), ())).spec
        known = [tried.spec for tried in trials]
        trials += [trial(spec) for spec in step(best, train_length) if spec not in known]
    best = min(trials, key=lambda tried: tried.mean).spec
    return Calibration(trials, trial(best, held_out), trial(RopeSpec(method="auto"), held_out))


def num_readings(num_searched: int, num_held_out: int) -> int:
    """At most this many documents are read."""
    return num_searched * (len(FAMILIES) + len(WINDOWS) + 1) + 2 * num_held_out


def _families(_best: RopeSpec, _train_length: int) -> Iterator[RopeSpec]:
    yield from (RopeSpec(method=name) for name in FAMILIES)


def _windows(best: RopeSpec, train_length: int) -> Iterator[RopeSpec]:
    if any(entry.name == best.method and entry.windowed for entry in method_table()):
        for share in WINDOWS:
            window = int(share * train_length)
            yield dataclasses.replace(best, window=None if share == 1 / 4 else window)  # a quarter is the default


def _logn(best: RopeSpec, _train_length: int) -> Iterator[RopeSpec]:
    yield dataclasses.replace(best, logn=True)
