"""Decode and prefill kernels against the reference: shapes, methods, edges."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.attention import cuda_attention
from prerope.cache.cuda.decode import plan_rows
from prerope.cache.cuda.plan import NO_READ, PlanKey
from prerope.cache.cuda.tiles import Choice, use
from prerope.cache.kernels.triton import decode as decode_module
from prerope.cache.kernels.triton import prefill as prefill_module
from prerope.cache.kernels.triton.decode import config, decode, decode_kernel, grid
from prerope.cache.kernels.triton.launch import Config
from prerope.cache.kernels.triton.prefill import config as prefill_config

from tests.cache.layouts import METHOD_NAMES, WINDOWED, method, one_group, rotary
from tests.device import DEVICE
from tests.kernels.steps import TOLERANCE, difference, paged
from tests.tiers import every

# Trained length 64, window 32, tiles of 32 keys and buckets of 256 rows: a row on each side of every edge.
DECODED = [(position, 1) for position in (0, 31, 32, 33, 64, 257)]
CHUNKS = [(25, 15), (250, 12)]


@pytest.mark.parametrize("name", every(6, METHOD_NAMES, quick=2))
def test_every_method(name: str) -> None:
    """Decoded rows and chunks side by side; dynamic methods' last chunk lies in two runs."""
    positions = one_group(method(name, rotary(16, 16), window=32, logn=True))
    step = paged(DECODED + CHUNKS, [positions] * len(DECODED + CHUNKS), heads=4, kv_heads=1)
    assert difference(step, AttentionOptions(0.25, "")) <= TOLERANCE


@pytest.mark.parametrize("group", every(2, [3, 7, 48]))
def test_groups_that_begin_inside_a_tile(group: int) -> None:
    """Tiles of 32 keys begin anywhere in a group of 3 and 7, and a group of 48 is longer than a tile."""
    positions = one_group(method("self_extend", rotary(16, 16), window=48, group=group))
    rows = [(location, 1) for location in (95, 130, 257)] + [(250, 12)]
    assert difference(paged(rows, [positions] * 4, heads=4, kv_heads=1), AttentionOptions(0.25, "")) <= TOLERANCE


@pytest.mark.parametrize(
    "name", every(3, ["self_extend", "rope", "dual_chunk", "dynamic_ntk", "xpos", "streaming"], quick=1)
)
def test_tiles_inside_those_of_the_tables(name: str) -> None:
    """As of the widest heads, where some rows' keys turn in groups, or fade: a tile is a part of one of the tables'."""

    def tiles(*_: object, more: bool = False) -> Config:
        return Config(16, 16 if more else 64, 8, 2)

    names = (name, "self_extend", "self_extend", "xpos")
    groups = (7, 5, 48, 1)
    options: list[dict[str, int]] = [
        {"group": group} if "self" in own else {} for own, group in zip(names, groups, strict=True)
    ]
    methods = [method(own, rotary(16, 16), window=24, **asked) for own, asked in zip(names, options, strict=True)]
    positions = [one_group(own) for own in methods]
    with patch("prerope.cache.kernels.triton.decode.config", tiles):
        for locations in ((15, 16, 63, 64), (300, 257, 130, 95), (118, 71, 292, 200)):
            step = paged([(at, 1) for at in locations], positions, heads=4, kv_heads=1)
            assert difference(step, AttentionOptions(0.25, "")) <= TOLERANCE


ROWS = st.tuples(st.integers(0, 300), st.sampled_from([1, 1, 2, 15, 33]))


@given(
    rows=st.lists(ROWS, min_size=1, max_size=3),
    names=st.lists(st.sampled_from(METHOD_NAMES), min_size=3, max_size=3),
    window=st.sampled_from([1, 31, 32, 33, 63]),
    logn=st.booleans(),
    interleaved=st.booleans(),
    dim=st.sampled_from([4, 16, 24]),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 1), (8, 1), (16, 1)]),
    block_size=st.sampled_from([1, 8, 16]),
    sliding_window=st.one_of(st.none(), st.integers(1, 80)),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    slopes=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@pytest.mark.slow
