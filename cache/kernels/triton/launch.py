"""How kernels are launched: tile sizes, and the arguments that decode and prefill have in common."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TRITON_VERSION = triton.__version__  # its package has other names, too, as ROCm's
LEAST = 16  # the smallest side of a product


def padded(size):
    """Lanes for `size` dims: a power of two that a product takes."""
    return max(LEAST, triton.next_power_of_2(size))


def interpreted():
    """Whether kernels run on the CPU, in Triton's interpreter. It reads bf16 products wrongly: they are fp32 there."""
    return triton.knobs.runtime.interpret


@cache
def device_arch():
    """10 · major + minor of the device's compute capability; 90 where there is none, 0 of AMD's, which counts anew."""
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def upright(arch):
    """Whether a product of 64 rows reads both sides from shared memory: sm_90 alone. Elsewhere it takes registers."""
    return (device_arch() if arch is None else arch) // 10 == 9


def values_shared(arch):
    """Whether a product with 64 values and more on its long side reads them from shared memory: sm_90 and sm_100."""
    return (device_arch() if arch is None else arch) // 10 in (9, 10)


@dataclass(frozen=True, slots=True)
class Config:
    """block_m: rows × query heads; block_n: keys. Chosen by a function, not by trying: a start must not wait for it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def constants(query, keys, values, plan, options, config):
    """All constants that kernels are compiled for; each takes those that it has parameters for."""
    kv_heads, dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    dtype = torch.float32 if interpreted() else keys.dtype
    return {
        "GROUP": query.shape[1] // kv_heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "ROTARY": plan.rotary_dim,
        "INTERLEAVED": plan.interleaved,
        "BLOCK_SIZE": keys.shape[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TABLE_N": plan.key_turns.shape[1],
        "HALF": padded(plan.rotary_dim // 2),
        "REST": padded(dim - plan.rotary_dim) if dim > plan.rotary_dim else 0,
        "DIMS": padded(dim),
        "VALUES": padded(value_dim),
        "GROUPED": plan.grouped,
        "DECAY": plan.fades,
        "SOFTCAP": options.softcap is not None,
        "SINKS": options.sinks is not None,
        "SLOPES": options.slopes is not None,
        "DTYPE": DTYPES[dtype],
        "PRECISION": "tf32x3" if dim <= 128 else "ieee",  # of fp32 products; see decode's
        "STAGES": config.num_stages,
    }


def num_programs(kv_heads, group, config):
    """Of a tile of rows, as `read.heads_of` counts them: one a KV head, or several where its heads are too many."""
    return kv_heads * triton.cdiv(group, config.block_m)


def launch(kernel, grid, arguments, constants, num_warps=4):
    """Launch the kernel with those of the arguments and constants that it has parameters for."""
    everything = arguments | constants
    kernel[grid](**{name: everything[name] for name in kernel.arg_names}, num_warps=num_warps)


def arguments(query, keys, values, plan, options, out):
    """The tensors and numbers of one layer by the names of the kernels' parameters."""
    assert query.stride(2) == 1, "a head's dims lie side by side"
    assert query.stride(1) == query.shape[2], "heads lie side by side"
    assert keys.is_contiguous(), "the cache is contiguous"
    assert values.is_contiguous(), "the cache is contiguous"
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "out": out,
        "sinks": out if options.sinks is None else options.sinks,
        "slopes": plan.row_scale if options.slopes is None else options.slopes,
        "tiles": plan.tiles,
        "reads": plan.reads,
        "spans": plan.spans,
        "turns": plan.turns,
        "base_turns": plan.base_turns,
        "key_turns": plan.key_turns,
        "decay": plan.decay,
        "row_scale": plan.row_scale,
        "blocks": plan.blocks,
        "query_stride": query.stride(0),
        "table_rows": plan.base_turns.shape[1],
        "max_blocks": plan.blocks.shape[1],
        "num_rows": len(query),
        "num_tiles": len(plan.tiles),
        "num_parts": plan.num_parts,
        "num_spans": len(plan.spans),
        "scale": float(options.scale),
        "softcap": float(options.softcap or 1.0),
    }
