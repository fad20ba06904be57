"""What the clients of a soak send: a seeded random plan of tasks. Knows no HTTP and no clock.

Each client draws from a deck that is shuffled anew when it is used up, so that every kind of task comes, in its share,
in short runs too. Long prompts belong to one client: two of the longest at once would fill the cache, and whatever
came after would measure the queue.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.shared.text import Library
from bench.soak.hostile import CHAT, COMPLETIONS, GENERATE, HOSTILE, encoded

ANSWERED_OR_REFUSED = frozenset({200, 400, 413, 429})
DECK = {"short": 8, "shared": 4, "abort": 3, "slow": 1, "bad": 4, "crowd": 1, "hostile": 1}
"""How often each kind comes in one round of a client's deck."""

NUM_PREFIXES, PREFIX_TOKENS = 4, 600
SHORT_TOKENS, OUTPUT_TOKENS = (16, 192), (6, 24)
ABORTED_TOKENS, ABORT_WITHIN_S = (32, 512, 3000), 4.0
CROWD, CROWD_CHOICES = 3, 60  # requests at once and sequences of each: together more than the queue takes
MANY_TOKENS = 512  # what an aborted request asks for: it does not end by itself first
SLOW_PAUSE_S = 0.02
TOO_LARGE_BYTES, TOO_LONG_CHARS = 17 * 2**20, 6_000_000  # of a body; of a prompt


@dataclass(frozen=True, slots=True)
class Task:
    """One request and what its client does with it.

    Attributes:
        kind: what it is counted as.
        body: JSON-able, or bytes that are sent as they are.
        statuses: what the server may answer; anything else fails the soak.
        key: of the API: True the right one, False none, or a text.
        abort_after_s: the client goes away this long after it began; None: never.
        read_pause_s: the client reads some bytes, pauses for so long, reads on; 0: as they come.
        num_clients: so many send it at the same time.
        detail: of `kind`, for messages: which bad input it is.
    """

    kind: str
    path: str
    body: Mapping[str, Any] | bytes
    statuses: frozenset[int] = frozenset({200, 429})
    method: str = "POST"
    key: bool | str = True
    abort_after_s: float | None = None
    read_pause_s: float = 0.0
    num_clients: int = 1
    detail: str = ""

    @property
    def streams(self) -> bool:
        return not isinstance(self.body, bytes) and bool(self.body.get("stream"))


