"""Attention modules of 2021 to 2023 that attend in code of their own: the same, through the attention interface.

Each function here is the forward of one class up to where it multiplies queries and keys, from the module's own parts,
and hands these over raw. The probe holds it to the original, like any other forward that is replaced. Two of them read
cos and sin from a table of their own; the model then gets a rotary embedding that reads it.

A bias by distance (ALiBi) is a number a head, its slope: taken from the tensor that transformers makes for two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from prerope.rope.rotation import Table, rotate
from prerope.server.models.attention.interface import raw_attention
from torch import Tensor, nn

Forward = Callable[..., Any]


def adapt(model: Any) -> Iterator[tuple[nn.Module, Forward]]:
    """(attention module, a forward that attends through the interface) for every module of these classes.

    Where these look positions up in a table, `model` gets a rotary embedding, and its config the words for it. Falcon's
    own eager forward counts its bias twice, in the scores and in the mask; its other one, which is the default, once.
    """
    base = model.base_model
    if getattr(base, "use_alibi", False):
        model.config._attn_implementation = "sdpa"
    for module in list(model.modules()):
        forward = FORWARDS.get(type(module).__name__)
        if forward is None:
            continue
        if hasattr(module, "embed_positions") and not hasattr(base, "rotary_emb"):
            base.rotary_emb = TableRotaryEmbedding(module.embed_positions)
            model.config.rope_parameters = {"rope_type": "default", "rope_theta": TABLE_BASE}
        yield module, partial(forward, module, base)


TABLE_BASE = 10000.0


class TableRotaryEmbedding(nn.Module):
    """sin|cos [positions, D] as GPT-J keeps them → cos and sin, each [1, T, D/2]; `num_positions` are known."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.num_positions = nn.Buffer(rows, persistent=False), len(rows)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        sin, cos = self.rows[position_ids.to(self.rows.device)].to(x.device).chunk(2, dim=-1)
        return cos, sin


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **more: Any) -> Tensor:
    """query, key, value [1, T, heads, D] → what all heads give, side by side: [1, T, Hq·D]."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    rows, _ = raw_attention(module, query, key, value, None, scaling=scale, **more)
    return rows.flatten(2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """x [1, T, heads, D] by cos and sin [1, T or 1, D/2]."""
    return rotate(x[0], Table(cos[0].float(), sin[0].float()), interleaved=interleaved)[None]


def _halves(cos_and_sin: tuple[Tensor, Tensor]) -> list[Tensor]:
    """cos and sin without their second halves, which repeat the first."""
    return [part[..., : part.shape[-1] // 2] for part in cos_and_sin]


@lru_cache(maxsize=64)
def _slopes(family: str, num_heads: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """[Hq] fp32, made once for all layers: by how much the family's own bias, of two tokens, grows from key to key."""
    code = import_module(f"transformers.models.{family}.modeling_{family}")  # here: no other model needs it
    if family == "mpt":
        two = code.build_mpt_alibi_tensor(num_heads, 2, device=device)
    else:
        two = code.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long, device=device), num_heads, torch.float32)
    slopes: Tensor = (two[:, 0, 1] - two[:, 0, 0]).float() * scale
    return slopes


def bloom(
    module: Any, _base: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **_more: Any
) -> tuple[Tensor, None]:
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    slopes = _slopes("bloom", module.num_heads, fused.device)
    query, key, value = fused.unbind(-2)
    rows = _attend(module, query, key, value, module.inv_norm_factor, slopes=slopes)
    return residual + module.dense(rows), None


def mpt(module: Any, _base: Any, hidden_states: Tensor, *_: Any, **_more: Any) -> tuple[Tensor, None]:
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, value = fused.unflatten(-1, (3, module.n_heads, module.head_dim)).unbind(-3)
    slopes = _slopes("mpt", module.n_heads, fused.device)
    return module.out_proj(_attend(module, query, key, value, module.softmax_scale, slopes=slopes)), None


