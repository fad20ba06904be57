"""Which method reads best, by losses or by tasks: chosen on half of what there is, judged on what was held out.

Beside whole methods there are DPE's groups: which group reads each share of the pairs of dims best. The detection is
that of arXiv 2504.18857: all shares have one group, twice what the longest prompt needs, and one share at a time has
another. What is best for each share by itself is taken together. A function of scores alone.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prerope.rope.spec import RopeSpec
from rich.console import Console

from bench.shared.options import count, environment, label
from bench.shared.report import Table

AUTO = RopeSpec(method="auto")

MULTIPLES = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16)
"""Of the common group, that a share is tried with."""


def calibration_options(parser: ArgumentParser, halved: str) -> None:
    """halved: what there must be two of, a half to search on and a half to hold out."""
    add = parser.add_argument
    add("--calibrate", action="store_true", help=f"choose a method on half of the {halved}, at the longest length, "
        "judge it on the others, and print its settings")  # fmt: skip
    add("--groups", type=count, default=0, metavar="N", help="with --calibrate: find dpe's groups first, for so many "
        "equal shares of the pairs of dims")  # fmt: skip


def check_calibration(parser: ArgumentParser, asked: Namespace, halved: str) -> None:
    if asked.calibrate and getattr(asked, halved) < 2:
        parser.error(f"--{halved} {getattr(asked, halved)}: must be at least 2, some to search on and some to hold out")
    if asked.groups and not asked.calibrate:
        parser.error("--groups: goes with --calibrate")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was tried, the best first, with its figure as it is shown; the best's and `auto`'s on what was held out.

    Attributes:
        gain: by which the best is better than `auto` there; told: the same with its unit.
        error: of the gain, which it must exceed.
    """

    tried: Sequence[tuple[RopeSpec, str]]
    held_out: str
    auto: str
    gain: float
    told: str
    error: float = 0.0

    @property
    def recommended(self) -> RopeSpec:
        return self.tried[0][0] if self.gain > self.error else AUTO

    def table(self, figure: str) -> Table:
        rows = [[label(spec), shown, ""] for spec, shown in self.tried]
        rows[0][2] = self.held_out
        rows.append([label(AUTO), "", self.auto])
        verdict = "recommended" if self.recommended != AUTO else "not recommended: auto is as good"
        note = f"on what was held out {rows[0][0]} is {self.told} better than auto: {verdict}"
        return Table(["method", f"{figure}, searched", f"{figure}, held out"], rows, [note])

    def show(self, figure: str, console: Console) -> None:
        """The table, and the settings to serve with."""
        self.table(figure).show(console)
        console.print("\n".join(environment(self.recommended)))


def common_group(length: int, train_length: int) -> int:
    """The least power of two that is at least twice length ÷ trained length."""
    return 1 << max(0, math.ceil(math.log2(2 * length / train_length)))


def tried_groups(common: int) -> list[int]:
    return [group for group in (int(common * multiple) for multiple in MULTIPLES) if group >= 1]


def variant(shares: int, common: int, share: int, group: int) -> RopeSpec:
    groups = [common] * shares
    groups[share] = group
    return RopeSpec(method="dpe", groups=tuple(groups))


def variants(shares: int, common: int) -> list[RopeSpec]:
    """All that `best_groups` asks of, each once."""
    tried = (variant(shares, common, share, group) for share in range(shares) for group in tried_groups(common))
    return list(dict.fromkeys(tried))


def best_groups(shares: int, common: int, score: Callable[[RopeSpec], float]) -> RopeSpec:
    """Of each share the group with the highest score; of equals the nearest to the common one, then the larger."""

    def rank(share: int, group: int) -> tuple[float, float, int]:
        return score(variant(shares, common, share, group)), -abs(math.log2(group / common)), group

    best = (max(tried_groups(common), key=lambda group: rank(share, group)) for share in range(shares))
    return RopeSpec(method="dpe", groups=tuple(best))
