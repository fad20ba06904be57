"""Quantised checkpoints: read by what they say of themselves, dequantised at the load, or refused by name.

Layers here are dense, whatever a checkpoint stores, so a scheme is served where transformers, with a well-kept package
where it takes one, turns its weights into plain ones on any machine. The others name the package that made them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prerope.server.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Scheme:
    """What to call a scheme, and the package that reads it: `served` by dequantising, else named in the refusal."""

    title: str
    package: str | None
    served: bool = False


SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme("FP8 in blocks", None, served=True),
    "mxfp4": Scheme("MXFP4", None, served=True),
    "compressed-tensors": Scheme("compressed-tensors", "compressed-tensors", served=True),
    "bitsandbytes": Scheme("bitsandbytes", "bitsandbytes", served=True),
    "gptq": Scheme("GPTQ", "gptqmodel"),
    "awq": Scheme("AWQ", "gptqmodel"),
    "auto-round": Scheme("AutoRound", "auto-round"),
    "hqq": Scheme("HQQ", "hqq"),
    "quanto": Scheme("Quanto", "optimum-quanto"),
    "torchao": Scheme("torchao", "torchao"),
    "bitnet": Scheme("BitNet", None),
    "mlx": Scheme("MLX", "mlx-lm"),
    "modelopt": Scheme("NVIDIA ModelOpt", "nvidia-modelopt"),
    "nvfp4": Scheme("NVFP4", "nvidia-modelopt"),
    "quark": Scheme("Quark", "amd-quark"),
    "aqlm": Scheme("AQLM", "aqlm"),
    "vptq": Scheme("VPTQ", "vptq"),
    "eetq": Scheme("EETQ", "eetq"),
    "higgs": Scheme("HIGGS", "flute-kernel"),
    "spqr": Scheme("SpQR", "spqr_quant"),
    "fbgemm_fp8": Scheme("FBGEMM FP8", "fbgemm-gpu"),
}
"""By `quant_method`. One that is not here is refused under its own name."""

OTHER_NAMES = {
    "gptqmodel": "gptq",
    "gptq_v2": "gptq",
    "marlin": "gptq",
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "intel/auto-round": "auto-round",
}
"""Of schemes, as packages and their older releases write them."""

OF_GPTQ = ("desc_act", "checkpoint_format", "damp_percent", "static_groups", "true_sequential")
"""What GPTQ's configs say and MLX's do not: older ones have no `quant_method`."""

NAMED = ("quantization_config", "quantization")
UNNAMED = "a scheme that its quantization_config does not name"
MODELOPT = "hf_quant_config.json"


def scheme_of(config: Mapping[str, Any], folder: Path | None = None) -> str | None:
    """The scheme by which a checkpoint is quantised, from its config.json, or from ModelOpt's file beside it."""
    inner = config.get("text_config")
    places = [config, *([inner] if isinstance(inner, Mapping) else [])]
    said = next((place[name] for place in places for name in NAMED if place.get(name)), None)
    if isinstance(said, Mapping):
        method = said.get("quant_method")
        if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
            return "bitsandbytes"
        if method is None and "bits" in said:
            return "gptq" if any(name in said for name in OF_GPTQ) else "mlx"
        name = str(getattr(method, "value", method or UNNAMED)).lower()
        return "modelopt" if name.startswith("modelopt") else OTHER_NAMES.get(name, name)
    return "modelopt" if folder is not None and (folder / MODELOPT).is_file() else None


def check_scheme(name: str, scheme: str) -> None:
    """Raise ConfigurationError, with package and remedy, for a scheme that is not served here. name: the model's."""
    known = SCHEMES.get(scheme, Scheme(scheme, None))
    if not known.served:
        by = f" (the package {known.package})" if known.package else ""
        once = f"; or dequantise it once with {known.package} and save_pretrained" if known.package else ""
        raise ConfigurationError(
            f"MODEL_ID: {name!r} cannot be served: its weights are quantised by {known.title}{by}, which is not read. "
            f"Take the original checkpoint (WEIGHT_QUANTIZATION=int8 halves it) or a GGUF file of the model{once}"
        )
    if known.package and importlib.util.find_spec(known.package.replace("-", "_")) is None:
        raise ConfigurationError(
            f"MODEL_ID: {name!r} cannot be served: its weights are quantised by {known.title}. Run: "
            f"pip install 'prerope[quantized]' (the package {known.package}), or take the original checkpoint"
        )


def dequantising(config: Any) -> Any:
    """The config, told to load dense weights; bitsandbytes has a step of its own after the load."""
    said = config.quantization_config
    values = dict(said) if isinstance(said, Mapping) else said.to_dict()
    if values.get("quant_method") != "bitsandbytes":
        config.quantization_config = values | {"dequantize": True}
    return config
