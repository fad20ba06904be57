"""The kernels as other processors have them find what this one's reference finds: ARM under qemu, x86 without AVX-512.

    apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

A step's plan and tensors are prepared here, with the kernels of this machine, and handed to `call.c`, byte for byte.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionOptions, SequenceRows
from prerope.cache.cpu.bounds import KeyBounds
from prerope.cache.cpu.decode import DecodePlan, kernel_shape, plan_step
from prerope.cache.kernels.build import DTYPES, FLAGS, SOURCES
from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.models.cpu import build as models
from prerope.server.models.cpu.products import BYTE_DOTS, BYTES, DOTS, FULL, WIDENED, Products
from torch import Tensor, nn

from tests.cache.layouts import method, one_group, paged, rotary

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("decode_kernel")]

LINEAR, PLAN_ROWS, ROWS, HAS_DOTS, BOUNDS = range(5)
PROCESSORS = {
    "aarch64": ("aarch64-linux-gnu-gcc", ["-march=armv8-a"], ["qemu-aarch64"]),
    "aarch64 with bf16": ("aarch64-linux-gnu-gcc", ["-march=armv8.6-a+bf16"], ["qemu-aarch64", "-cpu", "max"]),
    "AVX2": ("gcc", ["-march=haswell"], []),
    "x86-64-v2": ("gcc", ["-march=x86-64-v2"], []),
}


@dataclass
class Processor:
    """A program of its own, and the areas and calls that it is given next."""

    command: list[str]
    folder: Path
    areas: list[tuple[int, int, bool]] = field(default_factory=list)
    calls: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)

    def give(self, *memory: Any, pointers: bool = False) -> None:
        """Tensors, arrays and ctypes structures; null where there is none."""
        self.held += memory
        for one in memory:
            if isinstance(one, Tensor):
                self.areas.append((one.data_ptr(), one.nbytes, pointers))
            elif isinstance(one, np.ndarray):
                self.areas.append((one.ctypes.data, one.nbytes, pointers))
            elif one is not None:
                self.areas.append((ctypes.addressof(one), ctypes.sizeof(one), pointers))

    def call(self, function: int, *arguments: Any) -> None:
        numbers = (
            one.data_ptr() if isinstance(one, Tensor) else one if isinstance(one, int) else ctypes.addressof(one)
            for one in arguments
        )
        self.calls.append((function, tuple(numbers)))

    def run(self) -> None:
        """Make the calls; tensors and arrays then hold what they left."""
        given, found = self.folder / "given", self.folder / "found"
        with given.open("wb") as file:
            file.write(struct.pack("q", len(self.areas)))
            for address, size, pointers in self.areas:
                file.write(struct.pack("qqq", address, size, pointers) + ctypes.string_at(address, size))
            file.write(struct.pack("q", len(self.calls)))
            for function, numbers in self.calls:
                file.write(struct.pack(f"{2 + len(numbers)}q", function, len(numbers), *numbers))
        subprocess.run([*self.command, given, found], check=True, timeout=300, env={"OMP_NUM_THREADS": "2"})
        left = found.read_bytes()
        for address, size, pointers in self.areas:
            if not pointers:
                ctypes.memmove(address, left[:size], size)
            left = left[size:]
        self.areas, self.calls, self.held = [], [], []


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    compiler, flags, emulator = PROCESSORS[request.param]
    missing = [name for name in (compiler, *emulator[:1]) if shutil.which(name) is None]
    if missing or (not emulator and platform.machine() != "x86_64"):
        pytest.skip(f"no {' or '.join(missing)}" if missing else "not an x86 machine")
    folder = tmp_path_factory.mktemp("processor")
    common = [flag for flag in FLAGS if not flag.startswith(("-march", "-mprefer"))]
    folders = (SOURCES, models.SOURCES)
    sources = [*(file for one in folders for file in sorted(one.glob("*.c"))), Path(__file__).with_name("call.c")]
    included = [argument for one in folders for argument in ("-I", one)]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler, *common, *flags, *included, "-c", source, "-o", to]
        for source, to in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True, timeout=300), commands))
    program = folder / "call"
    static = ["-static"] if emulator else []
    subprocess.run([compiler, *static, "-fopenmp", *objects, "-o", program, "-lm"], check=True, timeout=100)
    return Processor([*emulator, str(program)], folder)


def attended(processor: Processor, step: Any, plan: DecodePlan, options: AttentionOptions, dots: bool) -> Tensor:
    """The rows of a plan that was made here and is made again there."""
    shape = kernel_shape(step.query.shape[1], step.query.dtype, step.keys, step.values, plan.method, options)
    shape.dots = dots
    rows, readings, sequences, *buffers = plan.held
    out, scratch = torch.zeros_like(step.query), torch.empty(plan.scratch_size(shape))
    bounds = torch.zeros(KeyBounds.shape_of(step.keys.shape), dtype=step.keys.dtype)
    blocks = torch.arange(len(step.keys))
    processor.give(shape, step.query, step.keys, step.values, bounds, blocks, out, scratch, *buffers)
    processor.give(plan.plan, rows, pointers=True)
    processor.give(*(sequence.block_table for sequence in {id(one): one for one in sequences}.values()))
    for reading in {id(one): one for one in readings}.values():
        processor.give(reading.kernel, reading._parts, pointers=True)
        for turns, part in zip(reading.turns, reading.reading.parts, strict=True):
            processor.give(turns.kernel, pointers=True)
            processor.give(*turns._held, part.query.theta, part.query.offset, part.query.groups)
        processor.give(reading.reading.decay)
    width = step.keys.shape[2] * step.keys.shape[3]
    processor.call(BOUNDS, step.keys, bounds, blocks, len(blocks), step.keys.shape[1], width, DTYPES[step.keys.dtype])
    processor.call(PLAN_ROWS, plan.plan)
    processor.call(ROWS, shape, plan.plan, step.query, step.keys, step.values, bounds, 0, scratch, out)
    processor.run()
    return out


@pytest.mark.parametrize(("dtype", "dots"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1)], ids=str)
@pytest.mark.parametrize("name", ["rope", "rerope", "dpe", "dual_chunk", "xpos"])
def test_attention(processor: Processor, name: str, dtype: torch.dtype, dots: bool) -> None:
    """To the reference's result, and of a run of rows to the bits of each of them alone."""
    options = AttentionOptions(0.25, "")
    positions = one_group(method(name, rotary(64, 64), window=32))
    step = paged([(505, 9), (70, 1)], [positions] * 2, heads=6, head_dim=64, dtype=dtype)
    step = replace(step, query=step.query.float())
    plan = plan_step(step.metadata, options)
    assert plan is not None
    together = attended(processor, step, plan, options, dots)
    expected = reference_attention(step.query, step.keys, step.values, step.metadata, options)
    torch.testing.assert_close(together, expected, rtol=0, atol=2e-2 if dots else 2e-5)
    whole = step.metadata.sequences[0]
    singles = [SequenceRows(n, 1, whole.start + n, whole.block_table.clone(), positions) for n in range(whole.count)]
    alone = plan_step(replace(step.metadata, sequences=singles, plans={}), options)
    assert alone is not None
    assert torch.equal(attended(processor, step, alone, options, dots)[:9], together[:9])


