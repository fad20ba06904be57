"""Decode steps on the GPU as CUDA graphs: one launch in place of hundreds, which the host could not issue in time.

A graph is for a number of rows, a bucket, and for a layout of what attention reads (`cache.cuda.decode.RowLayout`): its
tensors stay where they are, a step is copied into them, and rows that fill the bucket up read and store nothing.
Layouts follow from the deployment's position method, so all graphs are captured at the start; a request with a method
of its own has one captured when it comes. Steps with a prefill chunk run without a graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.cache.cuda.decode import FoundSlots, RowLayout, SingleRows, single_rows
from prerope.cache.cuda.plan import Ints, PlanKey, Tables, block_tables, tables_of
from prerope.cache.cuda.transfer import send
from prerope.cache.storage import KVStorage
from prerope.rope.model import ModelPositions
from prerope.server.config import EngineConfig
from prerope.server.engine.info import ModelInfo
from prerope.server.models.batch import Batch, Chunk, build_batch
from prerope.server.models.model import Model
from torch import Tensor

MAX_GRAPHS = 128
"""The least recently replayed goes first."""


Replay = Callable[[], Tensor]
"""Of something captured: its result is computed again from what its tensors hold now."""


class CudaGraph:
    """The kernels that `run` launches. Graphs share their working memory: a result is good until any is replayed."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()  # kernels are compiled and work spaces made outside of the graph
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=_pool(), capture_error_mode="thread_local"):
            self._result = run()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._result


@cache
def _pool() -> Any:
    """The memory that all graphs work in."""
    return torch.cuda.graph_pool_handle()


def buckets(max_rows: int) -> list[int]:
    """Rows of the graphs: 1, 2, 4, then steps of 8 to 64, of 16 to 256 and of 64 beyond; the last is `max_rows`."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 1, 64)]
    return [rows for rows in steps if rows < max_rows] + [max_rows]


@torch.inference_mode()
def capture_graphs(
    model: Model, storage: KVStorage, config: EngineConfig, info: ModelInfo, report: Callable[[str], None]
) -> DecodeGraphs | None:
    """Of a deployment's decode steps; None where they are not wanted, or, with a warning, cannot be captured."""
    if not config.cuda_graphs:
        return None
    report(f"capturing CUDA graphs of decode steps of up to {config.max_num_seqs} rows")
    graphs = DecodeGraphs(
        model,
        storage,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=info.max_model_len,
        capture=CudaGraph,
    )
    try:
        graphs.prepare(info.positions)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        report(f"warning: decode steps run without CUDA graphs, and slower: {reason}; CUDA_GRAPHS=false does not try")
        return None
    return graphs


