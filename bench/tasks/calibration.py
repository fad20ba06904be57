"""Which method does the most tasks: chosen on half of the seeds, reported on the others, which it never chose by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prerope.rope.spec import RopeSpec

from bench.shared.methods import Method, label
from bench.shared.report import Table
from bench.tasks.scores import Mean, Scores

AUTO = RopeSpec(method="auto")


@dataclass(frozen=True, slots=True)
class Choice:
    """Scores of each method on the seeds that were searched, and of the best and `auto` on those held out."""

    searched: list[tuple[Method, Mean]]
    best: Method
    held_out: Mean
    auto: Mean

    @property
    def recommended(self) -> RopeSpec:
        """The best, where it is ahead of `auto` by more than a standard error on what it was not chosen on."""
        error = self.held_out.error or 0.0
        return self.best.spec if self.held_out.value - self.auto.value > error else AUTO

    def table(self) -> Table:
        rows = [[method.label, str(found), ""] for method, found in self.searched]
        rows.sort(key=lambda row: row[0] != self.best.label)
        rows[0][2] = str(self.held_out)
        rows.append([label(AUTO), "", str(self.auto)])
        verdict = "recommended" if self.recommended != AUTO else "not recommended: auto is as good"
        gain = 100 * (self.held_out.value - self.auto.value)
        note = f"on held-out seeds {self.best.label} is {gain:+.0f} points from auto: {verdict}"
        return Table(["method", "score, searched seeds", "score, held-out seeds"], rows, [note])


def choose(scores: Scores, methods: Sequence[Method], num_seeds: int) -> Choice:
    """`auto` is one of the methods; the first half of the seeds is searched. A tie goes to `auto`."""

    def mean(method: str, seeds: range) -> Mean:
        found = scores.mean(lambda one: one.method == method and one.seed in seeds)
        assert found is not None, "every method was asked with every seed"
        return found

    halves = range(num_seeds // 2), range(num_seeds // 2, num_seeds)
    searched = [(method, mean(method.label, halves[0])) for method in methods]
    best, _ = max(searched, key=lambda pair: (pair[1].value, pair[0].spec == AUTO))
    (auto,) = (method for method in methods if method.spec == AUTO)
    return Choice(searched, best, mean(best.label, halves[1]), mean(auto.label, halves[1]))
