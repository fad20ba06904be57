"""Which method and which parameters read a user's own text best: `python -m bench.quality --calibrate`.

A search from method to window to log-n, each step keeping the best so far: a dozen readings instead of hundreds. It
looks at half of the documents; the other half, which it never chose by, says what the choice is worth beside `auto`.
A choice that does not win there is not recommended.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from prerope.rope.methods import method_table
from prerope.rope.spec import RopeSpec

from bench.shared.choice import AUTO, Choice

FAMILIES = ("dynamic_leaky", "rerope", "yarn", "dynamic_yarn", "dynamic_ntk", "dual_chunk")
"""Methods that read past the trained length without fine-tuning, `auto`'s own first."""

WINDOWS = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""Of the trained length."""

Loss = Callable[[RopeSpec, int], float]
"""Nats a token of one document, by its number, read by a method."""


def calibrate(
    loss: Loss, searched: Sequence[int], held_out: Sequence[int], train_length: int, more: Sequence[RopeSpec] = ()
) -> Choice:
    """Search on some documents, by number, and report on others. train_length: L, in tokens; more: tried beside."""

    def mean(spec: RopeSpec, documents: Sequence[int] = searched) -> float:
        return statistics.fmean(loss(spec, number) for number in documents)

    tried = {spec: mean(spec) for spec in more}
    for step in (_families, _windows, _logn):
        best = min(tried, key=tried.__getitem__, default=RopeSpec())
        tried |= {spec: mean(spec) for spec in step(best, train_length) if spec not in tried}
    order = sorted(tried, key=tried.__getitem__)
    ours, auto = mean(order[0], held_out), mean(AUTO, held_out)
    shown = [(spec, f"{tried[spec]:.4f}") for spec in order]
    return Choice(shown, f"{ours:.4f}", f"{auto:.4f}", auto - ours, f"{auto - ours:+.4f} nats a token")


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
