"""What is refused, by name and reason; what the probe would catch; and that no other model in the process changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions
from prerope.server.errors import ConfigurationError
from prerope.server.models import model as model_module
from prerope.server.models.checks.probe import TOLERANCE, probe
from prerope.server.models.model import Model
from torch import Tensor

from tests.engine.models.model_table import row_errors, stock_logits
from tests.engine.tiny_models import FAMILIES, prompt_of, tiny
from tests.tiers import every


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("hunyuan_v1_dense", {}, "normalises queries and keys after the rotation"),
    ],
)
def test_a_family_that_cannot_be_served(family: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{family}.*{reason}"):
        Model(tiny(family, **config))


def test_a_norm_after_the_rotation_is_found_without_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """HunYuan, or any family like it, is caught by trying, not by its name."""
    monkeypatch.setattr("prerope.server.models.checks.inspection._refusal", lambda _config: None)
    with pytest.raises(ConfigurationError, match=r"hunyuan_v1_dense.*layers\.\d\.self_attn.*norm after the rotation"):
        Model(tiny("hunyuan_v1_dense"))


@pytest.mark.parametrize(
    ("family", "groups", "dim", "interleaved"),
    [
        ("llama", [""] * 4, 16, False),
        ("gpt_neox", [""] * 4, 4, False),
        ("cohere", [""] * 4, 16, True),
        ("glm", [""] * 4, 8, True),
        ("smollm3", ["", None, "", None], 16, False),
        ("gemma3_text", ["sliding_attention", "full_attention"] * 2, 16, False),
    ],
)
def test_what_inspection_finds(family: str, groups: list[str | None], dim: int, interleaved: bool) -> None:
    model = Model(tiny(family))
    assert [layer.group for layer in model.layers] == groups
    for rotary in model.rotaries.values():
        assert (rotary.dim, rotary.interleaved) == (dim, interleaved)
    heads = 4 if family in ("gpt_neox",) else 2
    assert {layer.shape.num_kv_heads for layer in model.layers} == {heads}


def test_dims_that_are_zero_whatever_turns_them() -> None:
    """Quantised norms have weights of zero, as Gemma 3's do: such dims change by no turn, and turn all the same."""
    transformers_model = tiny("gemma3_text")
    for place, dims in enumerate(([0, 8], [3, 11], [7, 15], [0, 1, 15])):
        attention = transformers_model.model.layers[place].self_attn
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.data[dims] = -1
    model = Model(transformers_model)
    assert {rotary.dim for rotary in model.rotaries.values()} == {16}
    assert probe(model) < 1e-4


# --- the probe --------------------------------------------------------------------------------------------------------


class Sabotage:
    """Our attention with one layer's options changed: what a family that we misread would look like."""

    def __init__(self, layer: int, **change: Any) -> None:
        self.layer, self.change, self.calls = layer, change, 0

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        if self.calls % 4 == self.layer:
            options = replace(options, **self.change)
        self.calls += 1
        return paged_attention(query, keys, values, metadata, options)


@pytest.mark.parametrize(
    ("family", "layer", "change"),
    [
        ("llama", 2, {"scale": 0.3}),
        ("llama", 0, {"group": None}),
        ("llama", 3, {"sliding_window": 6}),
        ("mistral", 1, {"sliding_window": None}),
        ("mistral", 1, {"sliding_window": 4}),  # one off: the probe shrinks the window to 5
        ("gpt_oss", 1, {"sinks": None}),
        ("smollm3", 1, {"group": ""}),
        ("gemma3_text", 2, {"group": "full_attention"}),
    ],
    ids=lambda value: str(value),
)
def test_the_probe_names_the_layer(
    family: str, layer: int, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tiny(family))
    sabotage = Sabotage(layer, **change)
    monkeypatch.setattr(model, "attention", sabotage)
    with pytest.raises(ConfigurationError, match=rf"{family}.*layer model\.layers\.{layer}\.self_attn"):
        probe(model)


def test_the_probe_catches_a_soft_cap_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tiny("gemma2", sharpness=4.0, attn_logit_softcapping=2.0))
    assert probe(model) < 1e-4
    sabotage = Sabotage(3, softcap=None)
    monkeypatch.setattr(model, "attention", sabotage)
    with pytest.raises(ConfigurationError, match=r"gemma2.*layer model\.layers\.3\.self_attn"):
        probe(model)


