"""`python -m bench.fairness.server POLICY [flags of python -m prerope.server]`: the server with a scheduler to measure.

The app, its HTTP server and its start are the product's own; with the policy `ours` nothing is changed at all.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from prerope.server.__main__ import main as serve

from bench.fairness.policy import POLICIES, scheduling


def main() -> NoReturn:
    policy = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if policy not in POLICIES:
        sys.exit(f"bench.fairness.server: the first argument is one of {', '.join(POLICIES)}, not {policy!r}")
    with scheduling(policy):
        serve()


if __name__ == "__main__":
    main()
