"""Every shipped configuration compiles for a GPU that need not be there, and no kernel spills registers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import every

ROOT = Path(__file__).parent.parent.parent
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # most that a program may take
ALONE = ("decode_kernel", "prefill_kernel", "turn_queries_kernel", "turn_keys_kernel")
"""Each a slice of an architecture's kernels, and all others another: on two cores a slice takes some minutes."""
SLICES = [f"{arch} {names}" for arch in SHARED_MEMORY for names in (*ALONE, " ".join(f"-{name}" for name in ALONE))]


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton's assembler runs on Linux only")
@pytest.mark.parametrize("asked", every(1 + len(SLICES), ["few 90", *SLICES], quick=0))
def test_no_kernel_spills(asked: str, tmp_path: Path) -> None:
    """Some for an H100; all of them, for each architecture, are slow."""
    few, turned = asked.startswith("few"), any(asked.endswith(f" {name}") for name in ALONE)
    arch = int(asked.removeprefix("few ").split()[0])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", *asked.split()],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > (10 if few else 30)
    dims = {64} if few else {64, 80, 96, 112, 128, 160, 192, 256, 512} if turned else set()
    assert {kernel["dim"] for kernel in found} >= dims
    assert [kernel for kernel in found if kernel["spilled"]] == []
    assert [kernel for kernel in found if kernel["shared"] > SHARED_MEMORY[arch]] == []
    for kernel in found:
        if kernel["kernel"] in ("decode_kernel", "prefill_kernel") and kernel["dtype"] != "torch.float32":
            # Keys and values come 16 bytes at a time, copied, but to the one tile that has no registers for copies.
            few_registers = kernel["dim"] > 256 and kernel["more"] and arch == 80
            assert few_registers or kernel["kinds"]["LDGSTS.E.BYPASS.128"] > 0, kernel
            narrow = kernel["dim"] <= 128 and kernel["heads"] <= 16
            assert arch != 90 or not narrow or ("HGMMA" in kernel["kinds"] and "HMMA" not in kernel["kinds"]), kernel
            # Copies are on their way while a tile is read. Of the widest prompts there is room for one tile more alone.
            few_bytes = kernel["dim"] <= 128 or kernel["kernel"] == "decode_kernel"
            assert arch != 90 or not few_bytes or kernel["ahead"] >= 2, kernel
