"""What a model's folder holds, looked at before transformers reads it: whole, or refused in one true sentence.

Reads names, JSON and the headers of safetensors files. Knows neither torch nor transformers, so it says at once what
they would find minutes later, or read as something else: an interrupted download, a pointer, an adapter, another
program's format.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prerope.server.errors import ConfigurationError
from prerope.server.models.config.text import TEXT_FILES, wrong_in_text_file
from prerope.server.models.config.values import REMEDY, Stored, shown, wrong_in
from prerope.server.models.json_files import read_json, read_text, refused, unreadable
from prerope.server.models.quantized.schemes import scheme_of
from prerope.server.models.stored import Damaged, StoredTensor, read_header, some

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OF_ADAPTERS = (ADAPTER, "adapter_model.safetensors", "adapter_model.bin")
UNFINISHED = (
    "*.incomplete",
    "*.part",
    "*.crdownload",
    "*.aria2",
    "*.download",
    ".cache/huggingface/download/**/*.incomplete",
)
"""What programs leave where a download was interrupted."""

READ = (".json", ".safetensors", ".model", ".jinja", ".txt", ".tiktoken")
"""Ends of names that are read here or by transformers."""

PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
OTHERS = ("*.onnx", "*.h5", "*.msgpack", "openvino_*.xml", "*.ggml", "*.tflite", "*.npz", "*.engine")
"""Weights of other programs."""

MORE = "additional_chat_templates/*.jinja"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def check_folder(folder: Path) -> None:
    """Raise ConfigurationError, with the remedy, unless the folder holds a whole model in transformers' format."""
    try:
        _check(folder)
    except OSError as error:  # of a folder that may not be listed, or goes away meanwhile
        raise refused(folder, unreadable("it", error)) from error


def _check(folder: Path) -> None:
    _check_kinds(folder)
    _check_unfinished(folder)
    _check_links(folder)
    if not (folder / CONFIG).is_file():
        raise refused(folder, _what_instead_of_a_model(folder))
    config = read_config(folder)
    if adapter := next((name for name in OF_ADAPTERS if (folder / name).is_file()), None):
        raise refused(folder, f"an adapter ({adapter}) lies beside the base model; {_merging(folder)}, or move it away")
    said = config.get("quantization_config")
    if said is not None and not (isinstance(said, dict) and said):
        wanted = "it names a quant_method; leave it out where there is none" if said == {} else "it is an object"
        raise refused(folder, f"{CONFIG} says quantization_config is {shown(said)}, and {wanted}: {REMEDY}")
    method = (said or {}).get("quant_method")
    if not isinstance(method, str | None):
        raise refused(folder, f"{CONFIG} says quantization_config.quant_method is {shown(method)}, which is no name")
    quantized = scheme_of(config, folder) is not None
    files = weight_files(folder)
    headers = [_header_of(folder, file) for file in files]
    _check_names(folder, headers)
    for file, tensors in zip(files, headers, strict=True):
        _check_dtypes(folder, file.name, tensors, quantized)
    tables = [entry.shape for header in headers for name, entry in header.items() if EMBEDDING.search(name)]
    num_bytes = sum(file.stat().st_size for file in files)
    stored = Stored(sum(map(len, headers)), num_bytes, tables[0] if len(tables) == 1 else ())
    if wrong := wrong_in(config, stored):
        raise refused(folder, f"{CONFIG} says {wrong}")
    _check_other_files(folder)


