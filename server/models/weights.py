"""Weights of a checkpoint into a transformers model: all of them, and no other.

transformers draws at random what a checkpoint lacks and drops what it has no place for, and only logs it. Here its
loading report is read: a model is whole, or refused by the names of what is wrong. Weights that are no numbers are
found, too, before anything is computed with them.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prerope.server.errors import ConfigurationError, of_memory, words_of
from prerope.server.models.checks.loaded import incomplete, no_numbers, strange, unmerged
from prerope.server.models.config.faults import Unknown, config_fault
from prerope.server.models.config.values import REMEDY, whole_numbers
from prerope.server.models.quantized.schemes import SCHEMES, check_scheme, dequantising, scheme_of
from prerope.server.models.senses import drop_other_senses, of_senses, thinking_part, unseen, without_timm
from prerope.server.models.stored import some
from torch.nn.modules.module import register_module_module_registration_hook

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


MOST_SECONDS_OF_A_SKETCH = 5


def load_weights(checkpoint: Checkpoint, dtype: str, report: Callable[[str], None]) -> Any:
    """A transformers causal LM in evaluation mode, on the CPU. ConfigurationError names what is wrong.

    Only safetensors are read, and no code that comes with a checkpoint is run.
    """
    from transformers import GenerationConfig

    config, scheme = _config_and_scheme(checkpoint, report)
    lines: list[str] = []
    try:
        with _quiet_report(lines), without_timm():
            model, info = class_for(config).from_pretrained(
                checkpoint.source,
                config=config,
                dtype=DTYPES.get(dtype, "auto"),
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that the report names them all
                generation_config=GenerationConfig(),  # what its file says is read elsewhere, and may be anything
                output_loading_info=True,
                **_same_commit(checkpoint),
            )
    except Exception as error:  # a config may hold anything, and model classes raise whatever they meet
        if of_memory(error):
            raise ConfigurationError(_too_large(checkpoint, DTYPES.get(dtype))) from error
        log.debug("weights could not be read", exc_info=error)
        reason = unmerged("".join(lines)) or _of_scheme(scheme, error) or _reason(checkpoint, error)
        raise ConfigurationError(f"MODEL_ID: {checkpoint.name!r} cannot be loaded: {reason}") from error
    if scheme == "bitsandbytes":
        model = model.dequantize(config.dtype)
    if model.dtype == torch.float64:
        report("weights of 64 bits are served in fp32")
        model = model.float()
    _check_loaded(model, info, checkpoint, report)
    return model.eval()


def _check_loaded(model: Any, info: Any, checkpoint: Checkpoint, report: Callable[[str], None]) -> None:
    """See that the model is what its checkpoint holds, all of it; senses other than text are dropped. info: of loading.

    Raises:
        ConfigurationError: it names what is missing, strange, or no number.
    """
    unexpected = info["unexpected_keys"]
    strange_ones = strange(model, unexpected - unseen(model, unexpected))
    dropped = drop_other_senses(model)
    wrong = incomplete(info, of_senses(dropped)) or strange_ones or no_numbers(model, report)
    if wrong:
        raise ConfigurationError(f"MODEL_ID: {checkpoint.name!r} cannot be served: {wrong}")
    if unexpected:
        report(f"left out, since it is not the decoder's: {len(unexpected)} weights, as {some(sorted(unexpected), 1)}")
    if dropped:
        report(f"text alone is served: {', '.join(dropped)} left out")


def _config_and_scheme(checkpoint: Checkpoint, report: Callable[[str], None]) -> tuple[Any, str | None]:
    """The checkpoint's config, asking for dense weights where they are quantised by a scheme that can be read."""
    config = thinking_part(checkpoint.config())
    if isinstance(config.get_text_config(), Mapping):  # kept as it came, where the type has none
        raise ConfigurationError(
            f"MODEL_ID: {checkpoint.name!r} cannot be served: its config.json has a 'text_config', and a model of type "
            f"{config.model_type!r} has none: {REMEDY}"
        )
    config.return_dict = config.get_text_config().return_dict = True  # what a config may say, and a forward must not
    if reason := unsuited(config):
        raise ConfigurationError(
            f"MODEL_ID: {checkpoint.name!r} cannot be served: model type {config.model_type!r} {reason}"
        )
    folder = Path(checkpoint.source)
    scheme = scheme_of(config.to_dict(), folder if folder.is_dir() else None)
    if scheme is None:
        return config, None
    check_scheme(checkpoint.name, scheme)
    report(f"dequantising weights of {SCHEMES[scheme].title}")
    return dequantising(config), scheme


