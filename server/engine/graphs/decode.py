"""Decode steps on the GPU as CUDA graphs: one launch in place of hundreds, which the host could not issue in time.

A graph is for a number of rows, a bucket, and for a layout of what attention reads (`cache.cuda.decode.RowLayout`): its
tensors stay where they are, a step is copied into them, and rows that fill the bucket up read and store nothing.
Layouts follow from the deployment's position method, so all graphs are captured at the start; a request with a method
of its own has one captured when it comes. Steps with a prefill chunk run without a graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.cache.cuda.decode import FoundSlots, RowLayout, SingleRows, reserve_tables, single_rows
from prerope.cache.cuda.plan import Ints, PlanKey, Tables, block_tables
from prerope.cache.storage import KVStorage
from prerope.cache.transfer import send
from prerope.rope.model import ModelPositions
from prerope.server.config import EngineConfig
from prerope.server.engine.graphs.capture import Capture, Replay
from prerope.server.engine.limits import GraphStats, ModelInfo
from prerope.server.engine.memory.warm_up import allowed_positions, readings_of_a_step
from prerope.server.models.model import Batch, Chunk, Model, build_batch
from torch import Tensor

MAX_GRAPHS = 128
"""The least recently replayed goes first."""


_Name = tuple[tuple[RowLayout, ...], tuple[tuple[int, int], ...]]
"""Layouts of what attention reads, and versions of the tables of angles that it reads."""


class NoGraph(RuntimeError):
    """Why a step has no graph; the message says it."""


def buckets(max_rows: int) -> list[int]:
    """Rows of the graphs: 1, 2, 4, then steps of 8 to 64, of 16 to 256 and of 64 beyond; the last is `max_rows`."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 1, 64)]
    return [rows for rows in steps if rows < max_rows] + [max_rows]


@torch.inference_mode()
def capture_graphs(
    model: Model, storage: KVStorage, config: EngineConfig, info: ModelInfo, report: Callable[[str], None]
) -> DecodeGraphs | str:
    """The CUDA graphs of a deployment's decode steps, or the reason why there are none."""
    if not config.cuda_graphs:
        return "CUDA_GRAPHS is false"
    if model.states:
        return "the slots of its recurrent layers' states are looked up on the host"
    report(f"capturing CUDA graphs of decode steps of up to {config.max_num_seqs} rows")
    graphs = DecodeGraphs(
        model,
        storage,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=info.max_model_len,
        capture=Capture(model.device),
        report=report,
    )
    _, *others = allowed_positions(model, config, info.max_model_len)
    try:
        graphs.prepare(info.positions, others, config.max_batched_tokens)
    except NoGraph as error:
        report(f"warning: decode steps run without CUDA graphs, and slower: {error}; CUDA_GRAPHS=false does not try")
        return str(error)
    return graphs


