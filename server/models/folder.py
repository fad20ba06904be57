"""What a model's folder holds, looked at before transformers reads it: whole, or refused in one true sentence.

Reads names, JSON and the headers of safetensors files. Knows neither torch nor transformers, so it says at once what
they would find minutes later, or read as something else: an interrupted download, a pointer, an adapter, another
program's format.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prerope.server.errors import ConfigurationError
from prerope.server.models.config_values import REMEDY, Stored, shown, wrong_in
from prerope.server.models.quantized.schemes import scheme_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
MAX_HEADER = 100_000_000  # the format's own limit, in bytes
UNFINISHED = (
    "*.incomplete",
    "*.part",
    "*.crdownload",
    "*.aria2",
    "*.download",
    ".cache/huggingface/download/**/*.incomplete",
)
"""What programs leave where a download was interrupted."""

PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header: dtype as the format spells it, shape in numbers."""

    dtype: str
    shape: tuple[int, ...]


def check_folder(folder: Path) -> None:
    """Raise ConfigurationError, with the remedy, unless the folder holds a whole model in transformers' format."""
    _check_unfinished(folder)
    if not (folder / CONFIG).is_file():
        raise _refused(folder, _what_instead_of_a_model(folder))
    config = read_config(folder)
    if (folder / ADAPTER).is_file():
        raise _refused(
            folder, f"an adapter ({ADAPTER}) lies beside the base model; {_merging(folder)}, or move it away"
        )
    said = config.get("quantization_config")
    if said is not None and not isinstance(said, dict):
        raise _refused(folder, f"{CONFIG} says quantization_config is {shown(said)}, and it is an object: {REMEDY}")
    quantized = scheme_of(config, folder) is not None
    files = weight_files(folder)
    headers = [read_header(file) for file in files]
    for file, tensors in zip(files, headers, strict=True):
        _check_dtypes(folder, file.name, tensors, quantized)
    stored = Stored(sum(map(len, headers)), sum(file.stat().st_size for file in files))
    if wrong := wrong_in(config, stored):
        raise _refused(folder, f"{CONFIG} says {wrong}")
    _check_other_files(folder)


