"""Drafts from a sequence's own past: what they are, how likely they are right, and how many are worth their rows.

Where the last tokens have stood earlier, what followed them there is followed again, token after token, while it comes
true; where it does not, the earlier place that has most of the last tokens in common is looked up (`History`). Places
are found as LZ77 compressors find them (RFC 1951, 4): each run of `GRAM` tokens has a chain of the places that it ends
before, the newest first, of which a few are compared. So a token costs the same however long the sequence is.

A draft is a row more, and brings a token if it and all drafts before it come true. How likely that is, `Acceptance`
says; what rows cost, `StepTimes`. The likeliest go first, and `Speculator` takes the number of them that is expected to
bring most tokens a second. Counting goes on whether or not anything is drafted, so drafts that do not pay are left off,
and taken up again, at no cost. Whether drafts have come true is found out with the step (`engine.step`).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from prerope.server.engine.sequence import Sequence

GRAM = 3
"""Tokens that a place must have in common with the end at least."""
MAX_PLACES, MAX_COMMON = 8, 32
"""Places that are compared, and tokens that are compared of each."""
_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PIECE = 2**13
"""Tokens of a prompt that are taken in before a step, in a millisecond or two: it may have a million."""
_NOWHERE = -1


class History:
    """Follows a list of tokens that only grows; about 12 bytes a token beside the list.

    Attributes:
        token_ids: the list. num_known: of its tokens, those that were taken in.
        place: where in it the tokens stand that may come next; None: nowhere.
        common: how many tokens before that place are those at the end; counted no further than `MAX_COMMON` when it is
            looked up, and on from there while it comes true.
    """

    def __init__(self, token_ids: Several[int]) -> None:
        self.token_ids = token_ids
        self.place: int | None = None
        self.common = 0
        self._before = array("i")  # of each place, the one before it in its chain
        self._bits = 10
        self._newest = array("i")
        self.num_known = 0
        self._reading: Iterator[None] | None = None

    def read(self, num_known: int) -> bool:
        """Take in tokens without following: a prompt, of `num_known` at the first call. Some of them; whether it is
        done: until then nothing is expected to come next."""
        self._reading = self._reading or self._pieces(num_known)
        for _ in self._reading:
            self.place, self.common = None, 0
            return False
        self._reading = None
        self._look_up()
        return True

    def follow(self, token: int) -> bool | None:
        """Take in the next token of the list; whether it is the one that was expected, None where none was."""
        place, common = self.place, self.common
        hit = None if place is None else self.token_ids[place] == token
        self._add(self.num_known + 1)
        if self.reads:
            return hit
        if hit and place is not None:
            self.place, self.common = place + 1, common + 1
        else:
            self._look_up()
        return hit

    @property
    def reads(self) -> bool:
        """Whether `read` is to be called before anything is followed: at first, and where there was no more room."""
        return self._reading is not None or not self.num_known

    def expected(self, count: int) -> list[int]:
        """The next `count` tokens as they stand at `place`; where the list ends, they go on as they began."""
        if self.place is None:
            return []
        found = list(self.token_ids[self.place : min(self.place + count, self.num_known)])
        period = len(found)
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _look_up(self) -> None:
        """The place with most in common, and of equals the newest; not the end itself."""
        self.place, self.common = None, 0
        end, ids = self.num_known, self.token_ids
        place = self._before[end] if end >= GRAM else _NOWHERE
        for _ in range(MAX_PLACES):
            if place < 0:
                return
            common, most = 0, min(place, MAX_COMMON)
            while common < most and ids[place - 1 - common] == ids[end - 1 - common]:
                common += 1
            if common >= GRAM and common > self.common:
                self.place, self.common = place, common
            if common == MAX_COMMON:
                return
            place = self._before[place]

    def _add(self, end: int) -> None:
        """Enter the place after the first `end` tokens."""
        if end >= len(self._newest):
            self.read(end)
            return
        ids, before = self.token_ids, _NOWHERE
        if end >= GRAM:
            first, second, third = ids[end - 3], ids[end - 2], ids[end - 1]
            mixed = (first * _PRIMES[0] + second * _PRIMES[1] + third * _PRIMES[2]) & 0xFFFFFFFF
            chain = mixed >> (32 - self._bits)
            before, self._newest[chain] = self._newest[chain], end
        self._before.append(before)
        self.num_known = end

    def _pieces(self, num_known: int) -> Iterator[None]:
        """Enter all places anew, with room for as many again: the last of several pieces is followed by the end."""
        bits = max(10, num_known.bit_length())
        before = np.full(num_known + 1, _NOWHERE, dtype=np.int32)
        newest = np.full(2**bits, _NOWHERE, dtype=np.int32)
        for begin in range(GRAM, num_known + 1, PIECE):
            if begin > GRAM:
                yield
            stop = min(begin + PIECE, num_known + 1)
            ids, ends = np.array(self.token_ids[begin - GRAM : stop - 1], dtype=np.uint32), np.arange(begin, stop)
            mixed = np.zeros(len(ends), dtype=np.uint32)
            for n, prime in enumerate(_PRIMES):
                mixed += ids[n : n + len(ends)] * np.uint32(prime)
            chains = mixed >> np.uint32(32 - bits)
            order = np.argsort(chains, kind="stable")
            same = chains[order][1:] == chains[order][:-1]
            before[ends] = newest[chains]
            before[ends[order[1:][same]]] = ends[order[:-1][same]]
            newest[chains] = ends  # of equal chains the last one stays
        self._before, self._newest = array("i", before.tobytes()), array("i", newest.tobytes())
        self._bits, self.num_known = bits, num_known


MAX_DRAFTS = 31
"""The most drafts of one sequence in one step."""
MAX_ROWS = 64
"""Drafts are added up to so many rows of a step, or as many as there may be sequences."""
LEAST_CHANCE = 0.02
LEAST_GAIN = 1.03
"""Steps with drafts must be expected to be so much faster, since what is expected is a guess."""

MOST_LONGER = 2.0
"""How many times as long drafts may make a step in which several sequences decode: who has none waits for others'."""

