"""What every session of tests begins with: the device, a clean environment, which files are read, and in which order.

Fixtures are in tests/servers.py, which imports torch: the process of a parallel run that only hands out tests goes
without, and its workers begin some seconds earlier.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import re
from pathlib import Path

import pytest

from tests.device import DEVICE  # before torch: it decides what torch and Triton see

gc.disable()  # what is imported and collected stays, and is not to be looked through for garbage again and again
logging.disable(logging.WARNING)  # nor is what libraries warn of as they are imported among the dots
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


def pytest_configure(config: pytest.Config) -> None:
    if not getattr(config.option, "numprocesses", None):  # workers have none
        config.pluginmanager.import_plugin("tests.servers")


def pytest_report_header() -> str:
    return f"device: {DEVICE}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file without a test of the tier that is asked for is not even imported: its cases may be dear to make."""
    asked, of_tests = config.option.markexpr, collection_path.match("test_*.py")
    if asked == "ci and not slow" and of_tests and not OF_CI.search(collection_path.read_text(encoding="utf-8")):
        return True
    return True if collection_path.stem.endswith("_slow") and "not slow" in asked else None


OF_CI = re.compile(r"mark\.ci\b|\bquick=")
"""What marks a test as one of `make test-ci`: see tests/tiers.py."""


LONGEST = (
    *("server/test_attacks", "kernels/test_attention", "models/test_model_types", "api/test_tools"),
    *("fuzz/test_openapi", "engine/test_invariance", "graphs/test_cuda_layers", "structured/test_structured"),
    *("server/test_faults", "graphs/test_cuda_graphs", "server/test_cli", "server/test_isolation", "ranks/test_ranks"),
    *("fleet/test_tensor_parallel", "server/test_connections", "kernels/test_compilation", "kernels/test_rows"),
    *("models/test_multimodal", "models/test_families", "cache/test_cpu_attention", "clients/test_recipes"),
    *("api/test_tolerance", "api/test_dialects", "checkpoints/test_smollm2", "models/test_config_options"),
)


def pytest_collection(session: pytest.Session) -> None:
    """Where several processes collect all tests, each begins to read them elsewhere: what is not compiled yet, one
    compiles for all."""
    here = Path(__file__).parent
    if [Path(name).resolve() for name in session.config.args] != [here]:
        return
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    files = sorted(here.rglob("test_*.py"))
    for file in files[len(files) * number // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) :] if number else ():
        if not pytest_ignore_collect(file, session.config):
            with contextlib.suppress(Exception, pytest.skip.Exception):  # what is wrong, collection tells
                importlib.import_module(".".join(file.relative_to(here.parent).with_suffix("").parts))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    logging.disable(logging.NOTSET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that processes that share the files end together."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(f"{item.path.parent.name}/{item.path.stem}", len(places)))