def holds_weights(folder: Path) -> bool:
    """Whether safetensors under transformers' names are there, whole or not."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ConfigurationError where it is none."""
    config = _read_json(folder, CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise _refused(folder, f"{CONFIG} names no model_type, so it is not a transformers model's")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read, all of them there. Raises ConfigurationError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise _refused(folder, _what_instead_of_weights(folder))
    parts = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise _refused(folder, f"{INDEX} has no weight_map: download it again")
    names = sorted(set(parts.values()))
    elsewhere = [name for name in names if Path(name).name != name]
    if elsewhere:
        raise _refused(folder, f"{INDEX} names {some(elsewhere)}, which is no file of this folder: download it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise _refused(
            folder,
            f"{len(names) - len(missing)} of {len(names)} parts of the weights are there and {some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: the download is incomplete; run it again",
        )
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose length agrees with its header. Raises ConfigurationError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(POINTER))
        if start == POINTER:
            raise _refused(file.parent, _pointer(file.name))
        length = int.from_bytes(start[:8], "little")
        stream.seek(8)
        text = stream.read(length) if length <= MAX_HEADER else b""
    if size < 8 or (len(text) < length <= MAX_HEADER):
        raise _refused(file.parent, _cut_short(file.name, f"{size} bytes, which end inside its header"))
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = {name: StoredTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _refused(file.parent, f"{file.name} is no safetensors file, or is damaged: download it again") from error
    if size < end:
        raise _refused(file.parent, _cut_short(file.name, f"{size} of {end} bytes"))
    if size > end:
        raise _refused(file.parent, f"{file.name} has {size} bytes, and its header says {end}: download it again")
    return tensors


def some(names: list[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


# --- reasons ----------------------------------------------------------------------------------------------------------


def _check_unfinished(folder: Path) -> None:
    left = sorted(path.name for pattern in UNFINISHED for path in folder.glob(pattern) if _still_missing(folder, path))
    if left:
        raise _refused(folder, f"{some(left)} was left by an interrupted download; run it again, or remove that file")


def _still_missing(folder: Path, path: Path) -> bool:
    """Whether what a leftover was to become is not there: a later download may have succeeded beside it."""
    return not holds_weights(folder) or path.parent == folder


def _check_dtypes(folder: Path, file: str, tensors: dict[str, StoredTensor], quantized: bool) -> None:
    """Weights in integers or 8-bit floats mean nothing without the scheme that their config should name, and those of
    norms, and biases, are of no scheme."""
    strange = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS and _is_weight(name, tensor)]
    plain = [name for name in strange if len(tensors[name].shape) < 2 and not tensors[name].dtype.startswith("F")]
    if plain:
        raise _refused(
            folder,
            f"{file} holds {some(plain)} as {tensors[plain[0]].dtype}, and such weights are floating-point numbers in "
            "every scheme: the file is damaged or was converted wrongly; take the original checkpoint",
        )
    if strange and not quantized:
        raise _refused(
            folder,
            f"{file} holds {some(strange)} as {tensors[strange[0]].dtype}, but {CONFIG} names no quantization_config: "
            "the weights are quantised by a scheme that cannot be known; take the original checkpoint, or one whose "
            f"{CONFIG} says how",
        )


def _is_weight(name: str, tensor: StoredTensor) -> bool:
    """Not a counter or a mask, which some checkpoints store."""
    is_bias = name.endswith(".bias") and len(tensor.shape) < 2
    return name.endswith("weight") or is_bias or tensor.dtype.startswith("F")


def _check_other_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            _read_json(folder, name)
    if any(True for pattern in TOKENIZERS for _ in folder.glob(pattern)):
        return
    if (folder / "tekken.json").is_file():
        raise _refused(
            folder,
            "its only tokenizer is Mistral's tekken.json, and a tokenizer.json is needed: take it from a version of "
            "this model in transformers' format",
        )
    raise _refused(folder, "no tokenizer is there: copy tokenizer.json and tokenizer_config.json of the model into it")


def _what_instead_of_a_model(folder: Path) -> str:
    """Why a folder without config.json is no model, by what it has instead."""
    if (folder / ADAPTER).is_file():
        return f"it is an adapter ({ADAPTER}), not a model; {_merging(folder)}, and give the merged folder"
    if list(folder.glob("consolidated*.safetensors")) or (folder / "params.json").is_file():
        return (
            "it is in the model maker's own format (consolidated.safetensors, params.json); take the version in "
            f"transformers' format, with {CONFIG} and {WEIGHTS}"
        )
    if (folder / "blobs").is_dir() and (folder / "manifests").is_dir():
        return f"it is Ollama's store; give one model's file: {_ollama_models(folder)}"
    snapshots = sorted((folder / "snapshots").glob(f"*/{CONFIG}"))
    if snapshots:
        return f"it is a hub cache; give the folder inside it, snapshots/{snapshots[-1].parent.name}"
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"it has no {CONFIG}, but {some(below)} inside it has; give that folder"
    if list(folder.glob("*.safetensors")) or [file for pattern in PICKLES for file in folder.glob(pattern)]:
        return f"there are weights but no {CONFIG}: the download is incomplete, or it is another program's format"
    return f"it holds neither {CONFIG} nor a .gguf file"


def _what_instead_of_weights(folder: Path) -> str:
    """Why a folder with config.json has no weights to read."""
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    parts = [name for name in found if re.search(r"-\d+-of-\d+\.safetensors$", name)]
    if parts:
        return f"{some(parts)} {'is' if len(parts) == 1 else 'are'} there without {INDEX}: download that file, too"
    if any(name.startswith("consolidated") for name in found):
        return (
            f"its weights are in the model maker's own format ({found[0]}); take the version in transformers' format, "
            f"with {WEIGHTS}"
        )
    if found:
        return (
            f"its weights are {some(found)}, and transformers reads {WEIGHTS}: rename the file if it is the whole model"
        )
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        return (
            f"no safetensors are found there, only {some(pickles)}. Weights in pickle files can run code when they are "
            "read, so they are refused; where you trust them, convert them once with transformers' save_pretrained"
        )
    return f"no safetensors are found there, only {CONFIG}: download {WEIGHTS} or its parts"


def _ollama_models(store: Path) -> str:
    """Names of models in Ollama's store, each with the blob that is its GGUF file."""
    found = []
    for manifest in sorted(path for path in (store / "manifests").glob("*/*/*/*") if path.is_file()):
        for layer in _layers(manifest):
            if str(layer.get("mediaType", "")).endswith("image.model"):
                blob = str(layer.get("digest", "")).replace(":", "-")
                found.append(f"blobs/{blob} is {manifest.parent.name}:{manifest.name}")
    return some(found) if found else "there is none"


def _layers(manifest: Path) -> Iterator[dict[str, Any]]:
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8")).get("layers", [])
    except (ValueError, OSError, AttributeError):
        return
    yield from (layer for layer in layers if isinstance(layer, dict))


def _merging(folder: Path) -> str:
    base = ""
    with contextlib.suppress(ConfigurationError):
        base = str(_read_json(folder, ADAPTER).get("base_model_name_or_path") or "")
    return f"merge it into its base{f' {base}' if base else ''} once (peft's merge_and_unload, then save_pretrained)"


def _pointer(name: str) -> str:
    return f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull` in that folder"


def _cut_short(name: str, said: str) -> str:
    return f"{name} is cut short ({said}): the download is incomplete; run it again"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _refused(folder, f"{name} cannot be read: {(error.strerror or str(error)).lower()}") from error
    if data.startswith(POINTER):
        raise _refused(folder, _pointer(name))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refused(folder, f"{name} is no JSON ({len(data)} bytes), or is cut short: download it again") from error
    if not isinstance(value, dict):
        raise _refused(folder, f"{name} is no JSON object: download it again")
    return value


def _refused(folder: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"MODEL_ID={folder} cannot be served: {reason}.")
