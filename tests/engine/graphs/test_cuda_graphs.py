"""Decode steps that are captured once and replayed, through the engine: on a card, or under Triton's interpreter.

Without a card a recording stands for the CUDA graph. It makes the same calls with the same tensors and the same
numbers, so whatever a step does not copy into the graph's tensors would be that of the step it was captured at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from prerope.cache.cuda.attention import cuda_attention, cuda_store
from prerope.cache.storage import KVStorage
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.engine.graphs.capture import Capture, Replay
from prerope.server.engine.graphs.decode import DecodeGraphs, buckets, capture_graphs
from prerope.server.engine.limits import GraphStats
from prerope.server.models.model import BACKENDS, Model
from prerope.server.ranks.group import Ranks
from torch import Tensor

from tests.device import DEVICE
from tests.engine.recorded import RecordedGraph
from tests.engine.tiny_models import (
    assert_idle,
    generate,
    greedy,
    prompt_of,
    request,
    run,
    tiny,
    tiny_engine,
    tokens_of,
)
from tests.kernels.conftest import interpreter

__all__ = ["interpreter"]  # a fixture

BUCKETS = [1, 3]
"""Two rows fill up a graph for three."""
TRAINED = 32


@pytest.fixture(scope="module", autouse=True)
def gpu_path(interpreter: None) -> Iterator[None]:
    """Attention and store as on a GPU, whatever the tensors are on."""
    del interpreter

    def store(self: KVStorage, layer: int, key: Any, value: Any, slot_mapping: Any) -> None:
        cuda_store(key, value, self.keys[layer], self.values[layer], slot_mapping)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prerope.server.models.model.attention_on", lambda _: cuda_attention)
        patch.setattr(KVStorage, "store", store)
        yield


@pytest.fixture(autouse=True)
def no_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordedGraph, "num_replays", 0)


@functools.cache
def model_of(family: str) -> Model:
    """One for all engines here: what is found out about it takes seconds under the interpreter."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family != "llama":
        shape |= {"layer_types": ["sliding_attention", "full_attention"]}
    return Model(tiny(family, max_position_embeddings=TRAINED, **shape), BACKENDS["cuda"])


def served(family: str = "llama", method: str = "model") -> Engine:
    spec = RopeSpec(method=method, window=8 if "leaky" in method or method == "rerope" else None)
    limits = {"max_model_len": 128, "num_blocks": 40, "max_num_seqs": 3, "max_batched_tokens": TRAINED}
    return tiny_engine(model_of(family), spec, **limits, overlap=False)


class CountedGraphs(Capture):
    """A card's graphs, whose replays count as those of recordings do."""

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        replay = super().__call__(run)

        def counted() -> Tensor:
            RecordedGraph.num_replays += 1
            return replay()

        return counted


def with_graphs(engine: Engine, capture: Any = None) -> Engine:
    """capture: in place of what captures; otherwise graphs on a card, and recordings without one."""
    here = (lambda _: RecordedGraph) if DEVICE == "cpu" else CountedGraphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prerope.server.engine.graphs.decode.Capture", here if capture is None else lambda _: capture)
        patch.setattr("prerope.server.engine.graphs.decode.buckets", lambda _: BUCKETS)
        engine.take_graphs(capture_graphs(engine.model, engine.storage, engine.config, engine.info, print))
    assert (engine.graphs is not None) == (capture is None)
    return engine


@pytest.fixture(scope="module")
def captured(gpu_path: None) -> Engine:
    """With its graphs, for tests that leave it idle."""
    del gpu_path
    return with_graphs(served(method="dynamic_leaky"))


def outputs(engine: Engine, lengths: tuple[int, ...], **options: Any) -> list[list[int]]:
    """Prompts of these lengths; how many tokens each gets differs, so that steps of all sizes come."""
    wanted = [request(str(n), prompt_of(length, n), greedy(2 + n), **options) for n, length in enumerate(lengths)]
    found = run(engine, wanted)
    assert_idle(engine)
    return [tokens_of(found[str(n)]) for n in range(len(lengths))]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic_leaky", "rerope"])
def test_replayed_steps_give_what_the_steps_give(method: str) -> None:
    """Rows on both sides of the trained length, one of them crossing it."""
    lengths = (5, TRAINED - 1, TRAINED + 6)
    expected = outputs(served(method=method), lengths)
    assert RecordedGraph.num_replays == 0
    engine = with_graphs(served(method=method))
    prepared = RecordedGraph.num_replays
    assert prepared == len(BUCKETS)
    captured = len(engine.graphs._graphs)
    assert outputs(engine, lengths) == expected
    assert RecordedGraph.num_replays >= prepared + 3
    assert len(engine.graphs._graphs) == captured, "the start has captured all that this deployment needs"


def test_logits_of_a_graph_are_those_of_the_step(captured: Engine) -> None:
    """Of every step of three sequences, on either side of the trained length."""
    engine, differences = captured, list[float]()
    replayed = DecodeGraphs.logits

    def compared(self: DecodeGraphs, batch: Any) -> Any:
        ours = replayed(self, batch)
        if ours is not None:
            eager = engine.model.forward(batch, engine.storage)  # stores the same rows once more
            differences.append(float((ours - eager).abs().max() / eager.abs().max()))
        return ours

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeGraphs, "logits", compared)
        outputs(engine, (5, TRAINED - 1, TRAINED + 6))
    assert len(differences) >= 3
    assert max(differences) <= 1e-5


