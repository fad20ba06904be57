"""Rank 1 of tiny models: `python -m tests.engine.ranks.ranked`, which follows one model after the other.

A line of JSON on standard input is a model: {"kernels", "folder", "family", "config", "engine"}. What came of it is
printed, a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prerope.server.machine.imports import importing

with importing():
    import torch
    from prerope.server.engine.engine import Engine
    from prerope.server.errors import ConfigurationError
    from prerope.server.models.checks.probe import probe
    from prerope.server.models.cpu.build import prepare
    from prerope.server.models.model import Model
    from prerope.server.models.shares import share_out
    from prerope.server.ranks.group import Ranks
    from prerope.server.ranks.orders import follow

    from tests.engine.tiny_models import tiny, tiny_engine


def shared_engine(order: dict[str, Any], rank: int) -> Engine:
    """The engine of one of two ranks, probed. ConfigurationError where the model cannot be shared."""
    ranks = Ranks.join(Path(order["folder"]), rank, 2, on_gpus=False)
    transformers_model = tiny(order["family"], **order.get("config", {}))
    share_out(transformers_model, ranks)
    model = Model(transformers_model, ranks=ranks)
    probe(model)
    return tiny_engine(model, **order.get("engine", {}))


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if order["kernels"]:
            prepare(Path(order["kernels"]))
        try:
            follow(shared_engine(order, 1))
            print("done", flush=True)
        except ConfigurationError as error:
            print(f"refused: {error}", flush=True)


if __name__ == "__main__":
    main()
