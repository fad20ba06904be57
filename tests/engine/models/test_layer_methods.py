"""Layers with methods of their own, against a forward in fp64 written from the formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from prerope.rope.model import resolve_model
from prerope.rope.reading import MethodError
from prerope.rope.spec import RopeSpec, parse_layers
from prerope.server.errors import ConfigurationError
from prerope.server.models.model import Model
from torch import Tensor

from tests.engine.tiny_models import greedy, prompt_of, request, run, tiny, tiny_engine, tokens_of

TRAINED, WINDOW, LENGTH = 64, 16, 200
LAYERS = f"1+3=dynamic_rerope:window={WINDOW},2=leaky_rerope:window={WINDOW}:leak=4"
Distance = Callable[[Tensor, Tensor], Tensor]


def rope(_row: Tensor, d: Tensor) -> Tensor:
    return d


def dynamic_rerope(row: Tensor, d: Tensor) -> Tensor:
    n = 256  # of rows past twice the trained length
    farthest = WINDOW + (TRAINED - WINDOW) * (n - 2 * TRAINED) / (3 * TRAINED)
    beyond = WINDOW + (d - WINDOW) * (farthest - WINDOW) / (n - WINDOW)
    far = torch.where(row < 2 * TRAINED, WINDOW, beyond)
    return torch.where((row < TRAINED) | (d < WINDOW), d, far)


def leaky(_row: Tensor, d: Tensor) -> Tensor:
    return torch.where(d < WINDOW, d, WINDOW + (d - WINDOW) / 4)


def dynamic_leaky(row: Tensor, d: Tensor) -> Tensor:
    n = torch.where(row < TRAINED, TRAINED, 256 * (row // 256 + 1))
    k = ((n - WINDOW) / (TRAINED - WINDOW)).clamp(min=1)
    return torch.where(d < WINDOW, d, WINDOW + (d - WINDOW) / k)


def forward(model: Any, tokens: list[int], distances: Mapping[int, Distance]) -> Tensor:
    """Log-probabilities [T, V] of a tiny llama, layer n of which sees keys at `distances[n]`, in fp64."""
    decoder = model.model
    hidden = decoder.embed_tokens.weight[torch.tensor(tokens)]
    for number, layer in enumerate(decoder.layers):
        x = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn.o_proj(attend(layer.self_attn, x, distances[number]))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return torch.log_softmax(model.lm_head(decoder.norm(hidden)), dim=-1)


def attend(attention: Any, x: Tensor, distance: Distance) -> Tensor:
    rows = torch.arange(len(x), dtype=torch.float64)
    seen = distance(rows[:, None], rows[:, None] - rows[None, :])
    angles = seen[..., None] * 10000.0 ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
    q = attention.q_proj(x).view(len(x), 4, 2, 8)
    k, v = (project(x).view(len(x), 2, 16).repeat_interleave(2, 1) for project in (attention.k_proj, attention.v_proj))
    k = k.view(len(x), 4, 2, 8)
    along = torch.einsum("ihcp,jhcp->hijp", q, k)
    across = torch.einsum("ihp,jhp->hijp", q[:, :, 0], k[:, :, 1]) - torch.einsum(
        "ihp,jhp->hijp", q[:, :, 1], k[:, :, 0]
    )
    scores = (along * angles.cos() + across * angles.sin()).sum(-1) / 4
    scores = scores.masked_fill(rows[None, :] > rows[:, None], -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(len(x), -1)


def llama() -> Any:
    return tiny("llama", max_position_embeddings=TRAINED)


@pytest.mark.parametrize(
    ("layers", "distances"),
    [
        ("", [rope] * 4),
        (LAYERS, [dynamic_leaky, dynamic_rerope, leaky, dynamic_rerope]),
    ],
    ids=["none", "some"],
)
@torch.no_grad()
def test_each_layer_reads_by_its_own_method(layers: str, distances: list[Distance]) -> None:
    spec = RopeSpec(method="auto", window=WINDOW) if layers else RopeSpec(method="rope")
    engine = tiny_engine(Model(llama(), layer_methods=parse_layers(layers)), spec, max_batched_tokens=37)
    prompt = prompt_of(LENGTH)
    outputs = run(engine, [request("one", prompt, greedy(1, prompt_logprobs=0))])["one"]
    scored = [entry.logprob for entry in outputs[-1].prompt_logprobs or [] if entry is not None]
    expected = forward(llama().double().cpu(), prompt, dict(enumerate(distances)))
    wanted = expected[torch.arange(LENGTH - 1), torch.tensor(prompt[1:])]
    torch.testing.assert_close(torch.tensor(scored, dtype=torch.float64), wanted, atol=2e-5, rtol=0)
    engine.check_integrity()


def test_a_request_that_names_a_method_is_read_by_it_in_all_layers() -> None:
    prompt = prompt_of(LENGTH)
    replies = []
    for layers in (LAYERS, ""):
        engine = tiny_engine(Model(llama(), layer_methods=parse_layers(layers)), RopeSpec())
        positions = resolve_model(RopeSpec(method="yarn"), engine.model.rotaries, 256)
        assert "layers" not in positions.described
        replies.append(tokens_of(run(engine, [request("one", prompt, greedy(12), positions)])["one"]))
    assert replies[0] == replies[1]


def test_only_what_is_read_otherwise_has_another_digest() -> None:
    """Blocks and their files serve all that give equal K and V, whatever the layers are called."""
    plain, one, two = (
        Model(llama(), layer_methods=parse_layers(text)).rotaries
        for text in ("", "1=rerope", "1=dynamic_rerope,2=yarn")
    )
    digests = [resolve_model(RopeSpec(method="rope"), rotaries, 256).digest for rotaries in (plain, one, two)]
    assert len(set(digests)) == 1
    autos = [resolve_model(RopeSpec(), rotaries, 256) for rotaries in (plain, one, two)]
    assert len({auto.digest for auto in autos}) == 3
    assert autos[0].plain_digest == autos[1].plain_digest != autos[2].plain_digest
    assert autos[0].plain_rows == TRAINED


def test_a_value_that_a_layers_method_cannot_have_names_the_layers() -> None:
    model = Model(llama(), layer_methods=parse_layers("1-2=rerope:window=64"))
    with pytest.raises(MethodError, match=r"layers 1-2 \(ROPE_LAYERS\): window"):
        resolve_model(RopeSpec(), model.rotaries, 256)


def test_what_auto_is_in_which_layers_is_said() -> None:
    model = Model(llama(), layer_methods=parse_layers(LAYERS))
    described = resolve_model(RopeSpec(), model.rotaries, 256).described
    assert described["method"] == "dynamic_leaky"
    assert described["layers"] == {
        "1+3": {"method": "dynamic_rerope", "window": WINDOW},
        "2": {"method": "leaky_rerope", "window": WINDOW, "leak": 4.0},
    }


@pytest.mark.parametrize(
    ("family", "layers", "reason"),
    [
        ("llama", "2-4", "layer 4 is none of this model's 4 attention layers, which are counted from 0"),
        ("gemma3_text", "0", "layer 0 is of the group 'sliding_attention', which keeps the model's own method"),
        ("llama", "0-1=rope,2-3", "ROPE_LAYERS names all layers that rotate keys"),
        ("smollm3", "1", "layer 1 does not rotate keys"),
    ],
)
def test_layers_that_cannot_have_a_method_of_their_own_are_refused(family: str, layers: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Model(tiny(family), layer_methods=parse_layers(f"{layers}=rerope"))
