"""Options of configs that change the maths with the position, the length or the layer: served so, or refused by name.

Each is tried beyond every length that its config names, in fp32 and bf16, in one piece, in chunks and token by token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.checks.probe import probe
from prerope.server.models.model import Model
from torch import Tensor

from tests.engine.models.model_table import Verdict, examine, logits, row_errors, stock_logits
from tests.engine.models.model_types import YARN, tiny_of_type
from tests.engine.tiny_models import prompt_of
from tests.tiers import every

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SHORT, LONG = [1 + 0.1 * m for m in range(8)], [1 + 0.8 * m for m in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 32,
}
SCALED_MLA = YARN | {"mscale": 1.4, "mscale_all_dim": 0.7}
FULL_LAYERS = [FULL] * 4

QUICK: list[tuple[str, dict[str, Any]]] = [
    ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}, "sliding_window": 8}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7}),
    ("granite_swa", {"layer_rope_theta": [1e4, 0, 1e4, 5e5], "attention_multiplier": 0.3, "logits_scaling": 2.0}),
    ("deepseek_v2", {"rope_parameters": SCALED_MLA}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("phimoe", {"sliding_window": 8}),
    ("llama4_text", {"layer_types": FULL_LAYERS, "attn_temperature_tuning": False}),
    ("olmo3", {"rope_parameters": {SLIDING: PLAIN, FULL: YARN}}),
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v3", {"rope_parameters": SCALED_MLA, "rope_interleave": False}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.7}, "q_lora_rank": None}),
    ("minicpm3", {"rope_parameters": YARN, "scale_emb": 3, "scale_depth": 2.0, "dim_model_base": 32}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "rope_parameters": YARN}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1, 0]}),
    ("mistral", {"sliding_window": 1}),
    ("mixtral", {"sliding_window": 8}),
    ("starcoder2", {"sliding_window": 8}),
    ("gemma3_text", {"layer_types": [SLIDING] * 4}),
    ("gemma3_text", {"rope_parameters": {SLIDING: YARN, FULL: PLAIN | {"rope_type": "linear", "factor": 8.0}}}),
    ("gemma3n_text", {"num_kv_shared_layers": 2}),
    ("gemma4_text", {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    ("gemma4_text", {"attention_k_eq_v": True, "final_logit_softcapping": 3.0}),
    ("cohere", {"use_qk_norm": True, "logit_scale": 2.0}),
    ("cohere2", {"layer_types": [FULL, SLIDING] * 2}),
    ("exaone4", {"layer_types": [SLIDING, FULL] * 2, "rope_parameters": YARN}),
    ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
    ("smollm3", {"no_rope_layers": [0, 0, 0, 1]}),
    ("granitemoehybrid", {"position_embedding_type": "rope"}),
    ("granitemoehybrid", {"position_embedding_type": "nope"}),
    ("gpt_oss", {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}}),
    ("mimo_v2_flash", {"rope_parameters": {FULL: PLAIN | {"rope_theta": 1e6}, SLIDING: PLAIN}}),
    ("laguna", {"rope_parameters": {FULL: YARN, SLIDING: PLAIN}}),
    ("lfm3", {"rope_parameters": {FULL: YARN, SLIDING: PLAIN}}),
    ("olmo_hybrid", {"rope_parameters": None}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("dbrx", {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 0.5}}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    ("zamba2", {"use_mem_rope": True, "use_long_context": True}),
    ("zamba2", {"num_mem_blocks": 2}),
    ("nemotron_h", {"sliding_window": 8}),
    ("zaya", {"sliding_window": 8}),
    ("afmoe", {"global_attn_every_n_layers": 2, "mup_enabled": True}),
    ("falcon_h1", {"key_multiplier": 0.5, "attention_in_multiplier": 2.0, "ssm_in_multiplier": 2.0}),
    ("mpt", {"attn_config": {"alibi_bias_max": 4, "softmax_scale": 0.7}}),
    ("mpt", {"attn_config": {"alibi": False}}),
]
NO_LONGER = [
    ("gemma3_text", {"use_bidirectional_attention": True}, "its tokens read what follows them, too"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "its tokens read what follows them, too"),
    ("llama4_text", {}, "some of its layers attend inside chunks of 8 tokens"),
    # Its scale is 1 until row 8191, so that no prompt of the check shows it: found by where its rows are counted from.
    ("llama4_text", {"layer_types": FULL_LAYERS, "floor_scale": 8192}, "it counts positions itself"),
    ("inkling_text", {}, "a bias by distance that each token makes itself"),
]


@pytest.mark.parametrize(("model_type", "config"), every(4, QUICK, quick=1))
def test_served_equal_to_transformers(model_type: str, config: dict[str, Any]) -> None:
    assert examine(model_type, **config) == Verdict("served")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "config"), MORE)
def test_more_options(model_type: str, config: dict[str, Any]) -> None:
    assert examine(model_type, **config) == Verdict("served")


@pytest.mark.parametrize(("model_type", "config", "reason"), NO_LONGER)
def test_refused_by_name(model_type: str, config: dict[str, Any], reason: str) -> None:
    verdict = examine(model_type, **config)
    assert (verdict.outcome, reason in verdict.reason) == ("refused", True), verdict


def test_factors_of_longrope_that_one_family_reads_and_another_does_not() -> None:
    """Phi-3.5-MoE scales by `short_mscale`; in any other family transformers leaves it unread."""
    scales = LONGROPE | {"short_mscale": 1.5, "long_mscale": 2.0}
    model = Model(tiny_of_type("phi3", rope_parameters=scales))
    assert "short_mscale" not in model.rotaries[""].parameters
    probe(model)
    assert Model(tiny_of_type("phimoe", sliding_window=None, rope_parameters=scales)).rotaries[""].parameters == scales


class PublishedLongRope(torch.nn.Module):
    """As the makers of Phi-3.5-MoE have it: factors and their mscale by the length of the prompt."""

    def forward(self, _x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        factors, mscale = (LONG, 1.3) if int(position_ids.max()) + 1 > 32 else (SHORT, 1.1)
        theta = 1.0 / (torch.tensor(factors) * 10000.0 ** (torch.arange(0, 16, 2) / 16))
        angles = (position_ids[..., None].float() * theta).repeat(1, 1, 2)
        return angles.cos() * mscale, angles.sin() * mscale


@pytest.mark.parametrize("length", [20, 100])
def test_long_factors_that_transformers_leaves_unread_are_read(length: int) -> None:
    """Phi-3.5-MoE's, past the trained length: what the model was taught, and not what its class does."""
    scales = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
    options: dict[str, Any] = {"sliding_window": None, "num_hidden_layers": 1, "rope_parameters": scales}
    ids, (stock, published) = prompt_of(length), (tiny_of_type("phimoe", **options) for _ in range(2))
    published.model.rotary_emb = PublishedLongRope()
    expected = stock_logits(published, ids)
    assert bool(row_errors(stock_logits(stock, ids), expected)[-1] > 1e-2) == (length > 32)
    model = Model(stock)
    probe(model)
    for chunk in (length, 7, 1):
        assert row_errors(logits(model, ids, chunk), expected)[-1] < 1e-3