class TaskMaker:
    """Makes one client's tasks of each kind; the same seed and client give the same tasks."""

    def __init__(self, library: Library, bad: Sequence[Task], seed: int, client: int) -> None:
        self._library, self._refused, self._bad_deck = library, bad, list[Task]()
        self.draw = random.Random(f"{seed}, client {client}")
        common = random.Random(f"{seed}, prefixes")  # the same for all clients: this is what is shared
        self._prefixes = [library.ids(common, PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]

    def mixed(self) -> Iterator[Task]:
        """Everything but long prompts, for ever."""
        deck = [kind for kind, count in DECK.items() for _ in range(count)]
        while True:
            yield from map(self.task, self.draw.sample(deck, len(deck)))

    def task(self, kind: str) -> Task:
        made: Task = getattr(self, f"_{kind}")()
        return made

    def _short(self) -> Task:
        draw, body = self.draw, self._sampling() | {"max_tokens": self.draw.randint(*OUTPUT_TOKENS)}
        path, num_tokens = draw.choice((GENERATE, COMPLETIONS, CHAT)), draw.randint(*SHORT_TOKENS)
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": self._library.text(draw, num_tokens)}]
        else:
            body["prompt"] = draw.choice((self._library.ids, self._library.text))(draw, num_tokens)
        return self._maybe_streamed("short", path, body)

    def _shared(self) -> Task:
        prompt = self.draw.choice(self._prefixes) + self._library.ids(self.draw, self.draw.randint(8, 64))
        body = {"prompt": prompt, "max_tokens": self.draw.randint(*OUTPUT_TOKENS), "temperature": 0}
        salt = self.draw.choice(("", "", "tenant-a", "tenant-b"))
        path = self.draw.choice((GENERATE, COMPLETIONS))
        return self._maybe_streamed("shared", path, body | ({"cache_salt": salt} if salt else {}))

    def _abort(self) -> Task:
        path, prompt = self.draw.choice((GENERATE, COMPLETIONS)), self._ids(self.draw.choice(ABORTED_TOKENS))
        body = {"prompt": prompt, "max_tokens": MANY_TOKENS, "ignore_eos": True}
        body |= {"n": self.draw.choice((1, 1, 3))} if path == COMPLETIONS else {}
        return self._maybe_streamed("abort", path, body, abort_after_s=self.draw.uniform(0, ABORT_WITHIN_S))

    def _slow(self) -> Task:
        """Log-probabilities make each event some kilobytes, so that buffers fill; every third such client vanishes."""
        body = {"prompt": self._ids(self.draw.randint(*SHORT_TOKENS)), "max_tokens": 24, "logprobs": 20}
        after = self.draw.uniform(0, 2 * ABORT_WITHIN_S) if self.draw.random() < 1 / 3 else None
        body |= {"ignore_eos": True, "stream": True}
        return Task("slow", GENERATE, body, abort_after_s=after, read_pause_s=SLOW_PAUSE_S)

    def _crowd(self) -> Task:
        """Some of them are refused where the queue is as short as that of a server which the soak starts."""
        body = {"prompt": self._ids(8), "max_tokens": 3, "n": CROWD_CHOICES}
        return self._maybe_streamed("crowd", COMPLETIONS, body, num_clients=CROWD)

    def _bad(self) -> Task:
        self._bad_deck = self._bad_deck or self.draw.sample(self._refused, len(self._refused))
        return self._bad_deck.pop()

    def _hostile(self) -> Task:
        """One of the bodies by which one client would hold up the others."""
        name = self.draw.choice(sorted(HOSTILE))
        return _hostile(name, *self.draw.choice(HOSTILE[name](1)))

    def _ids(self, num_tokens: int) -> list[int]:
        return self._library.ids(self.draw, num_tokens)

    def _sampling(self) -> dict[str, Any]:
        choices: tuple[dict[str, Any], ...] = (
            {"temperature": 0, "ignore_eos": True},
            {"temperature": 0.8, "top_p": 0.9, "min_tokens": 1, "seed": self.draw.randrange(1000)},
            {"temperature": 1.0, "top_k": 40, "min_p": 0.05, "min_tokens": 1, "repetition_penalty": 1.1},
            {"temperature": 0, "stop": ["\n\n", "the end"], "min_tokens": 2},
            {"temperature": 0, "min_tokens": 1, "rope": {"method": "rerope", "window": 64}},
        )
        return self.draw.choice(choices)

    def _maybe_streamed(self, kind: str, path: str, body: dict[str, Any], **more: Any) -> Task:
        """Two of three streamed."""
        return Task(kind, path, streamed(path, body) if self.draw.random() < 2 / 3 else body, **more)


def long_tasks(library: Library, lengths: Sequence[int], seed: int) -> Iterator[Task]:
    """Long prompts, the shorter lengths twice as often as the longest; always streamed."""
    draw = random.Random(f"{seed}, long prompts")
    deck = [n for n in lengths for _ in range(1 if n == max(lengths) else 2)]
    while True:
        yield from (long_task(library, draw, n) for n in draw.sample(deck, len(deck)))


def long_task(library: Library, draw: random.Random, num_tokens: int) -> Task:
    path = draw.choice((GENERATE, COMPLETIONS))
    body = {"prompt": library.ids(draw, num_tokens), "max_tokens": 16, "ignore_eos": True}
    return Task(f"{num_tokens / 1024:g}k", path, streamed(path, body))


def streamed(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with `stream`, and with a usage at the end where that has to be asked for."""
    more = {"return_progress": True} if path == GENERATE else {"stream_options": {"include_usage": True}}
    return body | {"stream": True} | more


def hostile_tasks() -> Iterator[Task]:
    """Each of the bodies by which one client would hold up the others, once."""
    yield from (_hostile(name, path, body) for name, posts in HOSTILE.items() for path, body in posts(1))


def _hostile(name: str, path: str, body: Any) -> Task:
    return Task("hostile", path, encoded(body), ANSWERED_OR_REFUSED, detail=name)


def bad_tasks(max_model_len: int) -> list[Task]:
    """Requests that must be refused, each with the status that it must get."""
    hello = {"prompt": "Hello"}
    cases: list[tuple[str, str, Mapping[str, Any] | bytes, int]] = [
        ("broken JSON", GENERATE, b'{"prompt": "Hel', 400),
        ("empty body", GENERATE, b"", 400),
        ("no object", COMPLETIONS, b"[1, 2]", 400),
        ("half a surrogate pair", GENERATE, b'{"prompt": "\\ud83d"}', 400),
        ("not UTF-8", GENERATE, b'{"prompt": "\xff\xfe"}', 400),
        ("unknown field", GENERATE, hello | {"max_token": 4}, 400),
        ("wrong type", GENERATE, hello | {"max_tokens": "many"}, 400),
        ("out of range", GENERATE, hello | {"temperature": -1}, 400),
        ("empty prompt", GENERATE, {"prompt": ""}, 400),
        ("no such token", GENERATE, {"prompt": [1, 2**31]}, 400),
        ("too many tokens", GENERATE, {"prompt": [7] * (max_model_len + 1), "stream": True}, 400),
        ("too many characters", GENERATE, {"prompt": "x" * TOO_LONG_CHARS}, 400),
        ("too long with its output", GENERATE, hello | {"max_tokens": max_model_len}, 400),
        ("no such method", GENERATE, hello | {"rope": {"method": "roap"}}, 400),
        ("unsupported field", COMPLETIONS, hello | {"suffix": "!"}, 400),
        ("no messages", CHAT, {"messages": []}, 400),
        ("no such role", CHAT, {"messages": [{"role": "nobody", "content": "Hello"}]}, 400),
        ("nothing to tokenise", "/tokenize", {}, 400),
        ("no such token to detokenise", "/detokenize", {"tokens": [-1]}, 400),
        ("no such route", "/v1/engines", {}, 404),
        ("body too large", GENERATE, b"x" * TOO_LARGE_BYTES, 413),
    ]
    tasks = [Task("bad", path, body, frozenset({status}), detail=why) for why, path, body, status in cases]
    tasks.append(Task("bad", GENERATE, b"", frozenset({405}), method="GET", detail="wrong method"))
    keys: tuple[bool | str, ...] = (False, "not-the-key")
    return [*tasks, *(Task("bad", GENERATE, hello, frozenset({401}), key=key, detail="no right key") for key in keys)]