def test_any_shape(
    rows: list[tuple[int, int]],
    names: list[str],
    window: int,
    logn: bool,
    interleaved: bool,
    dim: int,
    heads: tuple[int, int],
    block_size: int,
    sliding_window: int | None,
    softcap: float | None,
    sinks: bool,
    slopes: bool,
    seed: int,
) -> None:
    """Ragged sequences side by side, each with a method of its own."""
    embedding = rotary(24, dim, interleaved=interleaved)
    positions = [one_group(method(name, embedding, window=window, logn=logn)) for name in names]
    step = paged(rows, positions, heads=heads[0], kv_heads=heads[1], head_dim=24, block_size=block_size, seed=seed)
    sink = torch.linspace(-1, 2, heads[0], device=DEVICE) if sinks else None
    slope = torch.linspace(0.02, 0.7, heads[0], device=DEVICE) if slopes else None
    assert difference(step, AttentionOptions(24**-0.5, "", sliding_window, softcap, sink, slope)) <= TOLERANCE


@pytest.mark.parametrize("name", every(3, ["dual_chunk", "rerope", "streaming"]))
def test_a_sliding_window_beside_the_methods_own(name: str) -> None:
    """w − 1, w and w + 1: the far part is empty, is just empty, and has one key a row."""
    assert name in WINDOWED
    rows = [(31, 1), (33, 1), (100, 1), (90, 12)]
    positions = one_group(method(name, rotary(16, 16), window=32))
    for reach in (1, 31, 32, 33):
        step = paged(rows, [positions] * len(rows), heads=2, kv_heads=1, seed=reach)
        assert difference(step, AttentionOptions(0.25, "", reach)) <= TOLERANCE


def test_a_layer_without_positions() -> None:
    positions = one_group(method("rerope", rotary(16, 16), window=32, logn=True))
    step = paged([(70, 1), (40, 30)], [positions] * 2, heads=2, kv_heads=1)
    for reach in (None, 9):
        assert difference(step, AttentionOptions(0.25, None, reach)) <= TOLERANCE


@pytest.mark.parametrize(
    ("head_dim", "dim", "interleaved"),
    [(64, 64, False), (80, 80, True), (80, 32, False), (96, 96, False), (128, 64, True), (256, 256, False)],
)
def test_head_dims(head_dim: int, dim: int, interleaved: bool) -> None:
    positions = one_group(method("leaky_rerope", rotary(head_dim, dim, interleaved=interleaved), window=32))
    step = paged([(50, 1), (40, 9)], [positions] * 2, heads=3, kv_heads=1, head_dim=head_dim)
    assert difference(step, AttentionOptions(head_dim**-0.5, "")) <= TOLERANCE