def test_the_probe_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong in steps of single rows alone is found, too."""
    sabotage = Sabotage(2, scale=0.3)

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        single = all(sequence.count == 1 for sequence in metadata.sequences)
        return (sabotage if single else paged_attention)(query, keys, values, metadata, options)

    model = Model(tiny("llama"))
    monkeypatch.setattr(model, "attention", attend)
    with pytest.raises(ConfigurationError, match=r"llama.*layer model\.layers\.2\.self_attn"):
        probe(model)


def test_the_probe_has_the_cache_s_served_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong where keys are kept in another dtype than the model's alone is found, too."""
    sabotage = Sabotage(1, scale=0.3)

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        return (sabotage if keys.dtype == torch.float16 else paged_attention)(query, keys, values, metadata, options)

    model = Model(tiny("llama"))
    monkeypatch.setattr(model, "attention", attend)
    probe(model)
    with pytest.raises(ConfigurationError, match=r"layer model\.layers\.1\.self_attn"):
        probe(model, torch.float16)


def loud_keys() -> Any:
    """Qwen2 with biases of keys up to 145, as Qwen2.5-Coder-0.5B has them, in bf16."""
    transformers_model = tiny("qwen2")
    for layer in transformers_model.model.layers:
        bias = layer.self_attn.k_proj.bias
        bias.data += 145 * bias.data.sign()
    return transformers_model.bfloat16()


def test_both_are_held_to_a_layer_in_fp32_where_transformers_own_rounds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt_of(24)
    expected = stock_logits(loud_keys().float(), ids)
    assert row_errors(stock_logits(loud_keys(), ids), expected).mean() > 2 * TOLERANCE[torch.bfloat16]
    probe(Model(loud_keys()))
    monkeypatch.setattr(model_module, "attention_on", lambda _: Sabotage(1, group=None))
    with pytest.raises(ConfigurationError, match=r"layer model\.layers\.1\.self_attn"):
        probe(Model(loud_keys()))


def test_the_probe_catches_the_wrong_pairing() -> None:
    model = Model(tiny("cohere"))
    assert probe(model) < 1e-4
    model.rotaries[""] = replace(model.rotaries[""], interleaved=False)
    with pytest.raises(ConfigurationError, match=r"cohere.*layer model\.layers\.0\.self_attn"):
        probe(model)


def test_the_probe_catches_wrong_frequencies() -> None:
    model = Model(tiny("llama"))
    model.rotaries[""] = replace(model.rotaries[""], base=20000.0)
    with pytest.raises(ConfigurationError, match="llama"):
        probe(model)


def test_the_probe_catches_a_change_outside_attention() -> None:
    """Logits are compared too: here the stock forward has a head of its own."""
    model = Model(tiny("llama"))
    stock, head = model.raw.stock, model.raw.model.lm_head

    @contextmanager
    def other_head() -> Iterator[None]:
        with stock():
            head.weight.data.neg_()
            yield
            head.weight.data.neg_()

    model.raw.stock = other_head  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match=r"llama.*the logits differ"):
        probe(model)


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "gemma2"])
def test_the_probe_leaves_sliding_windows_as_they_were(family: str) -> None:
    model = Model(tiny(family))

    def windows() -> list[int | None]:
        owners = [model.raw.text_config, *(layer.module for layer in model.layers)]
        return [getattr(owner, "sliding_window", None) for owner in owners]

    before = windows()
    assert 8 in before
    probe(model)
    assert windows() == before


# --- nothing else changes ---------------------------------------------------------------------------------------------

IDS = torch.tensor([prompt_of(30)])


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS.to(model.device), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "cohere", "gpt_oss"])
def test_stock_is_transformers_own(family: str) -> None:
    transformers_model = tiny(family)
    before = logits(transformers_model)
    model = Model(transformers_model)
    with model.raw.stock():
        assert torch.equal(logits(transformers_model), before)
    with pytest.raises(LookupError):  # outside, attention is ours and has no batch to read
        logits(transformers_model)
    with model.raw.stock():
        assert torch.equal(logits(transformers_model), before)
    assert probe(model) < 1e-4


def test_stock_ends_even_when_it_is_left_by_an_error() -> None:
    model = Model(tiny("llama"))
    with pytest.raises(ZeroDivisionError), model.raw.stock():
        raise ZeroDivisionError
    assert probe(model) < 1e-4


@pytest.mark.parametrize("family", every(1, sorted(FAMILIES), quick=4))
def test_another_model_of_the_same_class_is_untouched(family: str) -> None:
    served, other = tiny(family), tiny(family, seed=1)
    cls = type(served)
    attention_forwards = {type(m): type(m).forward for m in served.modules() if hasattr(m, "layer_idx")}
    before = logits(other)
    probe(Model(served))
    assert torch.equal(logits(other), before)
    assert type(other) is cls
    assert all(cls.forward is forward for cls, forward in attention_forwards.items())
    late = tiny(family, seed=1)  # made after the other was taken over
    assert torch.equal(logits(late), before)
