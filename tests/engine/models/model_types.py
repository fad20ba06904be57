"""A tiny random model of every decoder type that transformers has, from its own config class.

Sizes are set by the names that configs have for them, so that a type that transformers adds is tried without a line
here. `SPECIAL` has what a type needs beside. Lengths are short, so that prompts reach beyond all that a config names.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from prerope.server.models.senses import drop_other_senses, thinking_part, without_timm
from prerope.server.models.weights import class_for, language_models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.tiny_models import randomize

MODEL_TYPES = tuple(sorted(language_models()))

LAYERS, LENGTH, VOCABULARY = 4, 64, 128
SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size")),
    (
        64,
        (
            *("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "emb_dim", "embedding_dim"),
            *("lru_width", "attention_hidden_size", "input_embedding_size", "output_embedding_size"),
            *("hidden_size_global", "adapter_in_dim", "adapter_out_dim", "adapter_input_size", "backbone_hidden_size"),
            *("out_hidden_size", "text_hidden_size", "audio_hidden_size"),
        ),
    ),
    (
        96,
        (
            *("intermediate_size", "ffn_dim", "moe_intermediate_size", "n_inner", "dim_ff", "dff", "ffn_hidden_size"),
            *(
                "shared_expert_intermediate_size",
                "shared_intermediate_size",
                "dense_intermediate_size",
                "decoder_ffn_dim",
            ),
            *("encoder_ffn_dim", "intermediate_size_mlp", "expert_ffn_hidden_size", "shared_experts_intermediate_size"),
            *("moe_shared_expert_intermediate_size", "feed_forward_size", "d_inner"),
        ),
    ),
    (
        LAYERS,
        (
            *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"),
            *("num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack"),
        ),
    ),
    (
        4,
        (
            *("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads", "num_experts"),
            *("num_local_experts", "n_routed_experts", "moe_num_experts", "index_n_heads", "swa_num_attention_heads"),
            *("linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
            *("num_attention_heads_per_layer", "altup_num_inputs", "index_topk_blocks"),
        ),
    ),
    (
        2,
        (
            *(
                "num_key_value_heads",
                "num_kv_heads",
                "num_experts_per_tok",
                "num_experts_per_token",
                "moe_topk",
                "moe_k",
            ),
            *("linear_num_key_heads", "swa_num_key_value_heads", "n_shared_experts", "num_query_groups", "o_groups"),
            *("zero_expert_num", "hc_mult", "hc_count"),
        ),
    ),
    (1, ("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups")),
    (
        16,
        (
            *("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"),
            *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head", "mamba_head_dim"),
            *(
                "index_head_dim",
                "d_head",
                "dim_head",
                "kv_channels",
                "attention_head_dim",
                "hidden_size_per_layer_input",
            ),
            *("kv_lora_rank", "o_lora_rank", "router_hidden_size", "laurel_rank", "adapter_rank", "hc_lowrank"),
            *("mamba_d_state", "ssm_state_size", "state_size", "chunk_size", "mamba_chunk_size", "index_topk"),
            *("attention_head_size", "gated_norm_rank", "mamba_headdim", "query_pre_attn_scalar", "index_block_size"),
        ),
    ),
    (
        8,
        (
            *(
                "rotary_dim",
                "sliding_window",
                "attention_chunk_size",
                "local_attention",
                "window_size",
                "mamba_dt_rank",
            ),
            *("attention_window_size", "sliding_window_size", "keep_window_size", "time_step_rank", "floor_scale"),
            *("log_scaling_n_floor", "rel_extent", "block_size", "local_attention_window_len"),
        ),
    ),
    (32, ("q_lora_rank", "qk_head_dim", "original_max_position_embeddings")),
    (
        LENGTH,
        (
            *(
                "max_position_embeddings",
                "n_positions",
                "max_seq_len",
                "n_ctx",
                "max_target_positions",
                "context_length",
            ),
            *("model_max_length", "max_source_positions"),
        ),
    ),
)
SIZE_OF = {name: size for size, names in SIZES for name in names}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")

MLA: dict[str, Any] = {"num_key_value_heads": 4}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_ssm": 128}

INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
DOTS3 = {
    **MLA,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TEXT_MLA = {"text_config": MLA}
AXES = {"text_config": {"rope_parameters": PLAIN | {"mrope_section": [2, 3, 3]}}}
HALF_AXES = {"text_config": {"rope_parameters": PLAIN | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}}
UNSHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
HALF = PLAIN | {"partial_rotary_factor": 0.5}

SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"), MLA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "cosmos3_edge"), AXES),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"), HALF_AXES),
    **dict.fromkeys(("kimi_k25", "mistral_large4", "unlimited_ocr"), TEXT_MLA),
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": MAMBA,
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}},
    "deepseek_v2": MLA | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": PLAIN | {"mrope_section": [2, 2, 4]},
            "moe_intermediate_size": [96, 96],
        }
    },
    "exaone4_5": {"text_config": {"model_type": "exaone4_5_text"}},
    "fast_vlm": {"vision_config": {"hidden_size": 64, "image_size": 64}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm5_next": {"text_config": MLA | {"qk_rope_head_dim": 0}},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config": AXES["text_config"] | {"head_dim": 16}},
    "minimax_m3_vl": {"text_config": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}},
    "mistral4": MLA | {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "gemma4_assistant": {"text_config": UNSHARED},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, "intermediate_size": [96] * LAYERS}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [96] * LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_mm_model": {"vision_config": {"n_layers": 6}},
    "kosmos-2": {"text_config": {"embed_dim": 64, "layers": LAYERS}},
    "kosmos-2.5": {"text_config": {"embed_dim": 64, "layers": LAYERS}},
    "kyutai_speech_to_text": {
        "codec_config": {"upsample_groups": 64},
        "audio_pad_token_id": 100,
        "num_codebooks": 2,
        "codebook_vocab_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {"rope_parameters": {"full_attention": HALF, "sliding_attention": HALF}},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": {"head_dim": 16},
    "ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
    "nemo_speechlm": {"word_timestamp_config": {"blank_token_id": 127}},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "olmo": {"clip_qkv": 0.5},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "phimoe": {"sliding_window": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * LAYERS},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "qwen2_5_omni": {"thinker_config": AXES},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type's tiny config needs beside the sizes."""