@pytest.mark.parametrize("group", every(2, [17, 40]))
def test_more_heads_than_a_tile(group: int) -> None:
    """Several programs share a KV head, each with some of its query heads; scratch has room for one head alone."""
    positions = [one_group(method(name, rotary(16, 16), window=32)) for name in ("rerope", "self_extend")]
    step = paged([(50, 1), (34, 3)], positions, heads=2 * group, kv_heads=2)
    slopes, sinks = (torch.linspace(0.02, 0.7, 2 * group, device=DEVICE) for _ in range(2))
    for module in (decode_module, prefill_module):
        assert -(-group // module.config(group, 80, torch.float32).block_m) == -(-group // 16)
    with (
        patch.object(decode_module, "config", lambda *_, **__: Config(16, 32, 8, 2)),
        patch.object(prefill_module, "config", lambda *_: Config(16, 32, 8, 2)),
        patch("prerope.cache.kernels.triton.prefill.SCRATCH_BYTES", 40 * 16 * 4),
    ):
        assert difference(step, AttentionOptions(0.25, "", None, 2.0, sinks, slopes)) <= TOLERANCE


@pytest.mark.parametrize(("head_dim", "dim", "value_dim"), [(192, 64, 128), (24, 16, 40)])
def test_values_narrower_and_wider_than_keys(head_dim: int, dim: int, value_dim: int) -> None:
    """As in multi-head latent attention, and the other way."""
    step = paged([(50, 1), (40, 9)], [one_group(method("rope", rotary(head_dim, dim)))] * 2, head_dim=head_dim)
    values = torch.randn(*step.values.shape[:3], value_dim, generator=torch.Generator().manual_seed(0))
    step = replace(step, values=values.to(step.values.device))
    assert difference(step, AttentionOptions(head_dim**-0.5, "")) <= TOLERANCE


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])])
def test_rows_that_fill_a_graph_up_give_zeros(sinks: torch.Tensor | None) -> None:
    """The middle row of three reads nothing; its neighbours do not notice."""
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(70, 1), (50, 1), (90, 1)], [positions] * 3, heads=2, kv_heads=1)
    options = AttentionOptions(0.25, "", sinks=None if sinks is None else sinks.to(DEVICE))
    tile = config(2, 16, torch.float32).block_n
    key = PlanKey(True, 1, tile, tile, 1, 16, "", None)
    plan = plan_rows(step.metadata, key, step.query.device)
    reads = plan.reads.view(3, plan.num_parts, -1)
    turn = reads[1, :, 5].clone()
    reads[1] = torch.tensor(NO_READ, dtype=torch.int32, device=DEVICE)
    reads[1, :, 5] = turn
    out = torch.full_like(step.query, float("nan"))
    decode(step.query, step.keys, step.values, plan, options, out)
    expected = reference_attention(step.query, step.keys, step.values, step.metadata, options)
    expected[1] = 0.0
    assert (out - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", ["yarn", "leaky_rerope", "xpos"])
def test_low_precision_caches(name: str, dtype: torch.dtype, tolerance: float) -> None:
    positions = one_group(method(name, rotary(16, 16), window=32))
    step = paged([(100, 1), (70, 40)], [positions] * 2, heads=2, kv_heads=1, dtype=dtype)
    assert difference(step, AttentionOptions(0.25, "")) <= tolerance


def test_scores_of_very_different_size() -> None:
    """One key far away outweighs all others: items of a row, and parts of a tile, merge without overflow."""
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(200, 1), (150, 5)], [positions] * 2, heads=2, kv_heads=1)
    step.query.mul_(30)
    assert difference(step, AttentionOptions(0.25, "")) <= 1e-4


def test_nothing_beyond_a_row_is_read() -> None:
    """Neither rubbish in the last block's tail nor what other sequences' blocks hold; not even as NaN times zero."""
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(70, 1), (37, 5)], [positions] * 2, heads=2, kv_heads=1)
    options = AttentionOptions(0.25, "")
    before = cuda_attention(step.query, step.keys, step.values, step.metadata, options)
    used = torch.zeros(step.keys.shape[:2], dtype=torch.bool)
    for sequence in step.metadata.sequences:
        slots = (sequence.block_table[:, None] * 16 + torch.arange(16)).flatten()
        used.view(-1)[slots[: sequence.length]] = True
    for cache in (step.keys, step.values):
        cache[~used.to(DEVICE)] = float("nan")
    assert torch.equal(before, cuda_attention(step.query, step.keys, step.values, step.metadata, options))


def test_plans_are_shared_by_layers_of_a_step() -> None:
    """The same metadata serves layers of other options and shapes: nothing that a layer asked for may stick."""
    positions = one_group(method("rerope", rotary(16, 16), window=32))
    step = paged([(60, 1), (33, 9)], [positions] * 2, heads=4, kv_heads=2)
    options = AttentionOptions(0.25, "")
    for changed in (
        options,
        replace(options, sliding_window=9),
        replace(options, group=None),
        replace(options, softcap=2.0, sinks=torch.ones(4, device=DEVICE)),
        options,
    ):
        assert difference(step, changed) <= TOLERANCE


