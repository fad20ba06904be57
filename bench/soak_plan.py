"""What the clients of a soak send: a seeded random plan of tasks. Knows no HTTP and no clock.

Each client has a plan of its own. It draws from a deck that is shuffled anew when it is used up, so that every kind of
task comes, in its share, in short runs too. The same seed gives the same tasks in the same order; how many of them are
reached depends on the machine. Long prompts belong to one client: two of the longest at once would fill the cache, and
whatever came after would measure the queue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.prompts import reference_words

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
OK_OR_BUSY = frozenset({200, 429})

DECK = {"short": 8, "shared": 4, "abort": 3, "slow": 1, "bad": 4, "crowd": 1}
"""How often each kind comes in one round of a client's deck."""

NUM_PREFIXES, PREFIX_TOKENS = 4, 600
SALTS = ("", "", "tenant-a", "tenant-b")
SHORT_TOKENS, OUTPUT_TOKENS = (16, 192), (6, 24)
ABORTED_TOKENS = (32, 512, 3000)
ABORT_WITHIN_S = 4.0
CROWD, CROWD_CHOICES = 3, 60  # requests at once and sequences of each: together more than the queue takes
MANY_TOKENS = 512  # what an aborted request asks for: it does not end by itself first
SLOW_OUTPUT_TOKENS, SLOW_LOGPROBS, SLOW_PAUSE_S = 24, 20, 0.02


@dataclass(frozen=True, slots=True)
class Task:
    """One request and what its client does with it.

    Attributes:
        kind: what it is counted as.
        body: JSON-able, or bytes that are sent as they are.
        statuses: what the server may answer; anything else fails the soak.
        key: of the API: True the right one, False none, or a text.
        abort_after_s: the client goes away this long after it began; None: never.
        read_pause_s: the client reads some bytes, pauses for so long, reads on; None: as they come.
        declared_bytes: the Content-Length to claim; None: the true one.
        num_clients: so many send it at the same time.
        detail: of `kind`, for messages: which bad input it is.
    """

    kind: str
    path: str
    body: Mapping[str, Any] | bytes
    statuses: frozenset[int] = OK_OR_BUSY
    method: str = "POST"
    key: bool | str = True
    abort_after_s: float | None = None
    read_pause_s: float | None = None
    declared_bytes: int | None = None
    num_clients: int = 1
    detail: str = ""

    @property
    def streams(self) -> bool:
        return not isinstance(self.body, bytes) and bool(self.body.get("stream"))


class Library:
    """The reference text as words and as the served model's token ids, to be cut into prompts."""

    def __init__(self, words: Sequence[str], ids: Sequence[int]) -> None:
        self._words, self._ids = words, ids

    def ids(self, draw: random.Random, num_tokens: int) -> list[int]:
        """`num_tokens` ids; the first four are drawn, so that no two prompts begin alike."""
        start = draw.randrange(len(self._ids))
        wanted = num_tokens - 4
        around = [*self._ids[start:], *self._ids] if start + wanted > len(self._ids) else self._ids[start:]
        while len(around) < wanted:
            around = [*around, *self._ids]
        return [*(draw.choice(self._ids) for _ in range(4)), *around[:wanted]]

    def text(self, draw: random.Random, num_tokens: int) -> str:
        """About `num_tokens` tokens of text with a label before it."""
        num_words = max(1, int(num_tokens * len(self._words) / len(self._ids)))
        start = draw.randrange(max(1, len(self._words) - num_words))
        return f"Note {draw.getrandbits(32):x}. " + " ".join(self._words[start : start + num_words])


def read_library(tokenize: Callable[[str], Sequence[int]], num_words: int = 30_000, piece: int = 2_000) -> Library:
    """The first words of the reference, tokenised in pieces."""
    words = reference_words()[:num_words]
    ids = [i for at in range(0, len(words), piece) for i in tokenize(" ".join(words[at : at + piece]))]
    return Library(words, ids)


