"""Builds and loads the C kernel of the CPU's decode step. Without a C compiler there is none, and torch does the work.

The library is built once for a source, a compiler and a processor, and kept. It runs its loops on the OpenMP that torch
has loaded already: two OpenMP runtimes would fight for the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "kernels" / "decode.c"
FLAGS = [
    *("-O3", "-march=native", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-freciprocal-math"),
]

_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL | None:
    """The kernel, when `prepare` has found or built it."""
    return _library


def prepare(directory: Path | None) -> str:
    """Load the kernel, building it into `directory` (a temporary one when None) if need be; says how that went."""
    global _library
    if _library is not None:
        return "the C decode kernel is loaded"
    compiler = shutil.which("cc") or shutil.which("gcc")
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    if compiler is None or openmp is None:
        missing = "a C compiler (cc)" if compiler is None else "torch's OpenMP library"
        return f"no {missing} found: decode steps run in torch, slower"
    directory = directory or Path(tempfile.mkdtemp(prefix="prerope-"))
    target = directory / f"decode-{_fingerprint(compiler)}.so"
    try:
        if not target.exists():
            _build(compiler, target)
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _first_error(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"the C decode kernel could not be built ({reason}): decode steps run in torch, slower"
    loaded.prerope_decode.restype = None
    _library = loaded
    return "the C decode kernel is loaded"


def _build(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder, "decode.o"), Path(folder, "decode.so")
        wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
        for command in (
            [compiler, *FLAGS, *wide, "-c", str(SOURCE), "-o", str(compiled)],
            # Linked without -fopenmp: its symbols are resolved against the runtime that torch brought.
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(linked, target)


def _first_error(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _fingerprint(compiler: str) -> str:
    h = hashlib.blake2b(SOURCE.read_bytes() + " ".join(FLAGS).encode(), digest_size=8)
    h.update(subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout)
    cpu = Path("/proc/cpuinfo")
    flags = (
        [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))]
        if cpu.exists()
        else []
    )
    h.update(repr((platform.machine(), flags[:1])).encode())
    return h.hexdigest()
