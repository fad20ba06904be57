"""From a checkpoint to an engine that serves it: weights, probe, cache, tiers, and on a GPU a warm-up and graphs."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from prerope.cache.cuda.tiles import use_kept
from prerope.cache.kernels.build import multiplies_pairs, multiply_pairs
from prerope.rope.model import ModelPositions
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.graphs.decode import capture_graphs
from prerope.server.engine.memory.sizing import CacheSize, check_recurrent, size_cache
from prerope.server.engine.memory.warm_up import warm_up
from prerope.server.engine.selection import check_deployment
from prerope.server.engine.tiers import Tiers, open_tier
from prerope.server.errors import ConfigurationError, PreRopeError, of_memory, words_of
from prerope.server.models.checks.probe import probe
from prerope.server.models.cpu.build import prepare
from prerope.server.models.cpu.trial import choose_arithmetic
from prerope.server.models.model import choose_device, load_model, resolve
from prerope.server.models.weights import DTYPES
from prerope.server.ranks.group import ALONE, Ranks

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

PER_ROW = {"longrope": "longrope", "dynamic_ntk": "dynamic"}
"""Methods that are not transformers' past the trained length, on purpose, by the names that configs have for them."""

Report = Callable[[str], None]
"""Gets a line as each stage begins."""


def load_engine(
    checkpoint: Checkpoint,
    config: EngineConfig,
    report: Report = lambda _: None,
    end_token_ids: frozenset[int] = frozenset(),
    ranks: Ranks = ALONE,
) -> Engine:
    """Weights, probe, cache. Raises ConfigurationError.

    end_token_ids: tokens that end a reply, beside those that the model's own configs name.
    ranks: all of them load at once; rank 0 schedules, and the others `follow`.
    """
    config = config.on(choose_device(config.device).type)
    if config.max_num_seqs > config.max_batched_tokens:
        raise ConfigurationError(
            f"MAX_NUM_SEQS is {config.max_num_seqs}: it must be at most MAX_BATCHED_TOKENS "
            f"({config.max_batched_tokens}), since every running sequence takes a token of each step"
        )
    check_deployment(config, choose_device(config.device).type, ranks.size)
    _prepare_kernels(config, choose_device(config.device, ranks), report, ranks)
    with in_words(checkpoint.name):
        quantization, layers = config.weight_quantization, config.rope_layers
        model = load_model(checkpoint, config.dtype, config.device, report, quantization, ranks, layers)
    check_recurrent(model, config)
    model.eos_token_ids |= {token_id for token_id in end_token_ids if token_id < model.vocab_size}
    report("checking the model against transformers' own forward")
    with in_words(checkpoint.name):
        error = probe(model, DTYPES.get(config.kv_cache_dtype, model.dtype), config.block_size)
    report(f"the check passed: relative difference {error:.1e}")
    size = size_cache(model, config, report)
    positions = resolve(model, config.rope, size.max_model_len, ConfigurationError)
    _describe(positions, size, config, report)
    engine = Engine(model, config, positions, size)
    engine.storage.expect(0)
    if config.prefix_caching and (config.tier_dir is not None or config.tier_memory):
        tier = open_tier(model, config, engine.storage, report)
        engine.tiers = Tiers(tier, engine.storage, engine.scheduler.cache)
    if model.device.type == "cuda":
        warm_up(model, config, size.max_model_len, engine.storage, report)
        engine.take_graphs(capture_graphs(model, engine.storage, config, engine.info, report))
    return engine


@contextmanager
def in_words(name: str) -> Iterator[None]:
    """Inside, whatever code of a model raises, or of a library on its files, is a refusal in one line.

    name: the model's. Want of memory stays what it is, as does what is said in words already.
    """
    try:
        yield
    except PreRopeError:
        raise
    except Exception as error:  # whatever that code meets
        if of_memory(error):
            raise
        log.debug("the model's code failed", exc_info=error)
        frame, said = traceback.extract_tb(error.__traceback__)[-1], words_of(error)
        raise ConfigurationError(
            f"MODEL_ID: {name!r} cannot be served: code that reads or runs it fails{f': {said}' if said else ''} "
            f"({Path(frame.filename).name}, line {frame.lineno}). Its files may be damaged: download them again; "
            "LOG_LEVEL=debug shows what it met"
        ) from error


def _prepare_kernels(config: EngineConfig, device: torch.device, report: Report, ranks: Ranks) -> None:
    if device.type == "cuda":
        for line in use_kept(config.cache_dir, torch.cuda.get_device_name(device)):
            report(line)
    report(prepare(config.cache_dir))
    if (chosen := choose_arithmetic()) is not None:
        report(chosen)
    if not ranks.alone:
        multiply_pairs(bool(ranks.first(int(multiplies_pairs()))))


def _describe(positions: ModelPositions, size: CacheSize, config: EngineConfig, report: Report) -> None:
    for warning in positions.warnings():
        report(f"warning: {warning}")
    own = positions.methods[positions.main]
    if own.name in PER_ROW and own.rotary.rope_type in PER_ROW.values() and size.max_model_len > own.train_length:
        report(
            f"beyond {own.train_length} tokens each row is read by its own length, where transformers reads all by the "
            f"whole prompt's: with {own.rotary.rope_type} replies there are not transformers' (docs/models.md)"
        )
    described = ", ".join(f"{key} {value}" for key, value in positions.described.items())
    report(
        f"{described}; max_model_len {size.max_model_len}; cache of {size.num_blocks * config.block_size} tokens, "
        f"{size.num_bytes / 2**30:.2f} GiB"
    )
    if size.num_states:
        report(f"{size.num_states} states of recurrent layers, {size.state_bytes / 2**30:.2f} GiB")
