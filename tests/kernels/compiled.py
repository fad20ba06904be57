"""Compiles every shipped configuration for a GPU that need not be there, and prints what each takes, a JSON line each.

    python -m tests.kernels.compiled 80 90
    python -m tests.kernels.compiled few 90               # one shape of heads and one width
    python -m tests.kernels.compiled 90 decode_kernel     # one kernel; -decode_kernel: all but that one

A process of its own: kernels are compiled or interpreted, as was decided when Triton was imported.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from prerope.cache.kernels.triton import decode, prefill, splits, store, turns
from prerope.cache.kernels.triton.launch import Config, constants
from prerope.cache.kernels.triton.read import RECORDS
from prerope.server.models.cuda import elementwise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CACHES = {"query", "keys", "values", "out", "sinks", "turned_queries", "scratch", "key", "value"}
CACHES |= {"x", "residual", "weight", "total", "gate_up"}
INTS = {"tiles", "reads", "spans", "blocks", "schedule", "slots"}
FLOATS = {"turns", "base_turns", "key_turns", "decay", "row_scale", "slopes", "partial", "stats"}
ALIGNED = (CACHES | FLOATS | INTS) - set(RECORDS) | {"query_stride", "key_stride", "value_stride"}
ALIGNED |= {"outer_stride", "inner_stride", "residual_stride", "row_stride"}

READ = (decode.decode_kernel, prefill.prefill_kernel)
"""Whose instructions are counted: to disassemble a kernel takes as long as to compile a small one."""

HALF = torch.bfloat16
DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
INTERLEAVED = (64, 128)
"""Dims of heads whose neighbours are pairs, where all dims turn (Cohere's, ERNIE's); of others a part turns."""
TURNING: tuple[dict[str, Any], ...] = ({}, {"grouped": True}, {"fades": True}, {"grouped": True, "fades": True})
"""How keys turn: of most methods, of Self-Extend, of xPos, and of a step that has rows of both."""

FEW_SHAPES: list[tuple[int, int, int, torch.dtype, dict[str, Any]]] = [(64, 64, 3, HALF, {})]
# (head dim, rotary dim, query heads of a KV head, dtype, what else is asked for)
SHAPES = [
    *FEW_SHAPES,
    (128, 64, 16, HALF, {"interleaved": True, "grouped": True, "fades": True}),
    (64, 64, 71, HALF, TURNING[-1]),
    (80, 32, 1, HALF, {}),
    (80, 64, 1, HALF, {"interleaved": True}),
    (128, 128, 1, HALF, {"slopes": True}),
    (128, 128, 71, HALF, TURNING[-1]),
    (128, 128, 48, torch.float32, TURNING[-1]),
    (256, 256, 48, HALF, TURNING[-1]),
    (128, 128, 4, torch.float16, {"softcap": 30.0, "sinks": True}),
    (192, 64, 1, HALF, {"interleaved": True, "value_dim": 128}),
    (256, 256, 2, HALF, {"softcap": 50.0, "sinks": True}),
    (256, 64, 1, torch.float16, {"interleaved": True}),
    (512, 128, 8, HALF, {}),
    *((512, 512, 8, HALF, how) for how in TURNING),
    *((512, 512, 8, torch.float32, how) for how in (TURNING[0], TURNING[-1])),
    *((dim, dim, 4, HALF, how) for dim, how in itertools.product(DIMS, TURNING)),
    *((dim, dim, 4, HALF, how | {"interleaved": True})
      for dim, how in itertools.product(INTERLEAVED, (TURNING[0], TURNING[-1]))),
    *((dim, dim, 4, dtype, how)
      for dim, dtype, how in itertools.product(DIMS, (torch.float16, torch.float32), (TURNING[0], TURNING[-1]))),
    *((dim, dim, 4, torch.float32, how) for dim, how in itertools.product(DIMS, TURNING[1:3])),
]  # fmt: skip


def kernels(arch: int, *, few: bool) -> Iterator[tuple[Any, Config, dict[str, Any], torch.dtype]]:
    for dim, rotary, group, dtype, asked in FEW_SHAPES if few else SHAPES:
        query = torch.empty(1, 8 * group, dim, device="meta")
        keys, values = (torch.empty(4, 16, 8, width, device="meta") for width in (dim, asked.get("value_dim", dim)))
        off = {"interleaved": False, "grouped": False, "fades": False, "softcap": None, "sinks": None, "slopes": None}
        plan = SimpleNamespace(rotary_dim=rotary, **(off | asked))
        for module in (decode, prefill):
            tile = module.config(group, dim, dtype, arch).block_n
            plan.key_turns = torch.empty(1, tile, 2, rotary // 2, device="meta")
            more = any(asked.get(name, False) for name in ("grouped", "fades"))
            asked_more = {"more": more} if module is decode else {}
            config = module.config(group, dim, dtype, arch, **asked_more)
            fixed = constants(query, keys.to(dtype), values, plan, plan, config)
            if module is decode:
                fixed |= decode.products(dim, dtype, arch, more=more)
            fixed |= {"UNITS": decode.LEAST_UNITS, "SPANS": 8, "HEADS": 8 * group, "LEAST": decode.LEAST_TILES}
            fixed |= {"MERGED": decode.MERGED // fixed["VALUES"], "HEADS_FIRST": decode.HEADS_FIRST}
            warps = {splits.schedule_kernel: 4, splits.merge_kernel: 4, decode.decode_kernel: config.num_warps}
            if module is prefill:
                warps = {turns.turn_queries_kernel: turns.query_warps(plan)}
                warps[turns.turn_keys_kernel] = turns.key_warps(plan)
                warps[prefill.prefill_kernel] = config.num_warps
            for kernel, num_warps in warps.items():
                yield kernel, replace(config, num_warps=num_warps), fixed, dtype
    yield store.store_kernel, Config(0, 0, 4, 3), {"KEY_SIZE": 192, "VALUE_SIZE": 192, "LANES": store.LANES}, HALF
    for width, dtype in itertools.product(
        (4096,) if few else (128, 576, 4096, 8192, 16384), (HALF,) if few else (HALF, torch.float32)
    ):
        rows, lanes, warps = elementwise.norm_config(width)
        for added, rounded in ((False, False), (True, False), (True, True)):
            fixed = {"WIDTH": width, "ROWS": rows, "LANES": lanes, "RESIDUAL": added}
            fixed |= {"ADD_ONE": rounded, "ROUND_ONCE": rounded}
            yield elementwise.rms_norm_kernel, Config(rows, lanes, warps, 3), fixed, dtype
        gate = {"WIDTH": width, "LANES": elementwise.TILE}
        yield elementwise.silu_mul_kernel, Config(1, elementwise.TILE, 4, 3), gate, dtype


def compiled(kernel: Any, config: Config, fixed: dict[str, Any], dtype: torch.dtype, arch: int) -> dict[str, Any]:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in fixed else "fp32" if name in ("scale", "softcap", "eps") else "i32"
        kind = TYPES[dtype] if name in CACHES else "*i32" if name in INTS else "*fp32" if name in FLOATS else kind
        signature[name] = kind
        if name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    own = {name: value for name, value in fixed.items() if name in signature}
    source = ASTSource(kernel, signature, constexprs=own, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": config.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = dumped(file.name, "-res-usage")
        code = dumped(file.name, "-sass") if kernel in READ else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
    assert found, told
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": binary.metadata.shared,
        "kinds": Counter(re.findall(r"\b(HGMMA|HMMA|LDGSTS(?:\.\w+)*|LDG(?:\.\w+)*)", code)),
        # Copies that a loop leaves on their way when it waits for the oldest: none, and it waits for each in turn.
        "ahead": max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", binary.asm["ptx"])), default=0),
    }


def dumped(cubin: str, option: str) -> str:
    return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout


def named(arch: int, kernel: Any, config: Config, fixed: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    own = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    return {
        "arch": arch,
        "kernel": kernel.__name__,
        "dtype": str(dtype),
        "dim": own.get("DIM"),
        "heads": own.get("GROUP"),
        "more": bool(own.get("GROUPED") or own.get("DECAY")),
        "mixed": bool(own.get("GROUPED") and own.get("DECAY")),
        "warps": config.num_warps,
        "fixed": str(own),
    }


CASES: dict[str, tuple[Any, ...]] = {}
"""By what is printed of them; for the processes that are forked to compile them."""


def told(name: str) -> str:
    arch, kernel, config, fixed, dtype = CASES[name]
    return json.dumps(json.loads(name) | compiled(kernel, config, fixed, dtype, arch))


def main(archs: list[int], names: Collection[str], without: Collection[str], *, few: bool) -> None:
    """names: of kernels, all where there are none."""
    for arch in archs:
        for kernel, config, fixed, dtype in kernels(arch, few=few):
            case, name = (arch, kernel, config, fixed, dtype), kernel.__name__
            if name not in without and (not names or name in names):
                CASES.setdefault(json.dumps(named(*case)), case)
    with multiprocessing.get_context("fork").Pool() as pool:
        for line in pool.imap(told, CASES):
            print(line, flush=True)


if __name__ == "__main__":
    words = {word for word in sys.argv[1:] if not word.isdigit()}
    left_out = {word for word in words if word.startswith("-")}
    main(
        [int(word) for word in sys.argv[1:] if word.isdigit()],
        words - left_out - {"few"},
        {word.removeprefix("-") for word in left_out},
        few="few" in words,
    )