def holds_weights(folder: Path) -> bool:
    """Whether safetensors under transformers' names are there, whole or not."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ConfigurationError where it is none."""
    config = read_json(folder, CONFIG)
    model_type = config.get("model_type")
    if model_type is None:
        raise refused(folder, f"{CONFIG} names no model_type, so it is not a transformers model's")
    if not isinstance(model_type, str) or not model_type:
        raise refused(folder, f"{CONFIG} says 'model_type' is {shown(model_type)}, and it is a name: {REMEDY}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read, all of them there. Raises ConfigurationError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise refused(folder, _what_instead_of_weights(folder))
    index = read_json(folder, INDEX)
    parts = index.get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise refused(folder, f"{INDEX} has no weight_map: download it again")
    if not isinstance(index.get("metadata"), dict):
        raise refused(folder, f"{INDEX} has no metadata, which transformers reads: download it again")
    names = sorted(set(parts.values()))
    elsewhere = [name[:80] for name in names if Path(name).name != name or not 0 < len(name) <= 255 or "\0" in name]
    if elsewhere:
        raise refused(
            folder, f"{INDEX} names {some(elsewhere) or 'nothing'}, which is no file of this folder: download it again"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise refused(
            folder,
            f"{len(names) - len(missing)} of {len(names)} parts of the weights are there and {some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: the download is incomplete; run it again",
        )
    return [folder / name for name in names]


# --- reasons ----------------------------------------------------------------------------------------------------------


def _check_unfinished(folder: Path) -> None:
    left = sorted(path.name for pattern in UNFINISHED for path in folder.glob(pattern) if _still_missing(folder, path))
    if left:
        raise refused(folder, f"{some(left)} was left by an interrupted download; run it again, or remove that file")


def _check_kinds(folder: Path) -> None:
    """Pipes, sockets and devices: who opens one may wait for ever. Folders under names of files."""
    found = [path for path in folder.iterdir() if path.exists() and not path.is_file()]
    odd = sorted(path.name for path in found if not path.is_dir())
    if odd:
        raise refused(folder, f"{some(odd)} is no regular file, but a pipe, socket or device: take it away")
    if folders := sorted(path.name for path in found if path.name.endswith((".json", ".safetensors", ".jinja"))):
        raise refused(folder, f"{some(folders)} is a folder, and it should be a file: take it away, or download it")


def _check_links(folder: Path) -> None:
    """Links without what they name, as they are left where a snapshot of a hub's cache is copied."""
    broken = sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists())
    if broken := [name for name in broken if name.endswith(READ)]:
        raise refused(
            folder,
            f"{some(broken)} {'is a link' if len(broken) == 1 else 'are links'} to what is not there: copy the folder "
            "with what its links name (cp -L), or download it again",
        )


def _still_missing(folder: Path, path: Path) -> bool:
    """Whether what a leftover was to become is not there: a later download may have succeeded beside it."""
    return not holds_weights(folder) or path.parent == folder


def _header_of(folder: Path, file: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(file)
    except Damaged as damage:
        raise refused(folder, str(damage)) from damage
    except OSError as error:
        raise refused(folder, unreadable(file.name, error)) from error


def _check_names(folder: Path, headers: list[dict[str, StoredTensor]]) -> None:
    """No weight twice, in two parts: which one is read would be chance."""
    names = Counter(name for header in headers for name in header)
    if twice := [name for name, count in names.items() if count > 1]:
        raise refused(folder, f"{some(twice)} is in two of the parts: parts of two models lie there; download it again")


def _check_dtypes(folder: Path, file: str, tensors: dict[str, StoredTensor], quantized: bool) -> None:
    """Weights in integers or 8-bit floats mean nothing without the scheme that their config should name, and those of
    norms, and biases, are of no scheme."""
    strange = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS and _is_weight(name, tensor)]
    plain = [name for name in strange if len(tensors[name].shape) < 2 and not tensors[name].dtype.startswith("F")]
    if plain:
        raise refused(
            folder,
            f"{file} holds {some(plain)} as {tensors[plain[0]].dtype}, and such weights are floating-point numbers in "
            "every scheme: the file is damaged or was converted wrongly; take the original checkpoint",
        )
    if strange and not quantized:
        raise refused(
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
    for name in ("generation_config.json", *TEXT_FILES):
        if (folder / name).exists() and (wrong := wrong_in_text_file(name, read_json(folder, name))):
            raise refused(folder, f"{name} says {wrong}: download it again, or correct it")
    for template in ("chat_template.jinja", *sorted(f"{path.parent.name}/{path.name}" for path in folder.glob(MORE))):
        with contextlib.suppress(FileNotFoundError):
            read_text(folder, template)
    if any(True for pattern in TOKENIZERS for _ in folder.glob(pattern)):
        return
    if (folder / "tekken.json").is_file():
        raise refused(
            folder,
            "its only tokenizer is Mistral's tekken.json, and a tokenizer.json is needed: take it from a version of "
            "this model in transformers' format",
        )
    raise refused(folder, "no tokenizer is there: copy tokenizer.json and tokenizer_config.json of the model into it")


def _what_instead_of_a_model(folder: Path) -> str:
    """Why a folder without config.json is no model, by what it has instead."""
    if adapter := next((name for name in OF_ADAPTERS if (folder / name).is_file()), None):
        return f"it is an adapter ({adapter}), not a model; {_merging(folder)}, and give the merged folder"
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
    found = sorted(file.name for file in folder.glob("*.safetensors") if file.is_file())
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
    if others := sorted(file.name for pattern in OTHERS for file in folder.glob(pattern)):
        return (
            f"its weights are {some(others)}, for another program: take the model's version in transformers' format, "
            f"with {WEIGHTS}"
        )
    below = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.safetensors"))
    inside = f" ({some(below)} lies too deep: move it up)" if below else ""
    return f"no safetensors are found there, only {CONFIG}: download {WEIGHTS} or its parts{inside}"


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
        base = str(read_json(folder, ADAPTER).get("base_model_name_or_path") or "")[:80]
    return f"merge it into its base{f' {base}' if base else ''} once (peft's merge_and_unload, then save_pretrained)"
