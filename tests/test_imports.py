"""Imports run one way: server.api → server.engine → cache → rope → torch. The engine knows no library of the edge."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rope", "cache", "server")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

EDGE = {
    "fastapi",
    "starlette",
    "uvicorn",
    "sse_starlette",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "tokenizers",
}
ALLOWED_BY_SETTINGS = {"rope.spec", "server.engine.config"}
"""Leaves without torch: settings name their values, and no more."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when this one is) of every import statement, those for types alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from _imports_in(tree, top=True)


def _imports_in(node: ast.AST, *, top: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            yield child.module, top
            yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports_in(child, top=top and not is_function)


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    forbidden: dict[str, tuple[str, ...]] = {
        "rope": ("cache", "server"),
        "cache": ("server",),
        "server.engine": ("server.api", "server.app", "server.service", "server.http_server", "server.flags"),
        "server.api": ("server.app", "server.http_server", "server.flags", "server.__main__", "cache"),
    }
    for imported, _ in imports(MODULES[module]):
        for package, others in forbidden.items():
            if is_within(module, package):
                assert not is_within(imported, *others), f"{module} imports {imported}"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if is_within(module, "rope", "cache", "server.engine")]
)
def test_what_is_below_the_edge_knows_no_http_metrics_or_text(module: str) -> None:
    for imported, _ in imports(MODULES[module]):
        assert imported.split(".")[0] not in EDGE, f"{module} imports {imported}"
        assert "Tokenizer" not in imported, f"{module} imports {imported}"
        assert not is_within(imported, "server.tokenizer", "server.metrics", "server.settings", "server.log")


@pytest.mark.parametrize("module", [module for module in MODULES if is_within(module, "rope", "cache")])
def test_positions_and_cache_know_no_transformers(module: str) -> None:
    for imported, at_import in imports(MODULES[module]):
        # rope.show is a command; with --model it reads a config.
        allowed = module == "rope.show" and not at_import
        assert allowed or not is_within(imported, "transformers"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", ["server.settings", "server.errors", "rope.spec"])
def test_leaves_import_nothing_of_ours(module: str) -> None:
    for imported, _ in imports(MODULES[module]):
        if imported.split(".")[0] in PACKAGES and module == "server.settings":
            assert is_within(imported, *ALLOWED_BY_SETTINGS), f"{module} imports {imported}"
        else:
            assert imported.split(".")[0] not in PACKAGES, f"{module} imports {imported}"
            assert not is_within(imported, "torch"), f"{module} imports {imported}"


def test_triton_is_imported_only_by_kernels_and_only_when_dispatched_to() -> None:
    for module, path in MODULES.items():
        for imported, at_import in imports(path):
            if is_within(imported, "triton"):
                assert is_within(module, "cache.kernels"), f"{module} imports {imported}"
            if is_within(imported, "cache.kernels") and not is_within(module, "cache.kernels"):
                assert not at_import, f"{module} imports {imported} before it is dispatched to"


def test_only_settings_read_the_environment() -> None:
    for module, path in MODULES.items():
        if module == "server.settings":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"environ", "getenv"}, f"{module} reads the environment"


def test_a_wrong_way_import_is_found(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text("import torch\ndef f():\n    from server.api import sse\n", encoding="utf-8")
    found = dict(imports(source))
    assert found == {"torch": True, "server.api": False, "server.api.sse": False}
