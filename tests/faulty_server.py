"""`python -m tests.faulty_server FAULT [flags of the server]`: the server's own process, with one fault in it.

raise, exit   the fifth step raises a RuntimeError, a SystemExit
hang          the fifth step does not end
quote         the tokenizer raises an error that quotes the text, where it holds the word in QUOTED
"""

from __future__ import annotations

import sys
import time
from typing import Any

from prerope.server import __main__ as entry
from prerope.server.machine.imports import importing

with importing():
    from prerope.server.engine.engine import Engine
    from prerope.server.tokenizer import Tokenizer

ERRORS = {"raise": RuntimeError("a fault of the test"), "exit": SystemExit(7)}
QUOTED = "QUOTE-THIS"
GOOD_STEPS = 4


def main() -> None:
    fault = sys.argv.pop(1)
    if fault == "quote":
        _quote()
    else:
        _fail_in_step(fault)
    entry.main()


def _quote() -> None:
    encode = Tokenizer.encode

    def quoting(self: Tokenizer, text: str, **kwargs: Any) -> list[int]:
        if QUOTED in text:
            raise RuntimeError(f"cannot encode {text!r}")
        return encode(self, text, **kwargs)

    Tokenizer.encode = quoting  # type: ignore[method-assign]


def _fail_in_step(fault: str) -> None:
    forward, steps = Engine._forward, 0

    def faulty(self: Engine, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps <= GOOD_STEPS:
            return forward(self, *args)
        if fault == "hang":
            time.sleep(3600)
        raise ERRORS[fault]

    Engine._forward = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