class DecodeGraphs:
    """The graphs of one model and cache. For the engine's thread; `capture` makes a replay of a call."""

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        capture: Callable[[Callable[[], Tensor]], Replay],
    ) -> None:
        self._model, self._storage, self._capture = model, storage, capture
        self._block_size, self._max_model_len = block_size, max_model_len
        self._buckets = buckets(max_num_seqs)
        shape = self._buckets[-1], -(-max_model_len // block_size)
        self._blocks = torch.zeros(shape, dtype=torch.int32, device=model.device)  # of all graphs
        self._keys: list[PlanKey] = []
        self._graphs: OrderedDict[object, _Graph] = OrderedDict()

    def prepare(self, positions: ModelPositions) -> None:
        """Capture the graphs of this deployment, the largest first: the others find their memory there.

        The cache must be empty: these steps write to its first block.
        """
        largest = self._idle_step(self._buckets[-1], positions)
        self._model.forward(largest, self._storage)
        self._keys = [key for key in largest.metadata.plans if isinstance(key, PlanKey)]
        self._reserve(positions)
        for rows in reversed(self._buckets):
            self.logits(self._idle_step(rows, positions))

    def logits(self, batch: Batch) -> Tensor | None:
        """[N, V] fp32, good until the next call; None for a step that is not of single rows, each with its logits."""
        metadata = batch.metadata
        count = len(metadata.sequences)
        single = all(sequence.count == 1 for sequence in metadata.sequences)
        if not self._keys or not single or len(batch.logit_rows) != count or count > self._buckets[-1]:
            return None
        bucket = self._buckets[bisect_left(self._buckets, count)]
        rows = [single_rows(metadata, key) for key in self._keys]
        layouts = [own.layout.filled_up(bucket) for own in rows]
        tables = [layout.tables(batch.input_ids.device) for layout in layouts]
        found = _find_angles(rows, tables)
        graph = self._find_graph(layouts, tables)
        filled = zip(rows, layouts, found, strict=True)
        graph.load(batch, [own.fill(layout, slots) for own, layout, slots in filled])
        return graph.replay()[:count]

    def _find_graph(self, layouts: Sequence[RowLayout], tables: Sequence[Tables]) -> _Graph:
        """A graph reads the tables that it was captured with: where they have been made anew, it is no longer found."""
        name = tuple(layouts), tuple(own.versions for own in tables)
        if name not in self._graphs:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[name] = _Graph(layouts, self._blocks, self._run, self._capture)
        self._graphs.move_to_end(name)
        return self._graphs[name]

    def _run(self, batch: Batch) -> Tensor:
        return self._model.forward(batch, self._storage)

    def _idle_step(self, rows: int, positions: ModelPositions) -> Batch:
        chunks = [Chunk([0], 0, [0], positions, 1)] * rows
        return build_batch(chunks, self._block_size, self._model.device)

    def _reserve(self, positions: ModelPositions) -> None:
        """Room in the tables for whatever steps of these positions turn by, so that graphs stay good."""
        wanted = defaultdict[Tables, list[int]](list)
        for key in self._keys:
            if key.group is not None:
                method = positions.methods[key.group]
                parts = [part for _, _, reading in method.runs(0, self._max_model_len) for part in reading.parts]
                own = tables_of(self._model.device, key.rotary_dim(method.rotary), key.tile)
                most = self._buckets[-1] * method.num_parts  # each row of a step may have a reading of its own
                wanted[own].append(min(most, len({part.key for part in parts} | {part.query for part in parts})))
        for own, counts in wanted.items():
            own.keys.reserve(sum(counts), self._max_model_len)
            own.queries.reserve(sum(counts))


def _find_angles(rows: Sequence[SingleRows], tables: Sequence[Tables]) -> list[FoundSlots]:
    """Slots in the tables as they are now: looked up again where a later one had them made anew."""
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
        capture: Callable[[Callable[[], Tensor]], Replay],
    ) -> None:
        rows, device = layouts[0].rows, blocks.device
        self._layouts, self._blocks = layouts, blocks
        self._buffer = torch.zeros(sum(layout.buffer.size for layout in layouts), dtype=torch.int32, device=device)
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)  # ids, positions, slots
        self._logit_rows = torch.arange(rows, device=device)
        self._run, self._capture = run, capture
        self._captured: Replay | None = None

    def load(self, batch: Batch, buffers: Sequence[Ints]) -> None:
        """The step's numbers into the graph's tensors; buffers: of the layouts, on the host."""
        count, device, metadata = len(batch.input_ids), self._inputs.device, batch.metadata
        self._inputs[:, :count] = torch.stack([batch.input_ids, batch.position_ids, metadata.slot_mapping])
        self._inputs[2, count:] = -1  # stored nowhere
        self._buffer.copy_(send(np.concatenate(buffers), device))
        blocks = send(block_tables(metadata), device)
        self._blocks[:count, : blocks.shape[1]] = blocks

    def replay(self) -> Tensor:
        """Captured at the first call, when the tensors hold a step."""
        if self._captured is None:
            self._captured = self._capture(self._step)
        return self._captured()

    def _step(self) -> Tensor:
        ids, positions, slots = self._inputs
        plans: dict[Hashable, Any] = {}
        begin = 0
        for layout in self._layouts:
            end = begin + layout.buffer.size
            plans[layout.key] = layout.plan(self._buffer[begin:end], self._blocks)
            begin = end
        # Of the sequences, attention asks only for how many rows each has: everything else is in the plans.
        nobody = SequenceRows(0, 1, 0, torch.empty(0, dtype=torch.int64), ModelPositions({}, ""))
        metadata = AttentionMetadata([nobody] * len(ids), slots, 0, plans)
        return self._run(Batch(ids, positions, self._logit_rows, metadata))
