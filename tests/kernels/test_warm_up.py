"""The largest steps of a deployment, through the kernels: rows write to few blocks, and read them again and again."""

from __future__ import annotations

import pytest
import torch
from prerope.cache.cuda.attention import cuda_attention, cuda_store
from prerope.cache.storage import KVStorage
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.memory.warm_up import warm_up
from prerope.server.models.model import Model
from torch import Tensor

from tests.engine.tiny_models import tiny


def test_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def store(self: KVStorage, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        cuda_store(key, value, self.keys[layer], self.values[layer], slot_mapping)

    monkeypatch.setattr("prerope.server.models.model.attention_on", lambda _: cuda_attention)
    monkeypatch.setattr(KVStorage, "store", store)
    model = Model(tiny("llama", max_position_embeddings=32, num_hidden_layers=1))
    storage = KVStorage([layer.shape for layer in model.layers], 3, 16, torch.float32, model.device)
    config = EngineConfig(
        rope=RopeSpec(method="dynamic_leaky"), max_batched_tokens=8, max_num_seqs=2, rope_per_request=False
    )
    lines: list[str] = []
    warm_up(model, config, 100, storage, lines.append)
    assert [line.split(",")[0] for line in lines] == [
        "warming up: one row of each of 2 sequences",
        "warming up: the last 8 rows of a prompt of 100",
        "warming up: 4 rows of each of 2 such prompts",
    ]
    for tensor in storage.keys + storage.values:
        assert tensor.isfinite().all()
        assert (tensor != 0).any()
