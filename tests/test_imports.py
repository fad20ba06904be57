"""Imports run one way and in no circle: server.api → server.engine → server.models → cache → rope → torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PREFIX = "prerope."
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("rope", "cache", "server")
    for path in sorted((ROOT / package).rglob("*.py"))
}

HTTP = ("server.app", "server.service", "server.http", "server.flags", "server.__main__")
FORBIDDEN = {
    "rope": ("cache", "server", "transformers"),
    "cache": ("server", "transformers"),
    "server.models": ("server.engine", "server.api", *HTTP),
    "server.engine": ("server.api", *HTTP),
    "server.structured": ("server.api", "cache", *HTTP),
    "server.api": ("cache.attention", "cache.storage", *(name for name in HTTP if name != "server.service")),
    "server.errors": ("rope", "cache", "server", "torch"),
    "rope.spec": ("rope", "torch"),
    "server.config": ("rope.reading", "cache", "server", "torch"),
}
"""Who must not import what, wherever in a module the import stands."""

EDGE = (
    "fastapi",
    "starlette",
    "uvicorn",
    "sse_starlette",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "structlog",
)
TEXT = ("tokenizers", "server.tokenizer", "server.metrics", "server.settings", "server.log")
BELOW_THE_EDGE = ("rope", "cache", "server.models", "server.engine")

TRITON = ("cache.kernels.triton", "server.models.cuda.elementwise")

ALLOWED = {
    ("rope.show", "transformers"),  # a command; with --model it reads a config
    ("server.models.gguf.splitting", "tokenizers"),  # a converted copy has a tokenizer too
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when this one is) of every import statement, those for types alone left out.

    Ours are named without the prefix `prerope.`.
    """
    yield from _imports_in(parsed(path), top=True)


def _imports_in(node: ast.AST, *, top: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name.removeprefix(PREFIX), top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            module = child.module.removeprefix(PREFIX)
            names = [f"{module}.{alias.name}" for alias in child.names]
            submodules = [name for name in names if name in PATHS]
            yield from ((name, top) for name in (submodules if len(submodules) == len(names) else [module, *names]))
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports_in(child, top=top and not is_function)


@cache
def imports_of_all() -> dict[str, list[tuple[str, bool]]]:
    return {module: list(imports(path)) for module, path in PATHS.items()}


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def wrong(importers: tuple[str, ...], imported: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in imports_of_all().items()
        for name, _ in names
        if is_within(module, *importers)
        and is_within(name, *imported)
        and not any(module == allowed and is_within(name, package) for allowed, package in ALLOWED)
    ]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    assert wrong((package,), FORBIDDEN[package]) == []


def test_what_is_below_the_edge_knows_no_http_metrics_or_text() -> None:
    assert wrong(BELOW_THE_EDGE, EDGE + TEXT) == []


def test_settings_import_leaves_alone() -> None:
    ours = {name for name, _ in imports_of_all()["server.settings"] if name in PATHS}
    assert ours <= {"rope.spec", "server.errors", "server.machine.places", "server.setting_types"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_imports() -> None:
    everything = imports_of_all().items()
    graph = {module: {name for name, _ in names if name in PATHS} - {module} for module, names in everything}
    assert circle(graph) == []


def test_kernels_of_triton_are_imported_only_when_dispatched_to() -> None:
    for module, names in imports_of_all().items():
        if not is_within(module, *TRITON):
            for name, at_import in names:
                assert not is_within(name, "triton"), f"{module} imports {name}"
                dispatched = not (at_import and is_within(name, *TRITON))
                assert dispatched, f"{module} imports {name} before it is dispatched to"


def test_only_settings_read_the_environment() -> None:
    for module, path in PATHS.items():
        if module not in ("server.machine.threads", "server.machine.places"):
            names = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
            assert not names & {"environ", "getenv"}, f"{module} reads the environment"


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text("import torch\ndef f():\n    from prerope.server.api.stream import printing\n", encoding="utf-8")
    assert dict(imports(source)) == {"torch": True, "server.api.stream.printing": False}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
