"""Worlds and tasks for workers. A zygote imports this module, and each that a test begins would pay for more than this:
what takes a second to import is imported where it is used.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer


class NoWorld:
    """Nothing that a task needs."""

    def prepare(self) -> None:
        pass


@dataclass(frozen=True)
class LargeWorld(NoWorld):
    """More than a socket keeps for who does not read."""

    text: str = field(default_factory=lambda: "a" * 2**22)


@dataclass(frozen=True)
class Ended:
    """Ends its process: by a signal, or with a code (0 and up); the first time only, where `once` is a file to be."""

    how: int
    once: str = ""

    def run(self, world: Any) -> str:  # noqa: ARG002
        if not self.once or not os.path.exists(self.once):
            if self.once:
                open(self.once, "x").close()
            if self.how >= 0:
                os._exit(self.how)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), -self.how)
        return "done"


@dataclass(frozen=True)
class Manner:
    """How it is with others."""

    def run(self, world: Any) -> tuple[int, int, int]:  # noqa: ARG002
        return os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), os.getsid(0)


@dataclass(frozen=True)
class Unsendable:
    def run(self, world: Any) -> Any:  # noqa: ARG002
        return lambda: None


@dataclass(frozen=True)
class Busy:
    """For ever. began: a file to be."""

    began: str = ""

    def run(self, world: Any) -> None:  # noqa: ARG002
        if self.began:
            open(self.began, "x").close()
        while True:
            pass


@dataclass(frozen=True)
class Large:
    """What fits, but not twice: it is pickled."""

    def run(self, world: Any) -> str:  # noqa: ARG002
        return "x" * 150 * 2**20


@dataclass(frozen=True)
class Full:
    """A world in whose zygote no process can be forked while there is a file."""

    file: str

    def prepare(self) -> None:
        fork = os.fork

        def refuse() -> int:
            if os.path.exists(self.file):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return fork()

        os.fork = refuse


def tokenizer_with(template: str) -> Tokenizer:
    """A tokenizer of the alphabet, with a chat template."""
    from prerope.server.tokenizer import Tokenizer
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    pieces = {piece: index for index, piece in enumerate(("<s>", *"abcdefghijklmnopqrstuvwxyzH"))}
    hf = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE(pieces, [])), eos_token="<s>")
    hf.chat_template = template
    return Tokenizer(hf)


@dataclass(frozen=True)
class Templates:
    """Templates that a zygote is to try."""

    templates: tuple[str, ...]

    def prepare(self) -> None:
        from prerope.server.api.chat.trial import guard

        for template in self.templates:
            tokenizer = tokenizer_with(template)
            guard(tokenizer)
            self.found.append(tokenizer.template_fault is None)

    found: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class WhatWasFound:
    def run(self, world: Templates) -> list[bool]:
        return world.found
