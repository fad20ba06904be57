"""What this process may use of the machine, by whoever allows least: bytes of memory and cores, and who that is.

    memory   what is free on the machine · each cgroup's limit less what is charged to it, up to the root · `ulimit -v`
    cores    affinity · each cgroup's CPU quota, up to the root

Control groups of both versions are read where they are mounted. In a container the path that the kernel tells may be
the host's: of its folders, those are read that are there.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
AFFINITY = "affinity"


@dataclass(frozen=True, slots=True)
class Bound:
    """How much, and whose word that is."""

    amount: float
    source: str


def free_memory(root: Path = ROOT) -> Bound:
    """Bytes that this process can still take before somebody stops it."""
    bounds = [Bound(psutil.virtual_memory().available, "the machine's free memory"), *_in_cgroups(root)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        bounds.append(Bound(limit - psutil.Process().memory_info().vms, "`ulimit -v`"))
    least = min(bounds, key=lambda bound: bound.amount)
    return Bound(max(0, int(least.amount)), least.source)


def cores(root: Path = ROOT) -> Bound:
    """Cores that this process can keep busy without being stopped now and then; a quota may be a fraction.

    Threads beyond a quota do not share it, they wait it out: all stop until the next period, wherever they are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min([Bound(usable, AFFINITY), *_quotas(root)], key=lambda bound: bound.amount)


def _in_cgroups(root: Path) -> Iterator[Bound]:
    for folder in _cgroups(root, "memory"):
        for limit_file, used_file, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                used -= _statistics(folder / "memory.stat").get(reclaimable, 0)
                yield Bound(limit - max(0, used), f"{limit_file} of {_shown(folder, root)}, {limit / 2**30:.2f} GiB")


def _quotas(root: Path) -> Iterator[Bound]:
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        source = "cpu.max"
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            source = "cpu.cfs_quota_us"
        if quota.isdigit() and period.isdigit() and int(period):  # not "max", nor -1
            yield Bound(int(quota) / int(period), f"{source} of {_shown(folder, root)}")


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that hold this process, innermost first, of both versions."""
    paths: dict[str, str] = {}  # "" is version 2, of all controllers
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), after.split(" ", 2)
        of_both = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        own = paths.get("" if kind == "cgroup2" else controller) if of_both else None
        if own is None:
            continue
        mount = root / fields[4].lstrip("/")
        inner = Path(own.removeprefix(fields[3].rstrip("/")).lstrip("/"))
        yield from (mount / step for step in (inner, *inner.parents) if ".." not in step.parts)


def _shown(folder: Path, root: Path) -> str:
    return f"/{folder.relative_to(root)}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None  # not "max"


def _statistics(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
