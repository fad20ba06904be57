"""What the server keeps in CACHE_DIR is as it was written, or made again with a line; two servers may share it."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prerope.cache.kernels import build
from prerope.cache.sealed import SUMS, damage
from prerope.server.models import checkpoint
from prerope.server.models.gguf import convert

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4000, "tokenizer.json": b'{"a": 1}'}


class Conversions:
    """Takes the place of the conversion: writes the files, slowly."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, _: Path, folder: Path, _report: object) -> None:
        with self._lock:
            self.count += 1
        folder.mkdir(parents=True)
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
            time.sleep(0.01)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Conversions:
    counted = Conversions()
    monkeypatch.setattr(convert, "convert", counted)
    return counted


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model.safetensors", halve),
    ("model.safetensors", flip),
    ("model.safetensors", lambda file: file.write_bytes(b"")),
    ("model.safetensors", Path.unlink),
    ("config.json", halve),
    (SUMS, Path.unlink),
    (SUMS, lambda file: file.write_bytes(b"")),
    (SUMS, lambda file: file.write_bytes(b"\xff\xfe")),
]


@pytest.mark.parametrize(("name", "harm"), DAMAGES)
def test_a_damaged_copy_of_a_model_is_made_again(
    tmp_path: Path, conversions: Conversions, name: str, harm: Callable[[Path], object]
) -> None:
    said: list[str] = []
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    folder = checkpoint._converted(file, "model", cache, said.append)
    assert checkpoint._converted(file, "model", cache, said.append) == folder
    assert (conversions.count, len(said)) == (1, 1), "what is whole is used"
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    harm(folder / name)
    assert checkpoint._converted(file, "model", cache, said.append) == folder
    assert conversions.count == 2
    assert "is damaged" in said[1]
    assert name in said[1]
    assert damage(folder) is None
    assert {path.name for path in cache.iterdir()} == {folder.name, folder.name + ".lock"}


def test_servers_that_find_it_damaged_together_make_it_once(tmp_path: Path, conversions: Conversions) -> None:
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    folder = checkpoint._converted(file, "model", cache, print)
    flip(folder / "model.safetensors")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: checkpoint._converted(file, "model", cache, print), range(4)))
    assert found == [folder] * 4
    assert conversions.count == 2


@pytest.mark.parametrize("harm", [halve, flip, lambda file: file.write_bytes(b"")])
def test_damaged_kernels_are_built_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    """Never loaded: half a library is a SIGBUS. The compiler is a stand-in, which writes what it is asked for."""
    for name, kernel in [*vars(build.kernels).items()]:
        monkeypatch.setattr(build.kernels, name, kernel)  # put back at the end
    monkeypatch.setattr(build.ctypes, "CDLL", Library)
    compiled: list[str] = []

    def compile_(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"code" * 1000)
            compiled.append(command[-1])
        return subprocess.CompletedProcess(command, 0, b"a compiler", b"")

    monkeypatch.setattr(build.subprocess, "run", compile_)

    def start() -> tuple[str, int]:
        monkeypatch.setattr(build, "_library", None)
        compiled.clear()
        return build.prepare(tmp_path), len(compiled)

    said, built = start()
    assert said == "the C kernels are loaded"
    assert built > 1
    assert start() == ("the C kernels are loaded", 0)
    (file,) = tmp_path.iterdir()
    harm(file)
    said, rebuilt = start()
    assert rebuilt == built
    assert "was damaged" in said
    assert list(tmp_path.iterdir()) == [file]
    assert start() == ("the C kernels are loaded", 0)


class Library:
    """Of ctypes: any function, and no file is opened."""

    def __init__(self, *_: object, **__: object) -> None:
        self._functions: dict[str, Library] = {}

    def __getattr__(self, name: str) -> Library:
        return self._functions.setdefault(name, Library())
