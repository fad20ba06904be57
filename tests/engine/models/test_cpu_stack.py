"""All layers in one call give, to the bit, what they give one by one; and which models and steps are given to it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from prerope.cache.kernels.build import library
from prerope.rope.spec import RopeSpec
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.models.cpu.stack import Stack
from prerope.server.models.model import Model

from tests.engine.tiny_models import greedy, prompt_of, request, run, tiny, tiny_engine
from tests.tiers import every

Scored = list[tuple[TokenLogprobs, ...]]

METHODS = ("rope", "dynamic_leaky", "rerope:window=24", "yarn:factor=4:logn", "streaming:window=24", "xpos")


@pytest.fixture(autouse=True)
def needs_kernels(decode_kernel: str) -> None:
    if library() is None:
        pytest.skip(decode_kernel)


def decoded(model: Model, rows: int, method: str, least: int = 5) -> tuple[dict[str, Scored], list[torch.Tensor]]:
    """`rows` sequences of different lengths, 12 tokens each with log-probabilities; and the keys as they lie then."""
    spec, room = RopeSpec.parse(method), (16 + least // 16) * rows
    options: Any = {"num_blocks": room, "cache_dtype": torch.bfloat16, "max_num_seqs": rows, "speculation": "off"}
    options["stream_gap_s"] = None  # so that every run has the same steps
    engine = tiny_engine(model, spec, max_model_len=least + 250, **options)
    lengths = [least + 37 * n % 90 for n in range(rows)]
    requests = [request(f"{n}", prompt_of(length, n), greedy(12, logprobs=3)) for n, length in enumerate(lengths)]
    outputs = {name: [output.logprobs or () for output in found] for name, found in run(engine, requests).items()}
    return outputs, [keys.clone() for keys in engine.storage.keys]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that a stack has run, from now on."""
    steps: list[int] = []
    real = Stack.run

    def counting(self: Stack, hidden: torch.Tensor, metadata: Any) -> torch.Tensor:
        steps.append(len(hidden))
        return real(self, hidden, metadata)

    monkeypatch.setattr(Stack, "run", counting)
    return steps


def bf16(family: str, **config: Any) -> Model:
    return Model(tiny(family, **config).bfloat16())


def most_rows(model: Model) -> int:
    assert isinstance(model.stack, Stack)
    return model.stack.most_rows


@pytest.mark.parametrize(
    ("family", "rows", "threads"),
    every(3, product(["llama", "smollm3", "qwen2"], [1, 3, 9, None], [1, 3])),  # each pair of rows and threads
)
def test_the_same_bits_as_layer_by_layer(
    family: str, rows: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rows None: as many as one call takes."""
    model = bf16(family)
    rows = rows or most_rows(model)
    method = METHODS[rows % len(METHODS)]
    expected = decoded_without_stack(model, rows, method)
    steps = counted(monkeypatch)
    torch.set_num_threads(threads)
    try:
        outputs, keys = decoded(model, rows, method)
    finally:
        torch.set_num_threads(1)
    assert steps
    assert rows in steps
    assert max(steps) <= most_rows(model)
    assert outputs == expected[0]
    assert all(map(torch.equal, keys, expected[1]))


@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_reading(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bf16("llama", max_position_embeddings=64)
    expected = decoded_without_stack(model, 4, method)
    steps = counted(monkeypatch)
    assert decoded(model, 4, method)[0] == expected[0]
    assert steps


def test_rows_that_choose_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits than those of rows that read all: rows do choose in that call."""
    model, method = bf16("llama", max_position_embeddings=64), "dynamic_leaky:select=128"
    expected = decoded_without_stack(model, 3, method, 1500)
    steps = counted(monkeypatch)
    outputs, keys = decoded(model, 3, method, 1500)
    assert steps
    assert outputs == expected[0]
    assert all(map(torch.equal, keys, expected[1]))
    assert decoded(model, 3, "dynamic_leaky", 1500)[0] != outputs


def decoded_without_stack(
    model: Model, rows: int, method: str, least: int = 5
) -> tuple[dict[str, Scored], list[torch.Tensor]]:
    stack, model.stack = model.stack, None
    try:
        return decoded(model, rows, method, least)
    finally:
        model.stack = stack


def test_chunks_and_many_rows_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = counted(monkeypatch)
    model = bf16("llama")
    decoded(model, most_rows(model) + 1, "rope")
    assert steps
    assert max(steps) <= most_rows(model)


def test_heads_that_the_kernels_do_not_take_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their buffers hold 96 query heads a KV head; here there are 100."""
    model = bf16(
        "llama", num_hidden_layers=1, hidden_size=1600, num_attention_heads=100, num_key_value_heads=1, head_dim=32
    )
    assert model.stack is not None
    steps = counted(monkeypatch)
    outputs, _ = decoded(model, 2, "rope")
    assert not steps
    assert outputs == decoded_without_stack(model, 2, "rope")[0]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "olmo2", "mixtral", "phi3"])
def test_other_shapes_of_layers_have_none(family: str) -> None:
    assert bf16(family).stack is None


@pytest.mark.parametrize("scaled", ["embedding_multiplier", "logits_scaling"])
def test_models_with_more_around_the_layers_have_none(scaled: str) -> None:
    """Granite with all its multipliers at 1 is Llama."""
    plain = {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 0.25,
    }
    assert bf16("granite", **plain).stack is not None
    assert bf16("granite", **plain | {scaled: 2.0}).stack is None


def test_fp32_has_none() -> None:
    assert Model(tiny("llama")).stack is None