KINDS = 8
"""A common past of 3, 4 to 7, 8 to 15, … tokens; kinds below are not used."""
FIRST_GUESS = (0.0, 0.0, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9)
"""The chance that a draft comes true, by kind, until enough drafts have been counted."""
ALIKE = 4.0
"""Tries of its own after which a sequence counts for as much as all others together."""
KEPT, KEPT_OF_ALL = 0.95, 0.998
"""What a try leaves of the weight of those before it."""


def kind_of(common: int) -> int:
    return min(common.bit_length(), KINDS - 1)


class Acceptance:
    """How often what a history expects comes true, by how much of the past it has in common with.

    Of one sequence, and (`of_all` None) of all together, which is what a sequence is taken for while it is new.
    """

    def __init__(self, of_all: Acceptance | None = None) -> None:
        self._of_all = of_all
        self._kept = KEPT if of_all else KEPT_OF_ALL
        self._tries = [0.0] * KINDS
        self._hits = [0.0] * KINDS

    def count(self, common: int, *, hit: bool) -> None:
        """A token was expected with so much in common, and came true or not."""
        kind = kind_of(common)
        self._tries[kind] = self._tries[kind] * self._kept + 1
        self._hits[kind] = self._hits[kind] * self._kept + hit
        if self._of_all is not None:
            self._of_all.count(common, hit=hit)

    def chance(self, common: int) -> float:
        """The probability that the next expected token comes true."""
        kind = kind_of(common)
        guess = FIRST_GUESS[kind] if self._of_all is None else self._of_all.chance(common)
        return (self._hits[kind] + ALIKE * guess) / (self._tries[kind] + ALIKE)


class Drafter:
    """What one sequence may say next."""

    def __init__(self, token_ids: Several[int], of_all: Acceptance) -> None:
        self.history = History(token_ids)
        self.acceptance = Acceptance(of_all)

    def follow(self, num_known: int) -> None:
        """Take in the sequence's tokens up to number `num_known`, counting which of them were expected."""
        history = self.history
        if history.reads and not history.read(num_known):
            return
        while history.num_known < num_known and not history.reads:
            common, place = history.common, history.num_known
            hit = history.follow(history.token_ids[place])
            if hit is not None:
                self.acceptance.count(common, hit=hit)

    def chance(self, number: int) -> float:
        """The probability that draft `number` comes true, given that the drafts before it have."""
        return self.acceptance.chance(self.history.common + number)


MEASURED = 5
"""Measurements of a number of rows; their median counts, since a step may be late by chance."""
STALE = 1024
"""Steps after which a number of rows that no step had is forgotten."""
PER_ROW = 0.03
"""What one more row is guessed to cost, as a share of a step of one row."""
EXACT = 32
"""Up to so many rows each number is for itself; above, numbers within an eighth are one."""


