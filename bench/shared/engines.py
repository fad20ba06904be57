"""Engines in this process, loaded as they are served, and what measurements do with them: random prompts, random keys,
log-probabilities of a prompt."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.loading import load_engine
from prerope.server.engine.outputs import TokenLogprobs, TokenOutput
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.machine.places import default_cache_dir
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint

from bench.shared import options


def model_options(parser: ArgumentParser) -> None:
    """What `opened` goes by."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="local folder, hub id or .gguf; without it the embedded model")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--device", default="auto")
    add("--threads", type=options.count, default=torch.get_num_threads())


def opened(asked: Namespace, say: Callable[[str], None], **settings: Any) -> tuple[Engine, Checkpoint]:
    """The model that was asked for, as it is served but for these settings and without a prefix cache."""
    torch.set_num_threads(asked.threads)
    checkpoint = resolve_checkpoint(asked.model, None, say)
    settings = {"dtype": asked.dtype, "device": asked.device, "prefix_caching": False} | settings
    return load_engine(checkpoint, EngineConfig(cache_dir=default_cache_dir(), **settings), say), checkpoint


def add(engine: Engine, name: str, num_tokens: int, max_tokens: int, seed: int, **more: Any) -> None:
    """A greedy request of random tokens, the same for a seed, that ends at no token of its own."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, engine.info.vocab_size, (num_tokens,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest(name, prompt, sampling, **({"speculation": False} | more)))


def outputs(engine: Engine) -> Iterator[tuple[str, TokenOutput]]:
    """What steps give until nothing is left to do."""
    while engine.has_work():
        yield from engine.step()


def fill(engine: Engine) -> None:
    """Random keys and values in every slot: a context that nobody computed."""
    generator = torch.Generator(engine.storage.keys[0].device).manual_seed(0)
    for tensor in (*engine.storage.keys, *engine.storage.values):
        tensor.normal_(generator=generator)


def prompt_logprobs(
    engine: Engine, token_ids: Sequence[int], start: int, advance: Callable[[int], object] = int, **more: Any
) -> Sequence[TokenLogprobs | None]:
    """Of a prompt's tokens from `start` on, None before; `advance` hears of every token computed."""
    sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=start)
    engine.add(EngineRequest("prompt", token_ids, sampling, report_progress=True, **more))
    processed, found = 0, None
    for _, output in outputs(engine):
        advance(max(0, output.num_processed_tokens - processed))
        processed = max(processed, output.num_processed_tokens)
        found = output.prompt_logprobs or found
    assert found is not None, "the engine gives the log-probabilities that it was asked for"
    return found


def mean_loss(logprobs: Sequence[TokenLogprobs | None], stop: int, last: int) -> float:
    """Mean negative log-probability of the `last` tokens before position `stop`; a prompt's first token has none."""
    known = [entry.logprob for entry in logprobs[max(0, stop - last) : stop] if entry is not None]
    if len(known) < last or not last:
        raise ValueError(f"log-probabilities of {last} tokens before {stop} are wanted, there are {len(known)}")
    return -statistics.fmean(known)