SCRATCHES = (1, 70, 100, 10_000)
SCRATCHED = ("rope", "dynamic_leaky", "dynamic_ntk", "xpos", "rerope", "dual_chunk")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(name, rows, marks=() if (number + place) % 6 == 0 else pytest.mark.slow)
        for number, name in enumerate(SCRATCHED)
        for place, rows in enumerate(SCRATCHES)
    ],
)
def test_scratch_is_bounded(name: str, rows: int) -> None:
    """Runs and heads in passes: several sequences, maps that change within a chunk, keys that are not turned."""
    own = method(name, rotary(16, 16), **({"window": 32} if name in ("dynamic_leaky", "rerope") else {}))
    positions = one_group(own)
    step = paged([(250, 10), (40, 30), (60, 1), (0, 5)], [positions] * 4, heads=2, kv_heads=2)
    num_bytes = rows * 16 * 4
    with (
        patch("prerope.cache.kernels.triton.prefill.SCRATCH_BYTES", num_bytes),
        patch("prerope.cache.cuda.prefill.SCRATCH_BYTES", num_bytes),
    ):
        assert difference(step, AttentionOptions(0.25, "")) <= TOLERANCE


def test_a_query_that_is_a_view_of_merged_projections() -> None:
    positions = one_group(method("rope", rotary(16, 16)))
    step = paged([(20, 1), (3, 7)], [positions] * 2, heads=2, kv_heads=1)
    merged = torch.randn(8, 4, 16, device=DEVICE)
    assert difference(replace(step, query=merged[:, :2]), AttentionOptions(0.25, "")) <= TOLERANCE


def test_tables_outlive_growth_and_forgetting() -> None:
    """More maps and longer sequences than fit at first: steps before and after read alike."""
    positions = [one_group(method("dynamic_ntk", rotary(16, 16))) for _ in range(12)]
    for rows in ([(300 + 256 * n, 1) for n in range(6)], [(2100 + 256 * n, 1) for n in range(12)], [(300, 1)]):
        step = paged(rows, positions, heads=1, kv_heads=1)
        assert difference(step, AttentionOptions(0.25, "", sliding_window=20)) <= TOLERANCE


@pytest.mark.parametrize("name", every(2, ["self_extend", "rerope"]))
def test_tiles_that_were_measured(name: str) -> None:
    """Kernels are launched by them, for heads of the shape that was measured alone; what turns in groups is as fine."""
    dtype = str(torch.float32).removeprefix("torch.")
    positions = [one_group(method(name, rotary(16, 16), window=24))] * 4
    step = paged([(300, 1), (63, 1), (95, 1), (90, 40)], positions, heads=4, kv_heads=1)
    shipped = config(4, 16, torch.float32), prefill_config(4, 16, torch.float32)
    chosen = [
        Choice("decode", 4, 16, dtype, (16, 16, 4, 3), heads_first=False, items=9),
        Choice("prefill", 4, 16, dtype, (64, 16, 4, 2)),
    ]
    use(chosen)
    try:
        assert config(4, 16, torch.float32) == Config(16, 16, 4, 3) != shipped[0]
        assert prefill_config(4, 16, torch.float32) == Config(64, 16, 4, 2) != shipped[1]
        assert config(4, 16, torch.float32, more=True).block_n <= 16
        assert config(2, 16, torch.float32) == shipped[0]
        assert config(4, 16, torch.float32, 90) == shipped[0], "what is compiled for a card that is not here"
        assert grid(4, 16, torch.float32) == (9, False)
        assert grid(2, 16, torch.float32) == (decode_module.ITEMS, True)
        with patch.object(decode_module, "launch", wraps=decode_module.launch) as launched:
            assert difference(step, AttentionOptions(0.25, "")) <= TOLERANCE
        (_, most), *_ = [call.args[1] for call in launched.call_args_list if call.args[0] is decode_kernel]
        assert most == 1, "KV heads come last"
    finally:
        use([])