@dataclass(slots=True)
class MixedPlan:
    """Everything but long prompts: short ones, shared prefixes, aborts, slow readers, bad input and crowds."""

    library: Library
    bad: Sequence[Task]
    seed: int
    client: int
    pause_s: float = 1.0
    _deck: list[str] = field(default_factory=list)
    _bad_deck: list[Task] = field(default_factory=list)
    _draw: random.Random = field(init=False)
    _prefixes: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._draw = random.Random(f"{self.seed}, client {self.client}")
        common = random.Random(f"{self.seed}, prefixes")  # the same for all clients: this is what is shared
        self._prefixes = [self.library.ids(common, PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]

    def pause(self) -> float:
        """Seconds until the next task."""
        return self._draw.expovariate(1 / self.pause_s)

    def next(self) -> Task:
        if not self._deck:
            self._deck = [kind for kind, count in DECK.items() for _ in range(count)]
            self._draw.shuffle(self._deck)
        return self.task(self._deck.pop())

    def task(self, kind: str) -> Task:
        """A task of this kind."""
        makers = {
            "short": self._short,
            "shared": self._shared,
            "abort": self._abort,
            "slow": self._slow,
            "bad": self._next_bad,
            "crowd": self._crowd,
        }
        return makers[kind]()

    def _short(self) -> Task:
        path = self._draw.choice((GENERATE, COMPLETIONS, CHAT))
        num_tokens = self._draw.randint(*SHORT_TOKENS)
        body = self._sampling() | {"max_tokens": self._draw.randint(*OUTPUT_TOKENS)}
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": self.library.text(self._draw, num_tokens)}]
        else:
            as_ids = self._draw.random() < 0.5
            body["prompt"] = (self.library.ids if as_ids else self.library.text)(self._draw, num_tokens)
        return Task("short", path, self._maybe_streamed(path, body))

    def _shared(self) -> Task:
        prompt = self._draw.choice(self._prefixes) + self.library.ids(self._draw, self._draw.randint(8, 64))
        path = self._draw.choice((GENERATE, COMPLETIONS))
        body = {"prompt": prompt, "max_tokens": self._draw.randint(*OUTPUT_TOKENS), "temperature": 0}
        salt = self._draw.choice(SALTS)
        if salt:
            body["cache_salt"] = salt
        return Task("shared", path, self._maybe_streamed(path, body))

    def _abort(self) -> Task:
        path = self._draw.choice((GENERATE, COMPLETIONS))
        prompt = self.library.ids(self._draw, self._draw.choice(ABORTED_TOKENS))
        body = {"prompt": prompt, "max_tokens": MANY_TOKENS, "ignore_eos": True}
        if path == COMPLETIONS:
            body["n"] = self._draw.choice((1, 1, 3))
        return Task(
            "abort", path, self._maybe_streamed(path, body), abort_after_s=self._draw.uniform(0, ABORT_WITHIN_S)
        )

    def _slow(self) -> Task:
        """Log-probabilities make each event some kilobytes, so that buffers fill; every third such client vanishes."""
        body = {
            "prompt": self.library.ids(self._draw, self._draw.randint(*SHORT_TOKENS)),
            "max_tokens": SLOW_OUTPUT_TOKENS,
            "logprobs": SLOW_LOGPROBS,
            "ignore_eos": True,
            "stream": True,
        }
        vanishes = self._draw.random() < 1 / 3
        abort_after_s = self._draw.uniform(0, 2 * ABORT_WITHIN_S) if vanishes else None
        return Task("slow", GENERATE, body, abort_after_s=abort_after_s, read_pause_s=SLOW_PAUSE_S)

    def _crowd(self) -> Task:
        """Some of them are refused where the queue is as short as that of a server which the soak starts."""
        body = {"prompt": self.library.ids(self._draw, 8), "max_tokens": 3, "n": CROWD_CHOICES}
        return Task("crowd", COMPLETIONS, self._maybe_streamed(COMPLETIONS, body), num_clients=CROWD)

    def _next_bad(self) -> Task:
        if not self._bad_deck:
            self._bad_deck = list(self.bad)
            self._draw.shuffle(self._bad_deck)
        return self._bad_deck.pop()

    def _sampling(self) -> dict[str, Any]:
        choices: tuple[dict[str, Any], ...] = (
            {"temperature": 0, "ignore_eos": True},
            {"temperature": 0.8, "top_p": 0.9, "seed": self._draw.randrange(1000)},
            {"temperature": 1.0, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
            {"temperature": 0, "stop": ["\n\n", "the end"], "min_tokens": 2},
            {"temperature": 0, "rope": {"method": "rerope", "window": 64}},
        )
        return dict(self._draw.choice(choices))

    def _maybe_streamed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Two of three streamed."""
        return streamed(path, body) if self._draw.random() < 2 / 3 else body


@dataclass(slots=True)
class LongPlan:
    """Long prompts one after another, the shorter lengths twice as often as the longest; always streamed."""

    library: Library
    lengths: Sequence[int]
    seed: int
    pause_s: float
    _deck: list[int] = field(default_factory=list)
    _draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._draw = random.Random(f"{self.seed}, long prompts")

    def pause(self) -> float:
        """Seconds until the next task."""
        return self._draw.uniform(0.5, 1.5) * self.pause_s

    def next(self) -> Task:
        if not self._deck:
            self._deck = [n for n in self.lengths for _ in range(1 if n == max(self.lengths) else 2)]
            self._draw.shuffle(self._deck)
        return self.task(self._deck.pop())

    def task(self, num_tokens: int) -> Task:
        """A prompt of exactly `num_tokens`."""
        path = self._draw.choice((GENERATE, COMPLETIONS))
        body = {"prompt": self.library.ids(self._draw, num_tokens), "max_tokens": 16, "ignore_eos": True}
        return Task(length_name(num_tokens), path, streamed(path, body))


def length_name(num_tokens: int) -> str:
    """How a long prompt's class is called: 8k, 16k."""
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else f"{num_tokens:,}"


def streamed(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with `stream`, and with a usage at the end where that has to be asked for."""
    return body | {"stream": True} | ({"return_progress": True} if path == GENERATE else _USAGE)


_USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