def falcon(
    module: Any,
    base: Any,
    hidden_states: Tensor,
    *_: Any,
    position_embeddings: tuple[Tensor, Tensor],
    **_more: Any,
) -> tuple[Tensor, None]:
    """Its query heads follow one another by KV head, each group with its key and value behind it."""
    fused, heads = module.query_key_value(hidden_states), module.num_heads
    kv_heads = module.num_kv_heads if module.new_decoder_architecture or module.multi_query else heads
    fused = fused.unflatten(-1, (kv_heads, heads // kv_heads + 2, module.head_dim))
    query, key, value = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    slopes = None
    if base.use_alibi:
        slopes = _slopes("falcon", heads, fused.device, module.inv_norm_factor)
    else:
        cos, sin = _halves(position_embeddings)
        query, key = (_turned(part, cos, sin, interleaved=False) for part in (query, key))
    return module.dense(_attend(module, query, key, value, module.inv_norm_factor, slopes=slopes)), None


def gpt_neo(module: Any, _base: Any, hidden_states: Tensor, *_: Any, **_more: Any) -> tuple[Tensor, None]:
    """Its scores are not scaled; every other layer reads a window."""
    parts = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (part(hidden_states).unflatten(-1, (-1, module.head_dim)) for part in parts)
    window = module.config.window_size if module.attention_type == "local" else None
    return module.out_proj(_attend(module, query, key, value, 1.0, sliding_window=window)), None


def gptj(
    module: Any, base: Any, hidden_states: Tensor, *_: Any, position_ids: Tensor, **_more: Any
) -> tuple[Tensor, None]:
    parts = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (part(hidden_states).unflatten(-1, (-1, module.head_dim)) for part in parts)
    cos, sin = base.rotary_emb(hidden_states, position_ids)
    query, key = (_turned(part, cos, sin, interleaved=True) for part in (query, key))
    return module.out_proj(_attend(module, query, key, value, module.scale_attn**-1)), None


SHARES = 4
"""What CodeGen's fused projection was cut into for as many devices: queries, values and keys of some heads each."""


def codegen(
    module: Any, base: Any, hidden_states: Tensor, *_: Any, position_ids: Tensor, **_more: Any
) -> tuple[Tensor, None]:
    fused = module.qkv_proj(hidden_states).unflatten(-1, (SHARES, 3, -1, module.head_dim))
    query, value, key = (part.flatten(2, 3) for part in fused.unbind(-3))
    cos, sin = base.rotary_emb(hidden_states, position_ids)
    query, key = (_turned(part, cos, sin, interleaved=True) for part in (query, key))
    return module.out_proj(_attend(module, query, key, value, module.scale_attn**-1)), None


def gpt_neox_japanese(
    module: Any,
    _base: Any,
    hidden_states: Tensor,
    *_: Any,
    position_embeddings: tuple[Tensor, Tensor],
    **_more: Any,
) -> tuple[Tensor, None, Any]:
    fused = module.query_key_value(hidden_states).unflatten(-1, (-1, 3, module.head_size))
    query, key, value = fused.unbind(-2)
    cos, sin = _halves(position_embeddings)
    query, key = (_turned(part, cos, sin, interleaved=False) for part in (query, key))
    return module.dense(_attend(module, query, key, value, module.norm_factor**-1)), None, module.dense_bias


def xglm(module: Any, _base: Any, hidden_states: Tensor, *_: Any, **_more: Any) -> tuple[Tensor, None]:
    parts = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (part(hidden_states).unflatten(-1, (-1, module.head_dim)) for part in parts)
    return module.out_proj(_attend(module, query, key, value, module.scaling)), None


FORWARDS: dict[str, Forward] = {
    "BloomAttention": bloom,
    "CodeGenAttention": codegen,
    "FalconAttention": falcon,
    "GPTJAttention": gptj,
    "GPTNeoSelfAttention": gpt_neo,
    "GPTNeoXJapaneseAttention": gpt_neox_japanese,
    "MptAttention": mpt,
    "XGLMAttention": xglm,
}
"""By the name of the class in transformers."""
