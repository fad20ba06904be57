"""A reply as it comes: progress of the prompt on standard error, text on standard output, figures at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

from prerope.server.cli.client import Client
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

aside = Console(stderr=True, highlight=False)
"""What is not the reply: a pipe gets the reply alone."""

ENDINGS = {"stop": "the model ended it", "length": "max tokens", "abort": "the server ended it"}


class _Reading:
    """The bar, from the first moment until the first token; none where nobody watches."""

    def __init__(self, num_tokens: int | None) -> None:
        self._bar = Progress(
            TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens · {task.fields[note]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=aside, transient=True,
        )  # fmt: skip
        self._task: TaskID = self._bar.add_task("", total=num_tokens, note="waiting")
        self._shown = aside.is_terminal  # elsewhere each stop would write an empty line
        if self._shown:
            self._bar.start()
        self._began = time.perf_counter()

    def show(self, total: int, cached: int, processed: int) -> None:
        rate = (processed - cached) / max(time.perf_counter() - self._began, 1e-3)
        note = f"{rate:,.0f} a second" + (f" · {cached:,} from the cache" if cached else "")
        self._bar.update(self._task, total=total, completed=processed, note=note)

    def stop(self) -> None:
        """Once or again."""
        if self._shown:
            self._bar.stop()
        self._shown = False


def stream_reply(client: Client, body: dict[str, Any]) -> str:
    """Send `body` to /generate and write what comes; the reply's text. Ctrl-C ends it and keeps what is there."""
    text, num_tokens, first = "", 0, 0.0
    began, reading = time.perf_counter(), _Reading(_known_length(body))
    ending: dict[str, Any] = {}
    try:
        for event in client.events("/generate", {**body, "stream": True, "return_progress": True}):
            if "progress" in event:
                reading.show(**event["progress"])
            if event.get("token_ids"):
                reading.stop()
                first = first or time.perf_counter()
                num_tokens += len(event["token_ids"])
                text += event["text"]
                sys.stdout.write(event["text"])
                sys.stdout.flush()
            if "finish_reason" in event:
                ending = event
    except KeyboardInterrupt:
        ending = {"finish_reason": "you ended it"}
    finally:
        reading.stop()
    sys.stdout.write("\n")
    sys.stdout.flush()
    aside.print(f"[dim]{_figures(ending, num_tokens, began, first)}[/dim]", soft_wrap=True)
    return text


def _known_length(body: dict[str, Any]) -> int | None:
    """Tokens of the prompt as far as they are known before it is sent."""
    ids = body["prompt"]
    return len(ids) if isinstance(ids, list) and "documents" not in body else None


def _figures(ending: dict[str, Any], num_tokens: int, began: float, first: float) -> str:
    now, facts = time.perf_counter(), []
    usage = ending.get("usage")
    if usage:
        cached = max(usage["cached_tokens"], sum(one["cached_tokens"] for one in ending.get("documents", ())))
        facts.append(f"{usage['prompt_tokens']:,} tokens read ({cached:,} from the cache) in {first - began:.1f} s")
    rate = f" at {(num_tokens - 1) / (now - first):.1f} a second" if num_tokens > 1 and now > first else ""
    facts.append(f"{num_tokens} written{rate}")
    if "rope" in ending:
        facts.append(str(ending["rope"]["method"]))
    reason = ending.get("finish_reason", "")
    return " · ".join([*facts, ENDINGS.get(reason, reason)])
