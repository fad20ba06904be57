"""Decode steps that are captured once and replayed: the GPU path, under Triton's interpreter, through the engine.

A recording stands for the CUDA graph. It makes the same calls with the same tensors and the same numbers, so whatever
a step does not copy into the graph's tensors would be that of the step it was captured at.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from prerope.cache.cuda.attention import cuda_attention, cuda_store
from prerope.cache.storage import KVStorage
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.engine.graphs import DecodeGraphs, buckets, capture_graphs
from prerope.server.models.model import BACKENDS, Model

from tests.engine.recorded import RecordedGraph
from tests.engine.tiny_models import assert_idle, greedy, prompt_of, request, run, tiny, tiny_engine, tokens_of
from tests.kernels.conftest import interpreter

__all__ = ["interpreter"]  # a fixture

BUCKETS = [1, 3]
"""Two rows fill up a graph for three."""


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> None:
    """Attention and store as on a GPU, on tensors of the CPU."""
    del interpreter
    monkeypatch.setattr("prerope.server.models.model.attention_on", lambda _: cuda_attention)

    def store(self: KVStorage, layer: int, key: Any, value: Any, slot_mapping: Any) -> None:
        cuda_store(key, value, self.keys[layer], self.values[layer], slot_mapping)

    monkeypatch.setattr(KVStorage, "store", store)
    monkeypatch.setattr(RecordedGraph, "num_replays", 0)


def served(family: str = "llama", method: str = "model") -> Engine:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family != "llama":
        shape |= {"layer_types": ["sliding_attention", "full_attention"]}
    model = Model(tiny(family, max_position_embeddings=64, **shape), BACKENDS["cuda"])
    spec = RopeSpec(method=method, window=16 if "leaky" in method or method == "rerope" else None)
    return tiny_engine(model, spec, max_model_len=128, num_blocks=40, max_num_seqs=3, max_batched_tokens=64)


def with_graphs(engine: Engine) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prerope.server.engine.graphs.CudaGraph", RecordedGraph)
        patch.setattr("prerope.server.engine.graphs.buckets", lambda _: BUCKETS)
        engine.graphs = capture_graphs(engine.model, engine.storage, engine.config, engine.info, print)
    assert engine.graphs is not None
    return engine


def outputs(engine: Engine, lengths: tuple[int, ...], **options: Any) -> list[list[int]]:
    """Prompts of these lengths; how many tokens each gets differs, so that steps of all sizes come."""
    wanted = [request(str(n), prompt_of(length, n), greedy(2 + n), **options) for n, length in enumerate(lengths)]
    found = run(engine, wanted)
    assert_idle(engine)
    return [tokens_of(found[str(n)]) for n in range(len(lengths))]


@pytest.mark.parametrize("method", ["rerope", "dynamic_leaky"])
def test_replayed_steps_give_what_the_steps_give(method: str) -> None:
    """Rows on both sides of the trained length, 64, one of them crossing it."""
    lengths = (5, 63, 70)
    expected = outputs(served(method=method), lengths)
    assert RecordedGraph.num_replays == 0
    engine = with_graphs(served(method=method))
    prepared = RecordedGraph.num_replays
    assert prepared == len(BUCKETS)
    captured = len(engine.graphs._graphs)
    assert outputs(engine, lengths) == expected
    assert RecordedGraph.num_replays >= prepared + 3
    assert len(engine.graphs._graphs) == captured, "the start has captured all that this deployment needs"


@pytest.mark.slow
def test_layers_that_read_in_several_ways() -> None:
    """Sliding windows and full attention, each with its own rotary embedding: a plan each in one graph."""
    lengths = (5, 40)
    assert outputs(with_graphs(served("gemma3_text")), lengths) == outputs(served("gemma3_text"), lengths)


@pytest.mark.slow
def test_a_request_with_a_method_of_its_own() -> None:
    """Beside others; its graphs are captured when it comes."""
    found = []
    for make in (lambda engine: engine, with_graphs):
        engine = make(served())
        positions = engine.resolve_positions(RopeSpec(method="dual_chunk"))
        own = [
            request(str(n), prompt_of(40 + 8 * n, n), greedy(4), positions=positions if n % 2 else None)
            for n in range(3)
        ]
        found.append([tokens_of(output) for output in run(engine, own).values()])
        captured = 0 if engine.graphs is None else len(engine.graphs._graphs)
    assert found[0] == found[1]
    assert captured > len(BUCKETS)


def test_what_no_graph_is_for() -> None:
    """A chunk beside decodes, and one row of a prompt that is not sampled from."""
    engine = with_graphs(served())
    replays = RecordedGraph.num_replays
    engine.add(request("0", prompt_of(65), greedy(1)))
    engine.step()
    engine.step()  # the last of 65 tokens: a single row that samples is a decode step like any other
    assert RecordedGraph.num_replays == replays + 1
    engine.add(request("1", prompt_of(30), greedy(2)))
    engine.step()
    assert RecordedGraph.num_replays == replays + 1
    engine.step()
    assert RecordedGraph.num_replays == replays + 2


def test_rows_that_fill_a_graph_up_store_nothing() -> None:
    engine = with_graphs(served())
    for keys in engine.storage.keys:
        keys.fill_(7.0)
    outputs(engine, (3, 3))
    for keys in engine.storage.keys:
        touched = {block for block in range(len(keys)) if bool((keys[block] != 7.0).any())}
        assert len(touched) == 2, "a block a sequence"


@pytest.mark.slow
def test_tables_made_anew_are_captured_anew() -> None:
    """A graph that reads the tensors of before would give other tokens."""
    lengths = (70, 66)
    expected = outputs(served(method="dynamic_ntk"), lengths)
    engine = with_graphs(served(method="dynamic_ntk"))
    outputs(engine, (10,))
    captured = len(engine.graphs._graphs)
    from prerope.cache.cuda.plan import _TABLES

    for tables in _TABLES.values():
        tables.keys.reserve(1, 2**14)
    for tables in _TABLES.values():
        tables.queries.reserve(512)
    assert outputs(engine, lengths) == expected
    assert len(engine.graphs._graphs) > captured


def test_a_recording_keeps_what_was_not_copied() -> None:
    """The negative control: a captured step without the copies answers as it did then."""
    engine = with_graphs(served())
    engine.add(request("0", prompt_of(30), greedy(20)))
    engine.step()
    engine.step()
    logits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prerope.server.engine.graphs._Graph.load", lambda *_: None)
        forward = DecodeGraphs.logits

        def seen(self: DecodeGraphs, batch: Any) -> Any:
            logits.append(forward(self, batch).clone())
            return logits[-1]

        patch.setattr(DecodeGraphs, "logits", seen)
        engine.step()
        engine.step()
    assert torch.equal(logits[0], logits[1])


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(6) == [1, 2, 4, 6]
    assert buckets(64) == [1, 2, 4, *range(8, 65, 8)]
    assert buckets(300)[-3:] == [240, 256, 300]


def test_reserved_tables_hold_every_row_of_a_step() -> None:
    """Each row past the trained length has an angle map of its own."""
    engine = served(method="dynamic_ntk")
    graphs = with_graphs(engine).graphs
    positions = resolve_model(RopeSpec(method="dynamic_ntk"), engine.model.rotaries, 128)
    assert positions.describe() == engine.info.positions.describe()
    versions = {name[1] for name in graphs._graphs}
    outputs(engine, (70, 66, 69))
    assert {name[1] for name in graphs._graphs} == versions
