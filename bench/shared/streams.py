"""Server-sent events of a completion: raw bytes with arrival times in, token arrival times out.

While a stream runs only bytes and the clock are kept, and everything is decoded after its end, so that the measuring
client takes little from a server on the same cores. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import BenchError


class StreamFailed(BenchError):
    """The server refused the request, or its stream is not what it must be."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished stream. `token_times` has one entry a generated token; tokens of one event share their time."""

    started: float
    token_times: tuple[float, ...]
    prompt_tokens: int

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the one before it: 0 within an event."""
        return [after - before for before, after in itertools.pairwise(self.token_times)]

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds a token after the first; None where there is only one."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else None


def split_events(chunks: Iterable[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """`(arrival, payload)` of every `data:` event, whatever pieces the network cut the stream into.

    Splits on bytes: text may hold U+2028 and the like unescaped, which str.splitlines would take for line ends.
    """
    events: list[tuple[float, bytes]] = []
    rest, data = b"", list[bytes]()
    for at, chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                events.append((at, b"\n".join(data)))
                data = []
    return events


def decode_event(payload: bytes) -> dict[str, Any]:
    """Raises StreamFailed for what is no JSON object, and for an error."""
    try:
        body = json.loads(payload)
    except ValueError:
        raise StreamFailed(f"not JSON: {payload[:200]!r}") from None
    if not isinstance(body, dict) or body.get("error"):
        raise StreamFailed(str(body.get("error") if isinstance(body, dict) else f"not an object: {payload[:200]!r}"))
    return body


def read_completion(started: float, chunks: Sequence[tuple[float, bytes]]) -> Completion:
    """Decode a stream of /v1/completions, /v1/chat/completions or /generate.

    Raises:
        StreamFailed: it has an error event, no token, or no usage.
    """
    events: list[tuple[float, str, int | None]] = []  # arrival, text, tokens that the server says it carries
    usage: dict[str, Any] = {}
    so_far, stopped_at = 0, None
    for at, payload in split_events(chunks):
        if payload == b"[DONE]":
            continue
        body = decode_event(payload)
        usage = body.get("usage") or usage
        if any(one.get("finish_reason") == "stop" for one in (body, *body.get("choices", ()))):
            stopped_at = at
        for choice in body.get("choices") or ([body] if "token_ids" in body else ()):
            said = _tokens_said(choice, body, so_far)
            so_far += said or 0
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            events.append((at, text, said))
    if "completion_tokens" not in usage:
        raise StreamFailed("the stream ended without a usage: the number of tokens is not known")
    if not events and stopped_at is not None:  # a stop string has taken all text away, and is told of at the end
        events = [(stopped_at, "", None)]
    counts = tokens_per_event([text for _, text, _ in events], [n for _, _, n in events], usage["completion_tokens"])
    times = tuple(at for (at, _, _), n in zip(events, counts, strict=True) for _ in range(n))
    if not times:
        raise StreamFailed("the stream carried no token")
    return Completion(started, times, int(usage.get("prompt_tokens", 0)))


def _tokens_said(choice: dict[str, Any], body: dict[str, Any], so_far: int) -> int | None:
    """From the event's token ids, or from a usage that grows with every event; None where it has neither."""
    if isinstance(choice.get("token_ids"), list):
        return len(choice["token_ids"])
    total = (body.get("usage") or {}).get("completion_tokens")
    return None if total is None else max(0, int(total) - so_far)


def tokens_per_event(texts: Sequence[str], said: Sequence[int | None], total: int) -> list[int]:
    """How many of a stream's `total` tokens each event brought.

    What the server says is taken where it adds up. Otherwise every event with text brought one token; where there are
    more tokens than such events, the surplus is shared out by length of text; where fewer, the first ones count.
    """
    if sum(number or 0 for number in said) == total and all(
        n is not None for n, t in zip(said, texts, strict=True) if t
    ):
        return [number or 0 for number in said]
    bearing = [i for i, text in enumerate(texts) if text] or list(range(len(texts)))[:1]
    counts = [0] * len(texts)
    for i in bearing[:total]:
        counts[i] = 1
    surplus = max(0, total - len(bearing))
    ends = list(itertools.accumulate((max(1, len(texts[i])) for i in bearing), initial=0))
    for i, before, after in zip(bearing, ends, ends[1:], strict=False):
        counts[i] += round(surplus * after / ends[-1]) - round(surplus * before / ends[-1])
    return counts
