"""How a model is sampled where a request does not say: as its authors recommend, in generation_config.json.

They are read as vLLM reads them: what the file names differently from transformers' own defaults, `do_sample` left out.
GENERATION_CONFIG=none turns them off; /v1/models tells the values that hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prerope.server.errors import words_of
from prerope.server.models.config.values import shown

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint

LIMITS = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
}
"""What a request may say, too; a file's value outside is left out."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A model's defaults of sampling; without arguments the neutral ones, which leave its distribution as it is."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


EMBEDDED = SamplingDefaults(temperature=0.2, top_p=0.9)
"""Of SmolLM2-135M-Instruct, whose file names none: those of the example on its authors' page. So small a model loses
its thread at 1.0."""


def sampling_defaults(checkpoint: Checkpoint, report: Callable[[str], None] = lambda _: None) -> SamplingDefaults:
    """Those of generation_config.json, and neutral ones where it is silent or missing.

    report: gets a line for each value that cannot be, in whose place a neutral one stands.
    """
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(checkpoint.source, revision=checkpoint.revision)
    except OSError:  # there is none
        return SamplingDefaults()
    except Exception as error:  # it is no reason not to serve
        said = words_of(error) or "a value in it is of another kind than it should be"
        report(f"warning: generation_config.json is left out, since it cannot be read: {said}")
        return SamplingDefaults()
    found: dict[str, Any] = {}
    named = config.to_diff_dict()
    for name, (low, high) in LIMITS.items():
        value = named.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            found[name] = value
        elif value is not None:
            report(
                f"warning: generation_config.json says {name} is {shown(value)}, and it is a number from {low} to "
                f"{high}: {getattr(SamplingDefaults(), name)} is used where a request names none"
            )
    return replace(SamplingDefaults(), **found)
