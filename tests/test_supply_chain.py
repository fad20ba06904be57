"""What others made: bounded dependencies, locks with hashes, nothing unpickled, no code of a checkpoint's run."""

from __future__ import annotations

import ast
import json
import pickle
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from prerope.server.errors import ConfigurationError
from prerope.server.models.checkpoint import EMBEDDED_VERSION, EMBEDDED_WHEEL, Checkpoint
from prerope.server.models.model import load_model
from prerope.server.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "docker" / "locks"
OURS = [path for folder in ("rope", "cache", "server", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
CUDA = re.compile(r"triton|nvidia-.+|cuda-.+")
"""Packages that torch needs for its CUDA build only."""


# --- dependencies ---


def declared() -> dict[str, list[str]]:
    """Requirements by the table of pyproject.toml that they are in."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    tables = {"build-system": pyproject["build-system"]["requires"], "dependencies": project["dependencies"]}
    return {**tables, **project["optional-dependencies"]}


def unbounded(requirement: str) -> bool:
    """Whether a requirement admits any older, or any newer, release."""
    operators = {specifier.operator for specifier in Requirement(requirement).specifier}
    return "==" not in operators and not (operators & {">=", ">"} and operators & {"<", "<="})


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    in_files = [line for file in LOCKS.glob("*.in") for line in file.read_text().splitlines()]
    requirements = [requirement for table in declared().values() for requirement in table] + in_files
    assert len(requirements) > 20
    assert [requirement for requirement in requirements if unbounded(requirement)] == []
    assert [unbounded(f"numpy{bounds}") for bounds in ("", ">=2", "<3", ">=2,<3", "==2.4")] == [True] * 3 + [False] * 2


def locked(name: str) -> dict[str, tuple[Version, int]]:
    """Package → version and number of hashes, of one lock. A line that is none of the format's fails."""
    found: dict[str, tuple[Version, int]] = {}
    package = ""
    for line in (LOCKS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if match := re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line):
            version, hashes = found[package]
            found[package] = version, hashes + 1
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ; [^\\]+)?( \\)?", line)
        assert match, f"{name}: {line}"
        package = match[1]
        assert package not in found, f"{name} has {package} twice"
        found[package] = Version(match[2]), 0
    return found


@pytest.mark.parametrize("name", ["gpu.txt", "cpu.txt", "build.txt", "model.txt"])
def test_every_locked_package_has_a_hash_and_no_address(name: str) -> None:
    packages = locked(name)
    assert packages
    assert [package for package, (_, hashes) in packages.items() if not hashes] == []
    assert "://" not in (LOCKS / name).read_text(encoding="utf-8")


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    """`make lock` was run after the last change of a dependency."""
    packages = locked("gpu.txt")
    for requirement in map(Requirement, declared()["dependencies"]):
        assert requirement.name in packages, f"run `make lock`: {requirement.name} is not locked"
        version, _ = packages[requirement.name]
        assert requirement.specifier.contains(version), f"run `make lock`: {requirement} is locked at {version}"
    build = locked("build.txt")
    for requirement in map(Requirement, declared()["build-system"]):
        assert requirement.specifier.contains(build[requirement.name][0])


def test_the_cpu_lock_is_the_gpu_lock_less_cuda() -> None:
    gpu, cpu = locked("gpu.txt"), locked("cpu.txt")
    cuda = {name for name in gpu if CUDA.fullmatch(name)}
    assert len(cuda) > 5
    assert cpu == {name: entry for name, entry in gpu.items() if name not in cuda | {"torch"}}
    assert (LOCKS / "cpu-torch.txt").read_text() == f"torch=={gpu['torch'][0]}\n"


def test_the_embedded_model_is_locked_alone() -> None:
    assert {name: str(version) for name, (version, _) in locked("model.txt").items()} == {
        EMBEDDED_WHEEL: EMBEDDED_VERSION
    }


# --- our code loads no pickle and trusts no checkpoint's code ---

PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLE_READERS = {"read_pickle", "find_class", "Unpickler"}


def constant(call: ast.Call, keyword: str) -> object:
    """The literal given for a keyword; ... if it is missing or no literal."""
    values = [given.value for given in call.keywords if given.arg == keyword]
    return values[0].value if values and isinstance(values[0], ast.Constant) else ...


def dangers(source: str) -> Iterator[str]:
    """Whatever in Python source could run code that a file brings, in words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            first = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in first if name.split(".")[0] in PICKLE_MODULES)
        elif isinstance(node, ast.Call):
            yield from dangers_of_call(node)


def dangers_of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rsplit(".", 1)[-1]
    if last in PICKLE_READERS:
        yield f"calls {name}"
    if name in ("torch.load", "load") and constant(call, "weights_only") is not True:
        yield f"calls {name} without weights_only=True"
    if constant(call, "allow_pickle") not in (False, ...):
        yield f"calls {name} with allow_pickle"
    if any(given.arg == "trust_remote_code" for given in call.keywords):
        if constant(call, "trust_remote_code") is not False:
            yield f"calls {name} with trust_remote_code"
    elif last in ("from_pretrained", "from_config") and re.search(r"\bAuto(?!ModelForCausalLM\.from_config)", name):
        yield f"calls {name} without trust_remote_code=False"
    if re.search(r"AutoModel\w*\.from_pretrained$", name):
        gguf = any(given.arg == "gguf_file" for given in call.keywords)
        if not gguf and constant(call, "use_safetensors") is not True:
            yield f"calls {name} without use_safetensors=True"


BETWEEN_OWN_PROCESSES = ("server/workers/messages.py", "server/workers/children.py")
"""What a worker is told and answers, over a socket that only the two have."""


def test_our_code_loads_no_pickle_and_trusts_no_remote_code() -> None:
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text(encoding="utf-8"))) for path in OURS}
    for path in BETWEEN_OWN_PROCESSES:
        assert set(found.pop(path)) <= {"imports pickle", "calls pickle.loads"}
    assert {path: seen for path, seen in found.items() if seen} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import marshal as m",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=chosen)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "pipeline(model, trust_remote_code=trusted)",
        "transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert list(dangers(source))


def test_what_is_safe_is_let_be() -> None:
    safe = """
torch.load(path, weights_only=True)
json.load(file)
np.load(path)
AutoTokenizer.from_pretrained(path, trust_remote_code=False)
AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, use_safetensors=True)
AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, gguf_file=name)
GenerationConfig.from_pretrained(path)
"""
    assert list(dangers(safe)) == []


# --- a checkpoint that brings code ---


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def pickled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with its weights in a pickle that makes `tmp_path / "ran"` when it is read."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"model.norm.weight": Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    return folder


def load(folder: Path) -> None:
    load_model(Checkpoint(str(folder), folder.name), "auto", "cpu", lambda _: None)


def test_the_trap_works(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError):
        torch.load(pickled / "pytorch_model.bin", weights_only=True)
    assert not (tmp_path / "ran").exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_pickled_weights_are_refused_unread_with_the_remedy(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'pickled' cannot be loaded: .*pytorch_model\.bin.*convert them"):
        load(pickled)
    assert not (tmp_path / "ran").exists()


def test_safetensors_beside_a_pickle_are_what_is_read(pickled: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (pickled / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    load(pickled)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_checkpoint_is_not_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "coded", tmp_path / "ran"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto_map = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model", "AutoTokenizer": "custom.Config"}
    (folder / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": auto_map}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["custom.Config", None]}}))
    with pytest.raises(ConfigurationError, match="'coded' cannot be loaded"):
        load(folder)
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
        Tokenizer.load(Checkpoint(str(folder), folder.name))
    assert not marker.exists()


@pytest.mark.slow
def test_the_weights_of_a_hub_model_are_of_the_commit_of_its_config(
    pickled: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a branch that moves meanwhile changes nothing, and transformers asks no service to convert pickles."""
    import transformers
    from huggingface_hub import constants

    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    pickled.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repository.parent))
    revisions: list[object] = []
    original = transformers.AutoModelForCausalLM.from_pretrained

    def recorded(*args: Any, **kwargs: Any) -> Any:
        revisions.append(kwargs.get("revision"))
        return original(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", recorded)
    with pytest.raises(ConfigurationError, match="'owner/model' cannot be loaded"):
        load_model(Checkpoint("owner/model", "owner/model"), "auto", "cpu", lambda _: None)
    (snapshot / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    load_model(Checkpoint("owner/model", "owner/model"), "auto", "cpu", lambda _: None)
    assert revisions == [commit, commit]
