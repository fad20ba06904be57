"""Documents against the reference, for every method that needs no factors of a config: `cache.attention.reference`
over raw keys that are put where a document stands. Lengths, orders, block and chunk sizes are random, and histories
have twins, aborts and preemptions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from prerope.cache.attention.reference import attend_sequence
from prerope.cache.attention.types import AttentionOptions, SequenceRows
from prerope.cache.blocks.documents import DocumentSpan
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.spec import METHOD_NAMES, RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.sequence import EngineRequest
from prerope.server.models.model import Model

from tests.engine.tiny_models import assert_idle, greedy, prompt_of, request, tiny, tiny_engine, tokens_of
from tests.tiers import every

NEW, MAX_MODEL_LEN, LONGEST = 4, 2048, 300
METHODS = [name for name in METHOD_NAMES if name not in ("longrope", "llama3", "proportional", "auto", "model")]
Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Raw keys and values of each layer, [n, Hkv, D]."""


class Reference:
    """A Llama whose attention is the specification's."""

    def __init__(self, stock: Any, positions: ModelPositions) -> None:
        self.stock, self.positions = stock, positions
        dim = stock.config.head_dim
        self.options = AttentionOptions(scale=dim**-0.5, group=next(iter(positions.methods)))
        self.empty: Layers = [(torch.empty(0, 2, dim), torch.empty(0, 2, dim)) for _ in stock.model.layers]

    @torch.no_grad()
    def read(self, ids: list[int], before: Layers) -> tuple[torch.Tensor, Layers]:
        """Logits of the last token, and K and V with those of these tokens."""
        start, count, after = len(before[0][0]), len(ids), []
        rows = SequenceRows(0, count, start, torch.empty(0, dtype=torch.int64), self.positions)
        hidden = self.stock.model.embed_tokens(torch.tensor(ids))
        for layer, (keys, values) in zip(self.stock.model.layers, before, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (one(normed).view(count, -1, attention.head_dim) for one in projections)
            keys, values = torch.cat([keys, key]), torch.cat([values, value])
            after.append((keys, values))
            read = attend_sequence(query, keys, values, rows, self.options)
            hidden = hidden + attention.o_proj(read.flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.stock.lm_head(self.stock.model.norm(hidden[-1:]))[0], after

    def reply(self, prompt: Prompt) -> tuple[list[int], list[float]]:
        _, layers = self.read(prompt.prefix, self.empty)
        for document in prompt.documents:
            if prompt.reread:
                _, layers = self.read(document[: prompt.reread], layers)
            _, own = self.read(prompt.prefix + document, self.empty)
            first = len(prompt.prefix) + prompt.reread
            layers = [
                (torch.cat([keys, more_keys[first:]]), torch.cat([values, more_values[first:]]))
                for (keys, values), (more_keys, more_values) in zip(layers, own, strict=True)
            ]
        tokens, scores = list[int](), list[float]()
        logits, layers = self.read(prompt.question, layers)
        for _ in range(NEW):
            tokens.append(int(logits.argmax()))
            scores.append(logits.log_softmax(-1).max().item())
            logits, layers = self.read(tokens[-1:], layers)
        return tokens, scores


class Prompt:
    def __init__(self, dice: random.Random, shelf: list[list[int]]) -> None:
        self.prefix, self.question = prompt_of(21, seed=1), prompt_of(dice.randint(1, 30), seed=dice.randint(0, 99))
        self.documents = dice.sample(shelf, dice.randint(1, len(shelf)))
        self.reread = dice.choice([0, 1, 16, 70])

    def asked(self, name: str, **options: Any) -> EngineRequest:
        ids, spans = list(self.prefix), list[DocumentSpan]()
        for document in self.documents:
            spans.append(DocumentSpan(len(ids), len(ids) + len(document), self.reread))
            ids += document
        return request(name, [*ids, *self.question], greedy(NEW, logprobs=0), documents=tuple(spans), **options)


def history(engine: Engine, dice: random.Random, requests: list[EngineRequest]) -> dict[str, list[TokenOutput]]:
    """Add them at random moments, preempt and abort some; what each has said. Integrity is checked after each step."""
    outputs: dict[str, list[TokenOutput]] = {}
    scheduler, num_preempted = engine.scheduler, 0
    waiting = list(requests)
    while waiting or engine.has_work():
        if waiting and (not engine.has_work() or dice.random() < 0.5):
            one = waiting.pop()
            outputs[one.request_id] = []
            engine.add(one)
        if outputs and dice.random() < 0.05:
            engine.abort(dice.choice(list(outputs)))
        if scheduler.running and num_preempted < 3 and (not num_preempted or dice.random() < 0.2):
            scheduler.preempt(dice.choice(list(scheduler.running.values())))
            num_preempted += 1
        for name, output in engine.step():
            outputs[name].append(output)
        engine.check_integrity()
    assert scheduler.num_preemptions >= 1
    return outputs


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny("llama", max_position_embeddings=64)


@pytest.mark.parametrize("method", every(2, METHODS, quick=4))
def test_random_histories_say_what_the_reference_says(stock: Any, model: Model, method: str) -> None:
    dice = random.Random(f"histories of {method}")
    spec = RopeSpec(method=method, train_length=64)
    reference = Reference(stock, resolve_model(spec, model.rotaries, MAX_MODEL_LEN))
    shelf = [prompt_of(dice.choice([1, dice.randint(1, 40), dice.randint(1, LONGEST)]), seed=n) for n in range(4)]
    prompts = [Prompt(dice, shelf) for _ in range(2)]
    expected = [reference.reply(prompt) for prompt in prompts]
    longest = max(len(prompt.asked("").prompt_token_ids) for prompt in prompts) + NEW
    block_size = dice.choice([8, 16, 32])
    # Room for the longest prompt and its longest document, and hardly more: what others have read is pushed out.
    engine = tiny_engine(
        model,
        spec,
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        num_blocks=(longest + LONGEST + 64) // block_size + 6,
        max_batched_tokens=dice.choice([7, 50, 512]),
        max_num_seqs=6,
    )
    asked = [(n, f"{n} {twin}") for n in range(len(prompts)) for twin in range(3)]
    outputs = history(engine, dice, [prompts[n].asked(name) for n, name in asked])
    num_finished = 0
    for n, name in asked:
        tokens, scores = expected[n]
        said = tokens_of(outputs[name])
        found = [entry.logprob for output in outputs[name] for entry in output.logprobs or ()]
        num_finished += len(said) == NEW
        assert said == tokens[: len(said)], f"{method}, blocks of {block_size}"
        assert found == pytest.approx(scores[: len(said)], abs=1e-4)
    assert_idle(engine)
    assert num_finished >= 2
