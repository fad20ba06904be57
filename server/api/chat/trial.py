"""A model's chat template, tried before it is run for anybody: it is a program that comes with a model's files.

One that takes a second of CPU time, or more memory than a chat may, for a single word would hold up everybody where
chats are read. It is never run again: chats are refused, with the reason, and everything else is served.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Protocol

from prerope.server.api.chat.growth.bounded import is_bounded
from prerope.server.api.chat.template import render_chat
from prerope.server.errors import InvalidRequest
from prerope.server.tokenizer import Tokenizer
from prerope.server.workers.lanes import INLINE_BYTES
from prerope.server.workers.messages import Limits
from prerope.server.workers.zygote import ends_well

LIMITS = Limits(cpu_s=2, memory_bytes=256 * 2**20)
QUICK_S = 0.02
"""Of one word: longer, and chats are not written on the event loop, however short they are."""

MOST_WRITTEN = 2**28
"""Characters, as many as a worker has bytes. On the event loop nothing limits memory, and no single step of the
interpreter's can be cut off."""

WORD = [{"role": "user", "content": "Hello"}]


class HasTokenizer(Protocol):
    """What a trial needs of the workers' world."""

    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """unusable: why the template is not to be run. refusal: what it says to one word. quick: it may run on the loop."""

    unusable: str | None = None
    refusal: str | None = None
    quick: bool = True


@dataclass(frozen=True, slots=True)
class TemplateTrial:
    """A task for a worker, whose zygote has `guard`ed the tokenizer."""

    def run(self, world: HasTokenizer) -> Outcome:
        refusal, took = None, []
        for _ in range(3):  # the first may begin with what others need, too
            began = time.process_time()
            try:
                render_chat(world.tokenizer, WORD)
            except InvalidRequest as error:
                refusal = error.message
            took.append(time.process_time() - began)
        fault = world.tokenizer.template_fault
        return Outcome(fault, refusal, fault is not None or (min(took) < QUICK_S and is_tame(world.tokenizer)))


def is_tame(tokenizer: Tokenizer) -> bool:
    """Whether the chat template may be run on the event loop, where it is cut off if it takes long."""
    named = tokenizer.hf.chat_template or ""
    templates = [named] if isinstance(named, str) else named.values()
    return all(is_bounded(template, INLINE_BYTES, MOST_WRITTEN) for template in templates)


def guard(tokenizer: Tokenizer) -> None:
    """Run the template on one word, in a process that can be killed; mark it as unusable where that does not end well.

    For a process of one thread. Where it did end well the template is run here, too, so that it is compiled.
    """

    def write() -> None:
        with contextlib.suppress(InvalidRequest):
            render_chat(tokenizer, WORD)

    if not tokenizer.hf.chat_template:
        return
    if ends_well(write, LIMITS):
        write()
        return
    tokenizer.template_fault = (
        f"This model's chat template cannot be used: for one word it takes more than {LIMITS.cpu_s} s of CPU time or "
        f"{LIMITS.memory_bytes // 2**20} MiB of memory. Correct chat_template (in tokenizer_config.json, or "
        "chat_template.jinja), or use /v1/completions or /generate with the whole prompt."
    )