@pytest.mark.slow
def test_two_engines_in_one_process() -> None:
    """Each has graphs of its own, and their steps take turns."""
    methods, prompts = ("rerope", "model"), [prompt_of(20, 1), prompt_of(38, 2)]
    expected = [generate(served(method=method), prompts, greedy(5)) for method in methods]
    engines = [with_graphs(served(method=method)) for method in methods]
    found: list[list[list[int]]] = [[[], []], [[], []]]
    for engine in engines:
        for number, prompt in enumerate(prompts):
            engine.add(request(str(number), prompt, greedy(5)))
    while any(engine.has_work() for engine in engines):
        for tokens, engine in zip(found, engines, strict=True):
            for name, output in engine.step():
                tokens[int(name)].extend(output.token_ids)
    assert found == expected
    assert RecordedGraph.num_replays >= 2 * (len(BUCKETS) + 3)


def refusing(_run: Callable[[], Tensor]) -> Replay:
    raise RuntimeError("called a synchronizing CUDA operation\nand more")


def test_a_start_that_cannot_capture_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    engine, expected = with_graphs(served(), refusing), outputs(served(), (5,))
    why = "RuntimeError: called a synchronizing CUDA operation"
    assert f"warning: decode steps run without CUDA graphs, and slower: {why};" in capsys.readouterr().out
    assert engine.stats().graphs == GraphStats(why_none=why)
    assert outputs(engine, (5,)) == expected

    def out_of_memory(_run: Callable[[], Tensor]) -> Replay:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        with_graphs(served(), out_of_memory)


def test_a_rank_that_cannot_capture_leaves_no_other_waiting_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served()
    monkeypatch.setattr(engine.model.raw, "ranks", Ranks(1, 2))
    with pytest.raises(RuntimeError, match="rank 1 of 2 cannot capture a decode step"):
        with_graphs(engine, refusing)


@pytest.mark.slow
def test_a_method_that_cannot_be_captured_in_traffic_runs_without(capsys: pytest.CaptureFixture[str]) -> None:
    """It is told once, and the graphs of the deployment stay."""
    engine = with_graphs(served())
    assert engine.graphs is not None
    engine.graphs._capture = refusing
    positions = engine.resolve_positions(RopeSpec(method="dual_chunk"))
    assert outputs(engine, (20, 40), positions=positions) == outputs(served(), (20, 40), positions=positions)
    assert capsys.readouterr().out.count("warning: a decode step has no CUDA graph, and is slower: RuntimeError") == 1
    graphs = engine.stats().graphs
    assert (graphs.num_captured, graphs.num_refused > 0) == (len(BUCKETS), True)
    assert "synchronizing" in graphs.why_none


@pytest.mark.slow
def test_requests_with_any_method_leave_the_graphs_as_they_are() -> None:
    """The tables of angles have room for all of them from the start."""
    engine = with_graphs(served())
    for name in ("dynamic_ntk", "dual_chunk", "dynamic_leaky"):
        outputs(engine, (38, 34), positions=engine.resolve_positions(RopeSpec(method=name)))
    assert engine.graphs is not None
    assert len({name[1] for name in engine.graphs._graphs}) == 1


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
            request(str(n), prompt_of(28 + 8 * n, n), greedy(4), positions=positions if n % 2 else None)
            for n in range(3)
        ]
        found.append([tokens_of(output) for output in run(engine, own).values()])
        captured = 0 if engine.graphs is None else len(engine.graphs._graphs)
    assert found[0] == found[1]
    assert captured > len(BUCKETS)


def test_what_no_graph_is_for(captured: Engine) -> None:
    """A chunk beside decodes, and one row of a prompt that is not sampled from."""
    engine = captured
    replays = RecordedGraph.num_replays
    engine.add(request("0", prompt_of(TRAINED + 1), greedy(1)))
    engine.step()
    engine.step()  # the last of its tokens: a single row that samples is a decode step like any other
    assert RecordedGraph.num_replays == replays + 1
    engine.add(request("1", prompt_of(30), greedy(2)))
    engine.step()
    assert RecordedGraph.num_replays == replays + 1
    engine.step()
    assert RecordedGraph.num_replays == replays + 2
    assert_idle(engine)


@pytest.mark.slow
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
    lengths = (38, 34)
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


@pytest.mark.slow
def test_a_recording_keeps_what_was_not_copied() -> None:
    """The negative control: a captured step without the copies answers as it did then."""
    engine = with_graphs(served())
    engine.add(request("0", prompt_of(30), greedy(20)))
    engine.step()
    engine.step()
    logits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prerope.server.engine.graphs.decode._Graph.load", lambda *_: None)
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


@pytest.mark.slow
def test_reserved_tables_hold_every_row_of_a_step() -> None:
    """Each row past the trained length has an angle map of its own."""
    engine = served(method="dynamic_ntk")
    graphs = with_graphs(engine).graphs
    positions = resolve_model(RopeSpec(method="dynamic_ntk"), engine.model.rotaries, 128)
    assert positions.described == engine.info.positions.described
    versions = {name[1] for name in graphs._graphs}
    outputs(engine, (38, 34, 37))
    assert {name[1] for name in graphs._graphs} == versions
