"""Server-sent events of a completion stream: raw bytes with arrival times in, token arrival times out.

Reading and understanding are apart: while a stream runs only bytes and the clock are kept, and everything is
decoded after its end, so that the measuring client takes little from a server on the same cores.

Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class StreamFailed(Exception):
    """The server refused the request, or sent an error inside the stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One `data:` payload of a stream that carries generated text, and when it was complete.

    `num_tokens` is how many tokens the server says the event carries, or None where it does not say.
    """

    at: float
    text: str
    num_tokens: int | None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished stream. `token_times` has one entry a generated token; tokens of one event share their time."""

    started: float
    token_times: tuple[float, ...]
    prompt_tokens: int
    finish_reason: str | None

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.started

    @property
    def finished(self) -> float:
        return self.token_times[-1]

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the one before it: 0 within an event."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds a token after the first; None where there is only one."""
        num_gaps = len(self.token_times) - 1
        return (self.finished - self.token_times[0]) / num_gaps if num_gaps else None


def split_events(chunks: Iterable[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """`(arrival, payload)` of every `data:` event, whatever pieces the network cut the stream into.

    Splits on bytes: text may hold U+2028 and the like unescaped, which str.splitlines would take for line ends.
    Comments and other fields are skipped.
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


def read_completion(started: float, chunks: Sequence[tuple[float, bytes]]) -> Completion:
    """Decode a /v1/completions or /v1/chat/completions stream.

    Raises:
        StreamFailed: it has an error event, no token, or says nowhere how many tokens it had.
    """
    events: list[Event] = []
    usage: dict[str, Any] = {}
    finish_reason, so_far = None, 0
    for at, payload in split_events(chunks):
        if payload == b"[DONE]":
            continue
        body = _decode(payload)
        usage = body.get("usage") or usage
        for choice in body.get("choices") or ():
            finish_reason = choice.get("finish_reason") or finish_reason
            num_tokens = _tokens_said(choice, body, so_far)
            so_far += num_tokens or 0
            events.append(Event(at, _text(choice), num_tokens))
    if "completion_tokens" not in usage:
        raise StreamFailed("the stream ended without a usage: the number of tokens is not known")
    counts = tokens_per_event(events, usage["completion_tokens"])
    times = tuple(event.at for event, n in zip(events, counts, strict=True) for _ in range(n))
    if not times:
        raise StreamFailed("the stream carried no token")
    return Completion(started, times, int(usage.get("prompt_tokens", 0)), finish_reason)


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        body = json.loads(payload)
    except ValueError:
        raise StreamFailed(f"not JSON: {payload[:200]!r}") from None
    if not isinstance(body, dict):
        raise StreamFailed(f"not a JSON object: {payload[:200]!r}")
    if body.get("error"):
        raise StreamFailed(str(body["error"]))
    return body


def _text(choice: dict[str, Any]) -> str:
    text = choice.get("text")
    if text is None:
        text = (choice.get("delta") or {}).get("content")
    return text or ""


def _tokens_said(choice: dict[str, Any], body: dict[str, Any], so_far: int) -> int | None:
    """From the event's token ids, or from a usage that grows with every event; None where it has neither."""
    if isinstance(choice.get("token_ids"), list):
        return len(choice["token_ids"])
    total = (body.get("usage") or {}).get("completion_tokens")
    return None if total is None else max(0, int(total) - so_far)


def tokens_per_event(events: Sequence[Event], total: int) -> list[int]:
    """How many of a stream's `total` tokens each event brought.

    What the server says is taken where it says it of every event with text. Otherwise every event with text brought
    one token; where there are more tokens than such events, the surplus is shared out by length of text; where there
    are fewer (a server that splits a token's text), the first `total` of them count.
    """
    if all(event.num_tokens is not None for event in events if event.text):
        said = [event.num_tokens or 0 for event in events]
        if sum(said) == total:
            return said
    counts = [0] * len(events)
    bearing = [i for i, event in enumerate(events) if event.text] or list(range(len(events)))[:1]
    for i in bearing[:total]:
        counts[i] = 1
    surplus = total - len(bearing)
    if surplus > 0 and bearing:
        lengths = [max(1, len(events[i].text)) for i in bearing]
        for i, extra in zip(bearing, _apportion(surplus, lengths), strict=True):
            counts[i] += extra
    return counts


def _apportion(amount: int, weights: Sequence[int]) -> list[int]:
    """`amount` in whole shares by weight: largest remainders first, earlier ones first among equals."""
    exact = [amount * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: amount - sum(shares)]:
        shares[i] += 1
    return shares