def tiny_config(model_type: str, **more: Any) -> Any:
    """Of a few layers, one or two of each kind that the type has."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_shrunk(cls, SPECIAL.get(model_type, {}) | more))


def _shrunk(cls: Any, special: dict[str, Any]) -> dict[str, Any]:
    own = cls()
    options: dict[str, Any] = {}
    for name, value in own.to_dict().items():
        if name in TOKENS and value is not None:
            options[name] = TOKENS.index(name) % 3
        elif name in SIZE_OF and value is not None and not isinstance(value, bool):
            options[name] = [SIZE_OF[name]] * LAYERS if isinstance(value, list) else SIZE_OF[name]
        elif isinstance(value, list) and len(value) >= LAYERS and name.endswith(("layer_types", "block_type", "types")):
            kinds = sorted(set(value), key=value.index)
            options[name] = [kinds[place % len(kinds)] for place in range(LAYERS)]
        elif name in own.sub_configs and value is not None:
            options[name] = _shrunk(type(getattr(own, name)), special.get(name, {}))
    return options | {name: value for name, value in special.items() if name not in own.sub_configs}


MOST_PARAMETERS = 60_000_000


OTHER_SENSES = ("pixel_values", "input_features", "flattened_patches", "[Bb]box", "encoder_outputs", "'state'")
"""In errors of models whose forward takes more than tokens."""


class NoTinyModel(Exception):
    """A type of which no tiny model can be made, or whose own forward does not run on a prompt of tokens."""


def tiny_of_type(model_type: str, **more: Any) -> Any:
    """A random causal LM in fp32; `more` goes into its config.

    Not one that asks for something beside tokens: what refuses it is to say so.
    """
    try:
        config = thinking_part(tiny_config(model_type, **more))
        with torch.device("meta"), without_timm():
            sketch = class_for(config).from_config(config)
        drop_other_senses(sketch)
        if sum(parameter.numel() for parameter in sketch.parameters()) > MOST_PARAMETERS:
            raise NoTinyModel("its config has no small sizes")
        with torch.random.fork_rng(), without_timm():
            torch.manual_seed(0)
            model = class_for(config).from_config(config, attn_implementation="eager", dtype=torch.float32)
            drop_other_senses(model)
            randomize(model.eval())
        with torch.inference_mode():
            model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    except NoTinyModel:
        raise
    except (TypeError, ValueError) as error:
        if not re.search("|".join(OTHER_SENSES), str(error)):
            raise NoTinyModel(_first_line(error)) from error
    except Exception as error:  # whatever a config or a forward of transformers raises
        raise NoTinyModel(_first_line(error)) from error
    return model


def _first_line(error: Exception) -> str:
    if needed := re.search(r"requires the (\S+) library|No module named '(\S+)'", str(error)):
        return f"transformers needs the package {needed[1] or needed[2]} for it"
    if "Unrecognized configuration class" in str(error):
        return "no language model of transformers takes its config"
    return (str(error).strip().splitlines() or [repr(error)])[0]
