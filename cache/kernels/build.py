"""Builds and loads the C kernels of the CPU. Without a C compiler there are none, and torch does the work.

The library is built once for its sources, a compiler and a processor, and kept. Those of attention are here; a server
builds its models' into the same one (`server.models.cpu.build`). It runs its loops on the OpenMP that
torch has loaded already: two OpenMP runtimes would fight for the same cores.

Bf16 may be multiplied in two orders: widened to fp32, or in pairs where the processor has an instruction for that. The
two round differently, and a row must not see which kernel it meets, so the whole process keeps to one of them;
`server.models.cpu.trial` finds out at the start which is faster.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from prerope.cache.sealed import find_sealed, sealed_name

SOURCES = Path(__file__).parent / "c"
Functions = Mapping[str, type[ctypes.c_int64] | None]
"""Name without `prerope_` → what it returns."""

FUNCTIONS: Functions = {
    **dict.fromkeys(("chunk", "rows", "query_turns", "store", "plan_rows", "bounds")),
    **dict.fromkeys(("chunk_scratch", "rows_scratch", "has_dots", "reads"), ctypes.c_int64),
}
FLAGS = [
    *("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",  # nothing that lets a compiler round otherwise in one kernel than in another
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What kernels/c/dtypes.h calls the dtypes of queries, keys and values."""

kernels: Any = SimpleNamespace()
"""The kernels by their names without `prerope_`, once `prepare` has found or built them."""

_library: ctypes.CDLL | None = None
_pairs: bool | None = None
"""Whether bf16 is to be multiplied in pairs, once that has been tried."""


def library() -> ctypes.CDLL | None:
    """The library that has the kernels; None: there are none."""
    return _library


def library_path() -> Path | None:
    """The file that the kernels were loaded from."""
    return None if _library is None else Path(_library._name)


def reads(dtype: torch.dtype) -> bool:
    """Whether the kernels are there and were compiled for queries, keys and values of this dtype."""
    return _library is not None and dtype in DTYPES and bool(_library.prerope_reads(ctypes.c_int64(DTYPES[dtype])))


def can_multiply_pairs() -> bool:
    """Whether the processor has dot products of bf16 pairs, and the kernels are there."""
    return _library is not None and bool(_library.prerope_has_dots())


def multiplies_pairs() -> bool:
    """Whether bf16 is multiplied in pairs."""
    return can_multiply_pairs() and _pairs is not False


def multiply_pairs(chosen: bool) -> None:
    """From now on; for models that are loaded afterwards."""
    global _pairs
    _pairs = chosen


def prepare(directory: Path | None, folders: Sequence[Path] = (SOURCES,), functions: Functions = FUNCTIONS) -> str:
    """Load the kernels, building them into `directory` (a temporary one when None) if need be; says how that went.

    folders: of the sources, which may include each other's headers. functions: what they define.
    """
    global _library
    if _library is not None:
        return "the C kernels are loaded"
    compiler = shutil.which("cc") or shutil.which("gcc")
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    if compiler is None or openmp is None:
        missing = "a C compiler (cc)" if compiler is None else "torch's OpenMP library"
        return f"no {missing} found: attention runs in torch, slower"
    directory = directory or Path(tempfile.mkdtemp(prefix="prerope-"))
    stem, num_damaged = f"kernels-{_fingerprint(compiler, folders)}", 0
    try:
        target, num_damaged = find_sealed(directory, stem, ".so")
        target = target or _build(compiler, directory, stem, folders)
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _first_error(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"the C kernels could not be built ({reason}): attention runs in torch, slower"
    for name, returned in functions.items():
        function = getattr(loaded, f"prerope_{name}")
        function.restype = returned
        setattr(kernels, name, function)
    _library = loaded
    damaged = f" (built anew: the copy in {directory} was damaged)" if num_damaged else ""
    return f"the C kernels are loaded{damaged}"


def _build(compiler: str, directory: Path, stem: str, folders: Sequence[Path]) -> Path:
    """Built aside and moved: a file that is there under its name is whole, and two servers may build at once."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        sources, linked = _files(folders, "*.c"), Path(folder, "kernels.so")
        included = [argument for one in folders for argument in ("-I", str(one))]
        compiled = [Path(folder, source.stem + ".o") for source in sources]
        _run_all(
            [compiler, *FLAGS, *included, "-c", str(source), "-o", str(to)]
            for source, to in zip(sources, compiled, strict=True)
        )
        # Linked without -fopenmp: its symbols are resolved against the runtime that torch brought.
        _run_all([[compiler, "-shared", *map(str, compiled), "-o", str(linked), "-lm"]])
        target = directory / sealed_name(linked, stem)
        os.replace(linked, target)
    return target


def _run_all(commands: Iterable[list[str]]) -> None:
    """Side by side; raises what the first that fails raises."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [
            pool.submit(subprocess.run, command, check=True, capture_output=True, text=True) for command in commands
        ]
        for run in runs:
            run.result()


def _first_error(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _files(folders: Sequence[Path], pattern: str) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob(pattern))]


def _fingerprint(compiler: str, folders: Sequence[Path]) -> str:
    h = hashlib.blake2b(" ".join(FLAGS).encode(), digest_size=8)
    for source in _files(folders, "*.[ch]"):
        h.update(source.read_bytes())
    h.update(subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout)
    cpu = Path("/proc/cpuinfo")
    flags = (
        [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))]
        if cpu.exists()
        else []
    )
    h.update(repr((platform.machine(), flags[:1])).encode())
    return h.hexdigest()