def _bucket(rows: int) -> int:
    if rows <= EXACT:
        return rows
    unit = 1 << (rows.bit_length() - 4)
    return max(EXACT + 1, rows // unit * unit)


@dataclass(slots=True)
class _Measured:
    last: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED))
    seconds: float = 0.0  # their median
    last_step: int = 0

    def add(self, seconds: float, step: int) -> None:
        self.last.append(seconds)
        self.last_step = step
        self.seconds = sorted(self.last)[(len(self.last) - 1) // 2]


class StepTimes:
    """How long a step of so many rows takes, learned from the steps that run.

    Steps of few rows are all measured. A number of rows that has not been seen lately is taken for what lies between
    its neighbours, and beyond them for a little dearer than the last, so that it is tried where it might pay. More rows
    take no less time: where measurements say so, they were late or early by chance, and what is between counts.
    Otherwise the luckiest number of rows would be chosen.
    """

    def __init__(self) -> None:
        self._by_rows: dict[int, _Measured] = {}
        self._num_steps = 0
        self._curve: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def add(self, rows: int, seconds: float) -> None:
        """A step is over."""
        self._num_steps += 1
        self._by_rows.setdefault(_bucket(rows), _Measured()).add(seconds, self._num_steps)
        self._curve = None
        if self._num_steps % STALE == 0:
            old = self._num_steps - STALE
            self._by_rows = {rows: one for rows, one in self._by_rows.items() if one.last_step > old}

    def of(self, first: int, count: int) -> NDArray[np.float64] | None:
        """Seconds of steps of `first`, `first` + 1, … rows, `count` in all; None where nothing has been measured."""
        if not self._by_rows:
            return None
        if self._curve is None:
            known = sorted(self._by_rows)
            measured = np.array([self._by_rows[n].seconds for n in known])
            above, below = np.maximum.accumulate(measured), np.minimum.accumulate(measured[::-1])[::-1]
            self._curve = np.array(known, dtype=np.float64), (above + below) / 2
        rows, seconds = self._curve
        asked = np.arange(first, first + count)
        beyond = np.maximum(asked - rows[-1], 0.0) * PER_ROW * seconds[-1] / (1 + PER_ROW * (rows[-1] - 1))
        found: NDArray[np.float64] = np.interp(asked, rows, seconds) + beyond
        return found


class Speculator:
    """Plans drafts for all sequences of an engine."""

    def __init__(self, *, max_num_seqs: int) -> None:
        self.step_times = StepTimes()
        self._acceptance = Acceptance()
        self._max_rows = max(MAX_ROWS, max_num_seqs)

    def plan(self, decoding: Several[Sequence], *, num_others: int, most: int) -> dict[Sequence, list[int]]:
        """Drafts for sequences that decode in a step with `num_others` rows besides; `most` of them in all."""
        most = min(most, self._max_rows - len(decoding))
        may = [sequence for sequence in decoding if sequence.request.speculation and sequence.num_more_drafts > 0]
        drafters = [(sequence, self._drafter(sequence)) for sequence in may]
        drafters = [(sequence, one) for sequence, one in drafters if one.history.place is not None]
        first = len(decoding) + num_others
        seconds = self.step_times.of(first, most + 1) if most > 0 and drafters else None
        if seconds is None:
            return {}
        order, tokens = _likeliest(drafters, most)
        if len(decoding) > 1:
            tokens = tokens[: int((seconds[1:] <= MOST_LONGER * seconds[0]).sum())]
        rates = (len(decoding) + np.array([0.0, *tokens])) / seconds[: len(tokens) + 1]
        best = int(rates.argmax())
        if rates[best] < LEAST_GAIN * rates[0]:
            return {}
        counts = np.bincount(order[:best], minlength=len(drafters)).tolist()
        return {
            sequence: one.history.expected(count)
            for (sequence, one), count in zip(drafters, counts, strict=True)
            if count
        }

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence.drafter is None:
            sequence.drafter = Drafter(sequence.token_ids, self._acceptance)
        drafter = sequence.drafter
        drafter.follow(len(sequence.token_ids) - sequence.num_pending)
        return drafter


def _likeliest(drafters: Several[tuple[Sequence, Drafter]], most: int) -> tuple[list[int], list[float]]:
    """(whose drafts are taken, one after the other; tokens that so many are expected to bring)."""
    heap = [(-drafter.chance(0), index, 1) for index, (_, drafter) in enumerate(drafters)]
    heapify(heap)
    order: list[int] = []
    tokens: list[float] = []
    while heap and len(order) < most and -heap[0][0] >= LEAST_CHANCE:
        chance, index, number = heap[0]
        order.append(index)
        tokens.append((tokens[-1] if tokens else 0.0) - chance)
        sequence, drafter = drafters[index]
        more = number < min(MAX_DRAFTS, sequence.num_more_drafts)
        heapreplace(heap, (chance * drafter.chance(number) if more else 0.0, index, number + 1))
    return order, tokens
