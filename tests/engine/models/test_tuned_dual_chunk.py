"""A model tuned for dual chunk attention (Qwen2.5-1M): one shot, chunks and decode agree past many of its chunks."""

from __future__ import annotations

import pytest
from prerope.rope.spec import RopeSpec
from prerope.server.models.checks.probe import probe
from prerope.server.models.model import Model

from tests.engine.tiny_models import generate, greedy, prompt_of, tiny, tiny_engine

CONFIG = {"chunk_size": 40, "local_size": 8, "original_max_position_embeddings": 40}


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(tiny("qwen2", num_hidden_layers=2, max_position_embeddings=1000, dual_chunk_attention_config=CONFIG))
    probe(model)
    return model


@pytest.mark.parametrize("method", ["model", "auto"])
def test_it_is_what_model_and_auto_read_by_however_a_prompt_is_cut(model: Model, method: str) -> None:
    def continued(prompt: list[int], spec: RopeSpec, budget: int) -> list[int]:
        engine = tiny_engine(
            model, spec, max_model_len=512, max_batched_tokens=budget, max_num_seqs=4, prefix_caching=False
        )
        return generate(engine, [prompt], greedy(6))[0]

    prompt, spec = prompt_of(300), RopeSpec(method=method)
    whole = continued(prompt, spec, 512)
    assert continued(prompt, spec, 7) == whole
    assert continued([*prompt, *whole[:3]], spec, 64)[:3] == whole[3:]
    assert continued(prompt, RopeSpec(method="rope"), 512) != whole
