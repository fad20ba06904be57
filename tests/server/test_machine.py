"""How much memory and how many cores there are, in containers too: of trees as the kernel shows them there."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from prerope.server.machine import allowance as machine
from prerope.server.machine.allowance import cores, free_memory
from prerope.server.machine.threads import limit_threads

MIB = 2**20
V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


def v1(controller: str, mounted: str = "/") -> str:
    return f"40 31 0:34 {mounted} /sys/fs/cgroup/{controller} rw - cgroup cgroup rw,{controller}"


def tree(root: Path, paths: str, mounts: list[str], files: dict[str, object]) -> Path:
    """A root folder with /proc/self/cgroup, /proc/self/mountinfo and files of /sys/fs/cgroup."""
    texts = {"proc/self/cgroup": paths, "proc/self/mountinfo": "\n".join(["1 0 8:1 / / rw - ext4 /dev/x rw", *mounts])}
    for name, text in (texts | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n", encoding="utf-8")
    return root


NO_LIMIT_V1 = 9223372036854771712


def container_v2(root: Path) -> Path:
    """A namespace of its own: the path is /, and the group's files are at the mount."""
    files = {"memory.max": 1400 * MIB, "memory.current": 700 * MIB, "memory.stat": f"inactive_file {100 * MIB}"}
    return tree(root, "0::/", [V2], files | {"cpu.max": "150000 100000"})


def pod_v2(root: Path) -> Path:
    """The limit is a parent's; the group itself has none."""
    files = {"pod/memory.max": 1000 * MIB, "pod/memory.current": 600 * MIB, "pod/cpu.max": "50000 100000"}
    inner = {"pod/one/memory.max": "max", "pod/one/memory.current": 10 * MIB, "pod/one/cpu.max": "max 100000"}
    return tree(root, "0::/pod/one", [V2], files | inner)


def container_v1(root: Path) -> Path:
    """The host's path, which is not there: the mount is that group."""
    files = {"memory/memory.limit_in_bytes": 1400 * MIB, "memory/memory.usage_in_bytes": 900 * MIB}
    files |= {"memory/memory.stat": f"cache 5\ntotal_inactive_file {200 * MIB}"}
    files |= {"cpu/cpu.cfs_quota_us": 40000, "cpu/cpu.cfs_period_us": 100000}
    paths = "4:memory:/docker/abc\n1:cpu:/docker/abc"
    return tree(root, paths, [v1("memory", "/docker/abc"), v1("cpu", "/docker/abc")], files)


def host_v1(root: Path) -> Path:
    """Several levels, of which an outer one is the narrowest."""
    files = {
        "memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "memory/memory.usage_in_bytes": 5000 * MIB,
        "memory/a/memory.limit_in_bytes": 800 * MIB,
        "memory/a/memory.usage_in_bytes": 700 * MIB,
        "memory/a/b/memory.limit_in_bytes": 900 * MIB,
        "memory/a/b/memory.usage_in_bytes": 100 * MIB,
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100000,
    }
    return tree(root, "4:memory:/a/b\n1:cpu:/\n0::/", [v1("memory"), v1("cpu")], files)


def unlimited(root: Path) -> Path:
    return tree(root, "0::/", [V2], {"memory.max": "max", "memory.current": 1, "cpu.max": "max 100000"})


@pytest.mark.parametrize(
    ("make", "num_bytes", "memory_of", "num_cores", "cores_of"),
    [
        (container_v2, 800 * MIB, "memory.max of /sys/fs/cgroup, 1.37 GiB", 1.5, "cpu.max of /sys/fs/cgroup"),
        (pod_v2, 400 * MIB, "memory.max of /sys/fs/cgroup/pod", 0.5, "cpu.max of /sys/fs/cgroup/pod"),
        (container_v1, 700 * MIB, "memory.limit_in_bytes of /sys/fs/cgroup/memory", 0.4, "cpu.cfs_quota_us"),
        (host_v1, 100 * MIB, "memory.limit_in_bytes of /sys/fs/cgroup/memory/a, 0.78", 4, "affinity"),
        (unlimited, 16384 * MIB, "the machine's free memory", 4, "affinity"),
        (lambda root: root, 16384 * MIB, "the machine's free memory", 4, "affinity"),
    ],
)
def test_whoever_allows_least(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: object,
    num_bytes: int,
    memory_of: str,
    num_cores: float,
    cores_of: str,
) -> None:
    class Memory:
        available = 16384 * MIB

    monkeypatch.setattr(machine.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    root = make(tmp_path)  # type: ignore[operator]
    memory, processors = free_memory(root), cores(root)
    assert memory.amount == num_bytes
    assert memory_of in memory.source
    assert processors.amount == num_cores
    assert cores_of in processors.source


def test_threads_go_by_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    assert limit_threads(2) == 2
    assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert limit_threads(1) == 3


def test_the_address_space_is_a_bound() -> None:
    """In a process with a real limit: what is left of it, not of the machine."""
    code = "from prerope.server.machine.allowance import free_memory as f; b = f(); print(int(b.amount), b.source)"
    limit = 2**30
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    amount, source = done.stdout.strip().split(" ", 1)
    assert source == "`ulimit -v`"
    assert 0.5 * limit < int(amount) < limit
