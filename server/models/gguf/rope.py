"""What a GGUF file says of rotation, as a transformers config: all that llama.cpp's converter writes.

transformers reads the base alone and drops the rest, and a check against its own forward cannot see what it dropped.
What is written here and cannot be said in a config is refused by name.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import numpy as np
from prerope.server.errors import ConfigurationError
from prerope.server.models.gguf import faults
from prerope.server.models.gguf.header import Header

FULL, SLIDING = "full_attention", "sliding_attention"
KNOWN = frozenset(
    {
        *("dimension_count", "dimension_count_swa", "dimension_sections", "freq_base", "freq_base_swa", "scale_linear"),
        *("scaling.type", "scaling.factor", "scaling.attn_factor", "scaling.original_context_length"),
        *("scaling.finetuned", "scaling.yarn_attn_factor", "scaling.yarn_ext_factor"),
        *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
    }
)
"""Keys under ARCHITECTURE.rope. that are honoured. Multi-axis sections are all at one position in a text."""

LLAMA3_ORIGINALS = (8192, 4096, 16384, 32768, 65536)


def set_rope(config: Any, header: Header, tensors: dict[str, Any]) -> None:
    """Give `config` the file's rotation. tensors: `rope_freqs.weight` and the like, as arrays, where it has them."""
    _check_known(header)
    main = _main(config)
    base = header.own("rope.freq_base")
    if base is not None:
        main["rope_theta"] = float(base)
    sliding = config.rope_parameters.get(SLIDING) if main is not config.rope_parameters else None
    if sliding is not None and header.own("rope.freq_base_swa") is not None:
        sliding["rope_theta"] = float(header.own("rope.freq_base_swa"))
    width = _set_width(config, main, header)
    for name, divisors in tensors.items():
        _check_divisors(header, name, divisors, width)
    scaling = _scaling(header, tensors, int(config.max_position_embeddings), float(main["rope_theta"]))
    if scaling is None:
        return
    for name in ("factor", "attention_factor", "original_max_position_embeddings", "truncate"):
        main.pop(name, None)
    main.update(scaling)
    if header.architecture.startswith("gpt-oss"):
        main["truncate"] = False
    if scaling["rope_type"] == "longrope" and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _main(config: Any) -> dict[str, Any]:
    """The parameters of the layers that scaling is for: full attention, where a model has two kinds."""
    parameters: dict[str, Any] = config.rope_parameters
    nested = parameters.get(FULL)
    return nested if isinstance(nested, dict) else parameters


def _set_width(config: Any, main: dict[str, Any], header: Header) -> int:
    """Rotary dims a head, which are returned, where they are not all and the config does not say so."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = main.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    width = header.own("rope.dimension_count", int(head_dim * share))
    if not isinstance(width, int) or width % 2 or not 0 < width <= head_dim:
        raise _refused(header, f"rope.dimension_count is {width}, and a head has {head_dim} dims, which turn in pairs")
    if int(head_dim * share) != width:
        if not _turns_part(config):
            of = f"{width} of the {head_dim} dims of a head turn (rope.dimension_count)"
            raise _refused(header, f"{of}, and in transformers' {config.model_type} all of them do")
        main["partial_rotary_factor"] = config.partial_rotary_factor = width / head_dim
    return width


def _turns_part(config: Any) -> bool:
    """Whether the family's code asks the config which part of a head turns; the others turn all, whatever it says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM._model_mapping[type(config)]
    return "partial_rotary_factor" in inspect.getsource(sys.modules[model.__module__])


def _check_divisors(header: Header, name: str, divisors: Any, width: int) -> None:
    """By each the frequency of a pair of dims is divided."""
    if divisors.shape != (width // 2,):
        shape = " by ".join(map(str, divisors.shape))
        raise _refused(header, f"{name} has {shape} numbers, and it is one for each of {width // 2} pairs that turn")
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise _refused(header, f"{name} has numbers that are not above 0, and frequencies are divided by them")


def _scaling(header: Header, tensors: dict[str, Any], length: int, base: float) -> dict[str, Any] | None:
    """The scaling as config parameters; None where there is none."""
    kind = str(header.own("rope.scaling.type", "none"))
    factor = float(header.own("rope.scaling.factor") or header.own("rope.scale_linear") or 1.0)
    original = header.own("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        return _longrope(header, tensors, int(original or length), length)
    if "rope_freqs.weight" in tensors:
        return _stretched(tensors["rope_freqs.weight"], int(original or length), base)
    if kind == "none" and "rope.scaling.type" not in _own_keys(header) and factor != 1.0:
        kind = "linear"  # as old converters wrote it
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} | (
            {"original_max_position_embeddings": int(original)} if original else {}
        )
    if kind == "yarn":
        return _yarn(header, factor, int(original or length))
    raise _refused(header, f"rope.scaling.type is {kind!r}, without the factors it needs")


def _yarn(header: Header, factor: float, original: int) -> dict[str, Any]:
    if header.own("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise _refused(header, f"rope.scaling.yarn_ext_factor is {header.own('rope.scaling.yarn_ext_factor')}")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    sharper = header.own("rope.scaling.yarn_attn_factor", header.own("rope.scaling.attn_factor"))
    if sharper is not None and sharper != 1.0:  # it multiplies YaRN's own
        scaling["attention_factor"] = float(sharper) * (0.1 * math.log(factor) + 1.0)
    for name in ("beta_fast", "beta_slow"):
        if (value := header.own(f"rope.scaling.yarn_{name}")) is not None:
            scaling[name] = float(value)
    return scaling


def _longrope(header: Header, tensors: dict[str, Any], original: int, length: int) -> dict[str, Any]:
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    if any(name not in tensors for name in names):
        raise _refused(header, f"of {names[0]} and {names[1]} one is missing")
    short, long = (tensors[name].astype(float).tolist() for name in names)
    attention = header.own("rope.scaling.attn_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(max(length / original, 1.0)) / math.log(original))
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": float(attention),
        "original_max_position_embeddings": original,
    }


def _stretched(divisors: Any, original: int, base: float) -> dict[str, Any]:
    """rope_freqs.weight divides each pair's frequency: llama3's rule where one gives the same, else as they are."""
    found = np.asarray(divisors, dtype=np.float64)
    factor = float(found.max())
    theta = base ** (-np.arange(len(found)) / len(found))
    for trained in LLAMA3_ORIGINALS:
        turns = trained * theta / (2 * math.pi)
        keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        if factor > 1 and np.allclose(1 / (keep + (1 - keep) / factor), found, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": trained,
            }
    same = found.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": same,
        "long_factor": same,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
    }


def _own_keys(header: Header) -> set[str]:
    prefix = f"{header.architecture}."
    return {key.removeprefix(prefix) for key in header.values if key.startswith(prefix)}


def _check_known(header: Header) -> None:
    keys = _own_keys(header)
    unknown = sorted(key for key in keys if key.startswith("rope.") and key.removeprefix("rope.") not in KNOWN)
    unknown += sorted(key for key in keys if key.startswith("attention.temperature"))
    if unknown:
        raise _refused(header, f"it sets {', '.join(unknown)}, which a config of this kind cannot say")


def _refused(header: Header, reason: str) -> ConfigurationError:
    return faults.refused(header, f"{reason}; take the model's checkpoint in safetensors")