def language_models() -> dict[str, str]:
    """Model type → the name of the automatic class that makes the model of it that continues a text.

    Of causal models where there is one; else of those that read images or hear beside text.
    """
    from transformers.models.auto import modeling_auto

    classes = {
        "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    return {model_type: name for name, types in classes.items() for model_type in types}


def unsuited(config: Any) -> str | None:
    """Why no model of this type continues a text by itself, as a predicate; None where one may."""
    config = thinking_part(config)
    model_type = str(config.model_type)
    if getattr(config, "canvas_length", None):
        return "makes a block of tokens at a time, by diffusion, and models that make one after another are served"
    if getattr(config, "codebook_vocab_size", None):
        return "reads several tokens of sound beside each one of text, and here a prompt is text"
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder, which its decoder reads, and decoders that stand alone are served"
    if model_type.endswith("_assistant"):
        return "drafts tokens for another model, whose keys it reads, so it does not run alone"
    if model_type not in language_models():
        return "is none of transformers' language models that continue a text"
    made_by, cls = class_for(config)._model_mapping, config if isinstance(config, type) else type(config)
    return None if cls in made_by else "is found by none of transformers' classes that make a model of a config"


def class_for(config: Any) -> Any:
    """transformers' automatic class for the model of this config that continues a text."""
    import transformers

    return getattr(transformers, language_models()[config.model_type])


def sketch(config_values: Mapping[str, Any]) -> Any:
    """The model of a config, without weights. Raises whatever transformers does, and Unknown where it takes long."""
    from transformers import AutoConfig

    config = thinking_part(AutoConfig.for_model(**whole_numbers(config_values)))
    with torch.device("meta"), without_timm(), _made_within(MOST_SECONDS_OF_A_SKETCH):
        return class_for(config).from_config(config)


@contextmanager
def _made_within(seconds: float) -> Iterator[None]:
    """Inside, this thread makes no more modules once these seconds are over, whatever a config asks for."""
    ends, maker = time.monotonic() + seconds, threading.get_ident()

    def look(*_registered: object) -> None:
        if threading.get_ident() == maker and time.monotonic() > ends:
            raise Unknown(f"no model was made of it in {seconds} s")

    watch = register_module_module_registration_hook(look)
    try:
        yield
    finally:
        watch.remove()


@contextmanager
def _quiet_report(lines: list[str]) -> Iterator[None]:
    """Inside, the table of transformers' loading report goes to `lines` and not to the log: a line says what matters.
    What transformers says at this level of layers that no plan shards is not said: no plan is asked for."""
    logger = logging.getLogger("transformers.modeling_utils")
    plans = logging.getLogger("transformers.distributed.tensor_parallel")

    def keep(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        lines.extend([record.getMessage()] * is_report)
        return not is_report

    level = logger.level
    plans.addFilter(_none)
    logger.addFilter(keep)
    logger.setLevel(logging.WARNING)  # the report's, whatever LOG_LEVEL is
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeFilter(keep)
        plans.removeFilter(_none)


def _none(_record: logging.LogRecord) -> bool:
    return False


def _same_commit(checkpoint: Checkpoint) -> dict[str, str]:
    """The revision to read the weights at: the commit that the config is of, for a hub id.

    By a branch's name transformers would ask a public service to convert pickled weights, and load what it proposes.
    """
    from transformers.utils import cached_file, extract_commit_hash

    given = {"revision": checkpoint.revision} if checkpoint.revision else {}
    commit = extract_commit_hash(cached_file(checkpoint.source, "config.json", **given), None)
    return {"revision": commit} if commit else given


def _too_large(checkpoint: Checkpoint, dtype: torch.dtype | None) -> str:
    """What its weights take, in this dtype or else in its own; not how much, where its config fails by itself."""
    try:
        parts = list(sketch(checkpoint.config_values()).parameters())
        size = f"{sum(part.numel() * (dtype or part.dtype).itemsize for part in parts) / 1e9:.1f} GB, "
    except Exception:  # as with anything that is made of a config
        size = ""
    return (
        f"MODEL_ID: {checkpoint.name!r} cannot be loaded: by its config.json its weights take {size}"
        "more memory than there is: take a smaller model or a larger machine; or config.json is another model's"
    )


def _of_scheme(scheme: str | None, error: Exception) -> str | None:
    """The refusal of quantized weights, or of their config, where these are what was read."""
    if scheme is None or isinstance(error, OSError):
        return None
    said = words_of(error)
    return (
        f"its weights could not be dequantised as {SCHEMES[scheme].title}{f' ({said})' if said else ''}: "
        "quantization_config in config.json is damaged or of another kind; take the checkpoint again, or the original"
    )


def _reason(checkpoint: Checkpoint, error: Exception) -> str:
    """The first line of what transformers says, and the remedy where there are no weights that may be read."""
    if "model.safetensors" in str(error):
        return (
            "no safetensors are found there (or, without a network, in the hub's cache). Weights in pickle files, such "
            "as pytorch_model.bin, can run code when they are read, so they are refused; where you trust them, convert "
            "them once with transformers' save_pretrained, or choose a REVISION that has model.safetensors"
        )
    if needed := re.search(r"requires the (\S+) library", str(error)):
        return f"transformers needs the package {needed[1]} for it: pip install {needed[1]}"
    if "Unrecognized configuration class" in str(error):
        return "transformers has no language model of its type"
    said = words_of(error)
    if isinstance(error, OSError) and said:
        return said.replace(os.path.expanduser("~"), "~")
    try:
        fault = config_fault(checkpoint.config_values(), error, sketch)
    except Exception:  # what happened first is what is told
        fault = None
    if fault is not None:
        return f"no model can be made of its config.json: {fault}"
    return (
        f"transformers fails to read its weights{f' ({said})' if said else ''}: they may be damaged, so download them "
        "again; LOG_LEVEL=debug shows what it met"
    )
