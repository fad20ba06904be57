"""Builds and loads the C kernels of the CPU. Without a C compiler there are none, and torch does the work.

The library is built once for its sources, a compiler and a processor, and kept. It runs its loops on the OpenMP that
torch has loaded already: two OpenMP runtimes would fight for the same cores.
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

SOURCES = Path(__file__).parent / "c"
FLAGS = [
    *("-O3", "-march=native", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-freciprocal-math"),
]

_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL | None:
    """The kernels, when `prepare` has found or built them."""
    return _library


def prepare(directory: Path | None) -> str:
    """Load the kernels, building them into `directory` (a temporary one when None) if need be; says how that went."""
    global _library
    if _library is not None:
        return "the C kernels are loaded"
    compiler = shutil.which("cc") or shutil.which("gcc")
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    if compiler is None or openmp is None:
        missing = "a C compiler (cc)" if compiler is None else "torch's OpenMP library"
        return f"no {missing} found: attention runs in torch, slower"
    directory = directory or Path(tempfile.mkdtemp(prefix="prerope-"))
    target = directory / f"kernels-{_fingerprint(compiler)}.so"
    try:
        if not target.exists():
            _build(compiler, target)
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _first_error(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"the C kernels could not be built ({reason}): attention runs in torch, slower"
    for name in ("decode", "prefill", "linear", "gated", "rms_norm", "store", "layers"):
        getattr(loaded, f"prerope_{name}").restype = None
    loaded.prerope_prefill_scratch.restype = loaded.prerope_linear_scratch.restype = ctypes.c_int64
    _library = loaded
    return "the C kernels are loaded"


def _build(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources, linked = sorted(SOURCES.glob("*.c")), Path(folder, "kernels.so")
        compiled = [Path(folder, source.stem + ".o") for source in sources]
        commands = [
            [compiler, *FLAGS, *wide, "-c", str(source), "-o", str(to)]
            for source, to in zip(sources, compiled, strict=True)
        ]
        # Linked without -fopenmp: its symbols are resolved against the runtime that torch brought.
        commands.append([compiler, "-shared", *map(str, compiled), "-o", str(linked), "-lm"])
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(linked, target)


def _first_error(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _fingerprint(compiler: str) -> str:
    h = hashlib.blake2b(" ".join(FLAGS).encode(), digest_size=8)
    for source in sorted(SOURCES.glob("*.[ch]")):
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