@pytest.mark.parametrize(("dtype", "dots"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_rows_that_choose_their_far_keys(processor: Processor, dtype: torch.dtype, dots: bool) -> None:
    options = AttentionOptions(0.25, "")
    resolved = method("rerope", rotary(64, 64), window=32)
    positions = ModelPositions({"": resolved}, "", RopeSpec(method="rerope", select=128))
    step = paged([(1600, 2), (1400, 1)], [positions] * 2, heads=6, head_dim=64, dtype=dtype)
    sequences = [replace(one, selects_from=0) for one in step.metadata.sequences]
    step = replace(step, query=step.query.float(), metadata=replace(step.metadata, sequences=sequences))
    plan = plan_step(step.metadata, options)
    assert plan is not None
    assert plan.selects
    expected = reference_attention(step.query, step.keys, step.values, step.metadata, options)
    found = attended(processor, step, plan, options, dots)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if dots else 2e-5)


@pytest.mark.parametrize("kind", [FULL, WIDENED, DOTS, BYTES, BYTE_DOTS])
def test_products(processor: Processor, kind: int) -> None:
    """Streamed and from panels, with features that are no multiple of a block."""
    dtype = torch.float32 if kind == FULL else torch.bfloat16
    generator = torch.Generator().manual_seed(kind)
    linear = nn.Linear(96, 50, dtype=dtype).requires_grad_(False)
    for tensor in (linear.weight, linear.bias):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    products = Products([linear])
    weight, x = linear.weight.data, torch.randn(70, 96, generator=generator).to(dtype)
    exact_weight = weight.double()
    if kind in (BYTES, BYTE_DOTS):
        weight = torch.randint(-128, 128, (50, 96), generator=generator).to(torch.int8)
        scales = torch.rand(50, generator=generator)
        products._parts[0].weight, products._parts[0].scales = weight.data_ptr(), scales.data_ptr()
        exact_weight = weight.double() * scales.double()[:, None]
    expected = x.double() @ exact_weight.T + linear.bias.double()
    size = x.double().abs() @ exact_weight.abs().T
    found = []
    for few in (16, 128):
        scratch, (out,) = torch.zeros(70 * 96 + 4 * 32 * 96 + 64), products.aim(x)
        products.plan.kind, products.plan.threads = kind, 2
        if kind in (BYTES, BYTE_DOTS):
            processor.give(scales)
        processor.give(weight, linear.bias.data, x, out, scratch)
        processor.give(products.plan, products._parts, pointers=True)
        processor.call(LINEAR, products.plan, few, scratch)
        processor.run()
        found.append(out)
        allowed = expected.abs() * 2**-8 + size * 2**-16 if dtype == torch.bfloat16 else size * 2**-21
        assert ((out.double() - expected).abs() <= allowed + 1e-6).all()
    assert torch.equal(*found)


def test_pairs_are_multiplied_where_the_processor_can(processor: Processor, request: pytest.FixtureRequest) -> None:
    answer = torch.full((1,), -1)
    processor.give(answer)
    processor.call(HAS_DOTS, answer)
    processor.run()
    assert bool(answer) == ("with bf16" in request.node.name)


@pytest.mark.parametrize(
    ("compiler", "arch"),
    [("gcc", "x86-64-v4"), ("gcc", "x86-64-v3"), ("gcc", "x86-64-v2"), ("aarch64-linux-gnu-gcc", "armv8-a")],
)
@pytest.mark.parametrize("source", [models.SOURCES / "linear.c", SOURCES / "attend.c"], ids=lambda path: path.stem)
def test_vectors_stay_in_registers(compiler: str, arch: str, source: Path) -> None:
    """A compiler takes a vector wider than a register apart, on the stack: results are right, and slow.

    Vectors of 16 floats were stored there 1.8 to 4.6 times a product, on x86 without AVX-512. What folds finished sums
    stores, too, however few products a loop is written with.
    """
    if shutil.which(compiler) is None or (compiler == "gcc" and platform.machine() != "x86_64"):
        pytest.skip(f"no {compiler} for {arch}")
    common = [flag for flag in FLAGS if not flag.startswith(("-march", "-mprefer"))]
    included = [argument for one in (SOURCES, models.SOURCES) for argument in ("-I", str(one))]
    command = [compiler, *common, f"-march={arch}", *included, "-S", str(source), "-o", "-"]
    code = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout.splitlines()
    product, stored = r"\s+(vfmadd|v?mulps|fmla)", r"\s+(v?mov\w+\s+%[xyz]mm\d+, -?\d*\(%r[sb]p|st[pr]\s+q.*\[sp)"
    products, stores = (sum(re.match(pattern, line) is not None for line in code) for pattern in (product, stored))
    assert products > 300
    assert stores < 1.2 * products
