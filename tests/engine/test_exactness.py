"""A reply does not depend on what else is served, to the bit: tokens and log-probabilities, in bf16 and fp32.

Each request is first run alone, by itself in its engine, its prompt in one chunk. Then all of them at once, in small
chunks, over a cache that is warm, over one that is too small and preempts, layer by layer, and with more threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from prerope.cache.kernels.build import library, multiplies_pairs
from prerope.rope.spec import RopeSpec
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sequence import EngineRequest
from prerope.server.models.model import Model

from tests.device import DEVICE
from tests.engine.tiny_models import greedy, prompt_of, request, run, tiny, tiny_engine
from tests.tiers import every

LENGTHS = [7 + 53 * n % 380 for n in range(24)]
NEW = 8
METHODS = ("dynamic_leaky", "rerope", "dual_chunk", "xpos", "yarn:factor=4:logn", "dynamic_ntk")
Replies = dict[str, list[TokenLogprobs]]


@pytest.fixture(autouse=True)
def needs_kernels(decode_kernel: str) -> None:
    if library() is None or DEVICE != "cpu" or torch.cpu._is_amx_tile_supported():
        pytest.skip(decode_kernel)


@pytest.fixture(params=every(2, ["bfloat16", "bfloat16 widened", "float32"], quick=1))
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    name, _, widened = request.param.partition(" ")
    if widened and multiplies_pairs():
        for user in ("server.models.cpu.products", "cache.cpu.decode"):
            monkeypatch.setattr(f"prerope.{user}.multiplies_pairs", lambda: False)
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config = {"max_position_embeddings": 128, "rope_parameters": parameters}
    return Model(tiny("llama", **config).to(getattr(torch, name)))


def requests(model: Model) -> list[EngineRequest]:
    engine = tiny_engine(model, max_model_len=512)
    positions = [engine.resolve_positions(RopeSpec.parse(method)) for method in METHODS]
    sampling = greedy(NEW, logprobs=5)
    return [
        request(str(n), prompt_of(length, n // 2), sampling, positions[n // 2 % len(METHODS)])
        for n, length in enumerate(LENGTHS)
    ]


def served(model: Model, asked: list[EngineRequest], **config: object) -> Replies:
    options = {"max_model_len": 512, "num_blocks": 900, "cache_dtype": model.dtype} | config
    engine = tiny_engine(model, **options)  # type: ignore[arg-type]
    repeats = engine.config.prefix_caching + 1
    for _ in range(repeats):
        outputs = run(engine, asked)
    return {name: [one for output in found for one in output.logprobs or ()] for name, found in outputs.items()}


@contextmanager
def threads(number: int) -> Iterator[None]:
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def test_alone_and_in_any_company(model: Model) -> None:
    asked = requests(model)
    alone: Replies = {}
    for one in asked:
        alone |= served(model, [one], prefix_caching=False, max_batched_tokens=4096)
    assert all(len(reply) == NEW for reply in alone.values())
    crowds = {
        "chunks of 64": {"max_batched_tokens": 64, "prefix_caching": False},
        "many rows": {"max_batched_tokens": 4096, "max_num_seqs": 32, "prefix_caching": False},
        "a warm cache": {"max_batched_tokens": 100},
        "preempted": {"num_blocks": 60, "max_batched_tokens": 48},
    }
    for name, config in crowds.items():
        assert served(model, asked, **config) == alone, name
    with threads(3):
        assert served(model, asked, max_batched_tokens=64) == alone
    with model.layer_by_layer() if model.stack else nullcontext():
        assert served(model, asked, max_batched_tokens=200, prefix_caching=False) == alone
