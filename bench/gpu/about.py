"""The card, its clocks, the versions of what runs on it, and which peers and tools there are: for a run's log.

python -m bench.gpu.about
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import torch

from bench.kernels.peers import FA3
from bench.shared.machine import describe_machine

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in describe_machine(device).items():
        print(f"{name}: {value}")
    print(f"CUDA of torch: {torch.version.cuda}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        print(f"compute capability: {major}.{minor}; multiprocessors: "
              f"{torch.cuda.get_device_properties(device).multi_processor_count}")  # fmt: skip
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
        print(subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10).stdout.strip())
    for tool in ("ncu", "compute-sanitizer", "nvcc", "gcc"):
        print(f"{tool}: {shutil.which(tool) or 'not there'}")
    for peer in (*FA3, "flashinfer", "fastapi", "pydantic_settings"):
        print(f"{peer}: {'there' if importlib.util.find_spec(peer) else 'not there'}")


if __name__ == "__main__":
    main()