class DecodeGraphs:
    """The graphs of one model and cache. For the engine's thread; `capture` makes a replay of a call.

    Attributes:
        refused: why no graph could be captured, by what it would have been for; such steps run without one.
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        capture: Callable[[Callable[[], Tensor]], Replay],
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model, self._storage, self._capture, self._report = model, storage, capture, report
        self._block_size, self._max_model_len = block_size, max_model_len
        self._buckets = buckets(max_num_seqs)
        shape = self._buckets[-1], -(-max_model_len // block_size)
        # Of all graphs, as only one runs at a time:
        self._blocks = torch.zeros(shape, dtype=torch.int32, device=model.device)
        self._logits = torch.empty(shape[0], model.vocab_size, device=model.device)
        self._keys: list[PlanKey] = []
        self._graphs: OrderedDict[_Name, _Graph] = OrderedDict()
        self.refused: dict[_Name, str] = {}
        self._reported = False

    @property
    def stats(self) -> GraphStats:
        return GraphStats(len(self._graphs), len(self.refused), next(iter(self.refused.values()), ""))

    def prepare(
        self, positions: ModelPositions, allowed: Sequence[ModelPositions] = (), max_batched_tokens: int = 1
    ) -> None:
        """Capture the graphs of this deployment, the largest first: the others find their memory there.

        allowed: what else requests may ask for, so that none of them has the tables of angles made anew. The cache must
        be empty: these steps write to its first block. NoGraph where one cannot be captured.
        """
        largest = self._idle_step(self._buckets[-1], positions)
        self._model.forward(largest, self._storage)
        self._keys = [key for key in largest.metadata.plans if isinstance(key, PlanKey)]
        readings = readings_of_a_step(self._buckets[-1], max_batched_tokens)
        reserve_tables(self._keys, (positions, *allowed), readings, self._max_model_len, self._device)
        for rows in reversed(self._buckets):
            self._replay(self._idle_step(rows, positions))

    def logits(self, batch: Batch) -> Tensor | None:
        """[N, V] fp32, good until the next call; None for a step that is not of single rows, each with its logits.

        None, too, where a graph cannot be captured for what a request asks for, which is told once.
        """
        metadata = batch.metadata
        count = len(metadata.sequences)
        single = all(sequence.count == 1 for sequence in metadata.sequences)
        if not self._keys or not single or len(batch.logit_rows) != count or count > self._buckets[-1]:
            return None
        try:
            return self._replay(batch)
        except NoGraph as reason:
            if not self._reported:
                self._reported = True
                self._report(f"warning: a decode step has no CUDA graph, and is slower: {reason}")
            return None

    def _replay(self, batch: Batch) -> Tensor:
        count = len(batch.metadata.sequences)
        bucket = self._buckets[bisect_left(self._buckets, count)]
        rows = [single_rows(batch.metadata, key) for key in self._keys]
        layouts = [own.layout.filled_up(bucket) for own in rows]
        tables = [layout.tables(self._device) for layout in layouts]
        found = _find_angles(rows, tables)
        name = tuple(layouts), tuple(own.versions for own in tables)
        if name in self.refused:
            raise NoGraph(self.refused[name])
        graph = self._find_graph(name)
        filled = zip(rows, layouts, found, strict=True)
        graph.load(batch, [own.fill(layout, slots) for own, layout, slots in filled])
        if not graph.captured:
            self._capture_now(graph, name)
        return graph.replay()[:count]

    def _capture_now(self, graph: _Graph, name: _Name) -> None:
        """Now that its tensors hold a step. Want of memory is no reason to go on without.

        Nor is anything else where other ranks may have theirs: they would wait in it for what this one does not do.
        """
        try:
            graph.captured = self._capture(graph.step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            ranks = self._model.raw.ranks
            if not ranks.alone:
                raise RuntimeError(
                    f"rank {ranks.rank} of {ranks.size} cannot capture a decode step as a CUDA graph: {error}; with "
                    "CUDA_GRAPHS=false none is tried"
                ) from error
            del self._graphs[name]
            self.refused[name] = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            raise NoGraph(self.refused[name]) from error

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _find_graph(self, name: _Name) -> _Graph:
        """The graph of this name, new where there is none. A name has versions of tables: old graphs are not found."""
        if name not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[name] = _Graph(name[0], self._blocks, self._run)
        self._graphs.move_to_end(name)
        return self._graphs[name]

    def _run(self, batch: Batch) -> Tensor:
        return self._model.forward(batch, self._storage, self._logits[: len(batch.logit_rows)])

    def _idle_step(self, rows: int, positions: ModelPositions) -> Batch:
        chunks = [Chunk.of([0], 0, [0], positions, 1)] * rows
        return build_batch(chunks, self._block_size, self._model.device)


def _find_angles(rows: Sequence[SingleRows], tables: Sequence[Tables]) -> list[FoundSlots]:
    """The slots of these maps; looked up again where filling a later one replaced the tables."""
    while True:
        versions = [own.versions for own in tables]
        found = [own.find(table) for own, table in zip(rows, tables, strict=True)]
        if versions == [own.versions for own in tables]:
            return found


class _Graph:
    """One captured step, and the tensors that it reads."""

    def __init__(
        self,
        layouts: Sequence[RowLayout],
        blocks: Tensor,
        run: Callable[[Batch], Tensor],
    ) -> None:
        rows, device = layouts[0].rows, blocks.device
        self._layouts, self._blocks = layouts, blocks
        self._buffer = torch.zeros(sum(layout.buffer.size for layout in layouts), dtype=torch.int32, device=device)
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)  # ids, positions, slots
        self._logit_rows = torch.arange(rows, device=device)
        self._run = run
        self.captured: Replay | None = None

    def load(self, batch: Batch, buffers: Sequence[Ints]) -> None:
        """Copy the step's numbers into the graph's tensors; buffers: those of the layouts, on the host."""
        count, device, metadata = len(batch.input_ids), self._inputs.device, batch.metadata
        self._inputs[:, :count] = torch.stack([batch.input_ids, batch.position_ids, metadata.slot_mapping])
        self._inputs[2, count:] = -1  # stored nowhere
        self._buffer.copy_(send(np.concatenate(buffers), device))
        blocks = send(block_tables(metadata), device)
        self._blocks[:count, : blocks.shape[1]] = blocks

    def replay(self) -> Tensor:
        assert self.captured is not None
        return self.captured()

    def step(self) -> Tensor:
        """The call that is captured: a forward of what the tensors hold."""
        ids, positions, slots = self._inputs
        plans: dict[Hashable, Any] = {}
        begin = 0
        for layout in self._layouts:
            end = begin + layout.buffer.size
            plans[layout.key] = layout.plan(self._buffer[begin:end], self._blocks)
            begin = end
        # Attention needs the number of rows of each sequence alone: everything else is in the plans.
        nobody = SequenceRows(0, 1, 0, torch.empty(0, dtype=torch.int64), ModelPositions({}, ""))
        metadata = AttentionMetadata([nobody] * len(ids), slots, 0, plans)
        return self._run(Batch(ids, positions, self._logit_rows, metadata))
