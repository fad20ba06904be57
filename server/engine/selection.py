"""Where rows of replies may choose the far keys that they read: by the deployment's leave, on the CPU, alone."""

from __future__ import annotations

from prerope.cache.attention.selection import UNIT, WINDOW
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.errors import ConfigurationError, InvalidRequest

MOST_BLOCK = WINDOW // 2
"""Tokens of a block, for rows that choose to have some room in a step."""


def most_rows(block_size: int) -> int:
    """The most rows of a sequence in a step whose last row chooses: all blocks it chooses among are stored before."""
    return WINDOW - max(UNIT, block_size)


def check_deployment(config: EngineConfig, device_type: str, num_ranks: int) -> None:
    """ConfigurationError where ROPE_SELECT or ROPE_LAYERS does not go with the rest."""
    if config.rope_layers and config.rope.method != "auto":
        raise ConfigurationError(
            f"ROPE_LAYERS says what auto is in some layers, and ROPE_METHOD is {config.rope.method}: leave one of them "
            "unset"
        )
    if config.rope.select is None:
        return
    reason = None
    if device_type != "cpu":
        reason = f"is for the CPU, and DEVICE is {device_type}"
    elif num_ranks > 1:
        reason = f"is for one process, and TENSOR_PARALLEL_SIZE is {num_ranks}"
    elif not (UNIT % config.block_size == 0 or (config.block_size % UNIT == 0 and config.block_size <= MOST_BLOCK)):
        reason = (
            f"chooses {UNIT} keys together, and KV_BLOCK_SIZE is {config.block_size}: it must divide {UNIT}, or be a "
            f"multiple of it up to {MOST_BLOCK}"
        )
    if reason is not None:
        raise ConfigurationError(f"ROPE_SELECT is {config.rope.select}: it {reason}; leave it unset, or change that")


def check_request(spec: RopeSpec, deployment: RopeSpec) -> None:
    """InvalidRequest where a request wants what its deployment has made no room for."""
    if spec.select is not None and deployment.select is None:
        raise InvalidRequest(
            f"'rope.select' is {spec.select}, but this server keeps no bounds of keys to choose by: leave it out, or "
            "start the server with ROPE_SELECT",
            param="rope.select",
        )