def test_tokens_that_a_model_rules_out_hide_no_others() -> None:
    """Logits of the smallest number there is, beside which a difference of all others would be nothing."""
    model = Model(tiny_of_type("chameleon"))
    assert probe(model) < 1e-3
    head = model.raw.model.get_output_embeddings()
    weight = torch.randn_like(head.weight)
    model.raw.replace_forward(head, lambda x: torch.nn.functional.linear(x, weight))
    with pytest.raises(ConfigurationError, match="the logits differ"):
        probe(model)


def test_longrope_without_its_trained_length_has_that_of_the_config() -> None:
    """null beside the rotation, or nothing in it: the next that says it, as transformers fills it in; or a refusal."""
    scales = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
    options: dict[str, Any] = {"sliding_window": None, "num_hidden_layers": 1, "rope_parameters": scales}
    model = tiny_of_type("phimoe", **options)
    model.config.original_max_position_embeddings = None
    del model.config.rope_parameters["original_max_position_embeddings"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "max_position_embeddings", 48)
        assert Model(model).rotaries[""].parameters["original_max_position_embeddings"] == 48
    model = tiny_of_type("phimoe", **options)
    model.config.original_max_position_embeddings = "long"
    with pytest.raises(ConfigurationError, match="'long' for original_max_position_embeddings"):
        Model(model)
