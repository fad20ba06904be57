"""What is blamed where a model cannot be loaded: config.json where it fails by itself, else what happened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prerope.server.engine.loading import in_words
from prerope.server.errors import ConfigurationError, words_of
from prerope.server.models import weights
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.models.config.faults import Unknown, config_fault
from prerope.server.models.weights import load_weights, sketch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
SAID: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8, **SIZES}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama of one layer, in bf16."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint(str(folder), "m")


def refusal(checkpoint: Checkpoint, dtype: str = "auto") -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_weights(checkpoint, dtype, lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fails_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "read its weights (Torch not compiled with CUDA"),
        (
            RuntimeError("size mismatch for q_proj.weight\nand more"),
            "read its weights (size mismatch for q_proj.weight):",
        ),
        (KeyError("llama"), "transformers fails to read its weights: they may be damaged"),
        (PermissionError(13, "Permission denied", "model-1"), "Permission denied"),
    ],
)
def test_what_a_config_does_not_cause_is_not_laid_on_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    fails_with(monkeypatch, error)
    told = refusal(checkpoint)
    assert said in told
    assert "config.json" not in told


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_want_of_memory_says_how_much_is_needed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    wide = Checkpoint(checkpoint.source, "m")
    monkeypatch.setattr(Checkpoint, "config_values", lambda _: SAID | {"vocab_size": 10**8, "dtype": "bfloat16"})
    fails_with(monkeypatch, error)
    assert "its weights take 12.8 GB, more memory than there is" in refusal(wide)  # of 2 bytes, twice 32 a token
    assert "its weights take 25.6 GB, more memory than there is" in refusal(wide, "float32")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("the first cause")])
def test_an_error_while_the_cause_is_looked_for_hides_it_from_nobody(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def gone(*_arguments: Any) -> None:
        raise OSError("config.json has gone")

    def fail(*_arguments: Any, **_options: Any) -> None:
        monkeypatch.setattr(weights, "sketch", gone)
        monkeypatch.setattr(Checkpoint, "config_values", gone)
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    assert ("more memory than there is" if isinstance(error, MemoryError) else "the first cause") in refusal(checkpoint)


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Checkpoint(str(tmp_path / "none"), "m").config()
    assert f"{tmp_path}/none" in str(caught.value)
    assert "its values do not fit" not in str(caught.value)


def test_a_size_with_a_decimal_point_is_not_at_fault_where_another_value_is() -> None:
    said = {"hidden_size": 32.0} | SAID | {"hidden_size": 32.0, "hidden_act": "x"}
    fault = config_fault(said, KeyError("an activation"), sketch)
    assert fault is not None
    assert fault.startswith("'hidden_act' is the text 'x', which transformers cannot use")
    assert config_fault(SAID | {"hidden_size": 32.0}, KeyError("hidden_size"), sketch) is None


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"num_hidden_layers": 2**31 - 1}, "'num_hidden_layers' is 2147483647"),
        ({"num_labels": 10**9}, "'num_labels' is 1000000000"),
        ({"model_type": "gpt2", "n_layer": 10**12}, "'n_layer' is 1000000000000"),
        ({"vocab_size": 2**31 - 1, "hidden_act": "x"}, "'hidden_act' is the text 'x'"),
        ({"num_hidden_layers": 65_536, "hidden_act": "x"}, "'hidden_act' is the text 'x'"),
        ({"num_hidden_layers": 65_536}, None),
    ],
)
def test_sizes_that_nobody_has_take_neither_time_nor_memory(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], names: str | None
) -> None:
    monkeypatch.setattr(weights, "MOST_SECONDS_OF_A_SKETCH", 2)
    began = time.monotonic()
    fault = config_fault(SAID | values, RuntimeError("x"), sketch)
    assert time.monotonic() - began < 20
    assert fault is None if names is None else str(fault).startswith(names)


def test_no_model_is_made_for_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as short:
        short.setattr(weights, "MOST_SECONDS_OF_A_SKETCH", 0.1)
        with pytest.raises(Unknown):
            sketch(SAID | {"num_hidden_layers": 4000})
    assert sketch(SAID).config.num_hidden_layers == 1  # and nothing stays behind


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("f() got 3"), UnicodeDecodeError("utf-8", b"a", 0, 1, "bad")]
)
def test_no_last_resort_names_an_error_of_python_s(error: Exception) -> None:
    """What nothing explains is told with what, where and the remedy; LOG_LEVEL=debug has the rest."""

    def fail(*_arguments: Any) -> None:
        raise error

    told = [str(config_fault(SAID, error, fail)), _told_while(error), words_of(error)]
    assert type(error).__name__ not in "".join(told)
    assert "correct it" in told[0]
    assert "'m' cannot be served: code that reads or runs it fails (test_config_faults.py, line " in told[1]
    assert "download them again; LOG_LEVEL=debug" in told[1]


def _told_while(error: Exception) -> str:
    with pytest.raises(ConfigurationError) as caught, in_words("m"):
        raise error
    return str(caught.value)
