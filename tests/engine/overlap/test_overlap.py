"""Steps that overlap: launched before the tokens of the one before them are known, and nobody sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prerope.cache.blocks.manager import PrefixHasher
from prerope.server.engine import step
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import FinishReason, TokenOutput
from prerope.server.engine.sampling import device as device_sampler
from prerope.server.engine.sequence import SamplingParams
from prerope.server.engine.step import Arrival, Step
from prerope.server.models import model as model_module
from prerope.server.models.model import Batch, Model
from prerope.server.ranks.group import ALONE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.scripted_model import BLOCK, EOS, MAX_MODEL_LEN, VOCABULARY, expected, random_prompt, scripted_engine
from tests.engine.test_storm import Storm, check_storm
from tests.engine.tiny_models import (
    assert_idle,
    generate,
    greedy,
    prompt_of,
    request,
    run,
    tiny,
    tiny_engine,
    tokens_of,
)

# --- the order of things ----------------------------------------------------------------------------------------------


def order(engine: Engine, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When steps are launched and their tokens read, for one request."""
    seen: list[str] = []
    arrivals: list[Arrival] = []
    launch, wait = engine._launch, Arrival.wait

    def launching(*arguments: Any) -> Step:
        step = launch(*arguments)
        seen.append(f"launch {len(arrivals)}")
        arrivals.append(step.arrival)
        return step

    def waiting(arrival: Arrival) -> list[int]:
        seen.append(f"read {arrivals.index(arrival)}")
        return wait(arrival)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_launch", launching)
        patched.setattr(Arrival, "wait", waiting)
        run(engine, [request("0", random_prompt(6), sampling)])
    return seen


IN_TURN = ["launch 0", "read 0", "launch 1", "read 1", "launch 2", "read 2"]
OVERLAPPED = ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]


@pytest.mark.parametrize(
    ("sampling", "seen"),
    [
        ({}, OVERLAPPED),
        ({"temperature": 1.0, "seed": 1, "top_p": 0.9}, OVERLAPPED),
        ({"logprobs": 0}, IN_TURN),
        ({"prompt_logprobs": 0}, IN_TURN),
        ({"repetition_penalty": 1.2}, IN_TURN),
        ({"presence_penalty": 0.1}, IN_TURN),
        ({"logit_bias": {5: 1.0}}, IN_TURN),
        ({"min_tokens": 3}, IN_TURN),
        ({"min_tokens": 1}, ["launch 0", "read 0", "launch 1", "launch 2", "read 1", "read 2"]),
    ],
)
def test_the_next_step_is_launched_before_tokens_are_read(
    sampling: dict[str, Any], seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody's next token takes more than its logits. The last token is known to be the last."""
    assert order(scripted_engine(overlap=True), greedy(3, **sampling), monkeypatch) == seen
    assert order(scripted_engine(overlap=False), greedy(3, **sampling), monkeypatch) == IN_TURN
    assert order(scripted_engine(), greedy(3, **sampling), monkeypatch) == IN_TURN, "on the CPU by default"


class Unread(TorchDispatchMode):
    """The device is `meta`, whose tensors have no values to read. Nothing reaches it but through `send`."""

    sending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        out = func(*args, **(kwargs or {}))
        reached = [leaf for leaf in (*tensors, *tree_leaves(out)) if isinstance(leaf, torch.Tensor)]
        kinds = {leaf.device.type for leaf in reached if leaf.dim()}
        assert self.sending or kinds != {"cpu", "meta"}, f"{func} copies from host to device"
        return out


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7, "seed": 1}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5}]
)
def test_a_launch_never_waits_for_the_device(sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plan to the sampled tokens, prefill chunks and decodes, with a token of the step before pending."""
    engine, unread = on_meta(monkeypatch)
    monkeypatch.setattr(Arrival, "wait", lambda arrival: [3] * len(arrival.tokens))
    with unread:
        outputs = run(engine, [request(str(i), random_prompt(5 * i + 1), greedy(4, **sampling)) for i in range(3)])
    assert [tokens_of(one) for one in outputs.values()] == [[3] * 4] * 3


def test_rows_are_chosen_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that sample among those that are scored, or are chosen on the host: places are sent."""
    _, unread = on_meta(monkeypatch)
    logits = torch.zeros(4, VOCABULARY, device="meta")
    with unread:
        assert step.rows_of(logits, [0, 2]).shape == (2, VOCABULARY)


def test_what_would_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, unread = on_meta(monkeypatch)
    engine.add(request("0", random_prompt(5), greedy(4)))
    with unread:
        assert engine.step() == []
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            engine.step()
    for biased in ({"logprobs": 1}, {"logit_bias": {3: 1.0}}):
        engine, unread = on_meta(monkeypatch)
        engine.add(request("0", random_prompt(5), greedy(4, **biased)))
        with unread, pytest.raises((NotImplementedError, RuntimeError, AssertionError), match=r"meta|copies from host"):
            engine.step()


def on_meta(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Unread]:
    class MetaModel:
        layers: tuple[()] = ()
        states: tuple[()] = ()
        raw = SimpleNamespace(ranks=ALONE)
        device = torch.device("meta")
        dtype = torch.float32
        vocab_size = VOCABULARY
        eos_token_ids = frozenset({EOS})

        def forward(self, batch: Batch, _: Any) -> torch.Tensor:
            assert batch.input_ids.device.type == "meta"
            return torch.zeros(VOCABULARY, VOCABULARY, device="meta")[batch.input_ids[batch.logit_rows]]

    unread = Unread()
    for module in (model_module, device_sampler, step):
        send = module.send

        def sending(*arguments: Any, send: Callable[..., torch.Tensor] = send) -> torch.Tensor:
            unread.sending = True
            sent = send(*arguments)
            unread.sending = False
            return sent

        monkeypatch.setattr(module, "send", sending)
    return scripted_engine(model=MetaModel(), overlap=True, max_batched_tokens=8, max_num_seqs=8), unread


# --- the same outputs -------------------------------------------------------------------------------------------------


def test_greedy_outputs_are_those_of_transformers(model: Model) -> None:
    stock = tiny("llama", max_position_embeddings=64)
    prompts = [prompt_of(length, seed=length) for length in (1, 5, 17, 30)]
    engine = tiny_engine(model, overlap=True, max_batched_tokens=16, max_num_seqs=8)
    outputs = generate(engine, prompts, greedy(20))
    for ids, output in zip(prompts, outputs, strict=True):
        own = stock.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert output == own[0, len(ids) :].tolist()
    assert_idle(engine)


MIXED: list[dict[str, Any]] = [
    {},
    {"seed": 3, "temperature": 0.8},
    {"seed": 4, "temperature": 1.3, "top_p": 0.8, "top_k": 20},
    {"seed": 5, "temperature": 1.0, "min_p": 0.05},
    {"seed": 6, "temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"seed": 7, "temperature": 0.9, "logprobs": 3},
    {"logit_bias": {9: 4.0}},
    {"seed": 8, "temperature": 1.0, "min_tokens": 6, "ignore_eos": False},
    {"prompt_logprobs": 2},
]


def test_every_output_is_the_same(model: Model) -> None:
    """Requests that overlap beside those that do not, in one batch after the other; twice, the second time cached."""
    requests = [
        request(f"{number} {i}", prompt_of(10 + 7 * i, seed=i), greedy(12, **sampling), report_progress=True)
        for number in range(2)
        for i, sampling in enumerate(MIXED)
    ]
    found = []
    for overlap in (False, True):
        engine = tiny_engine(model, overlap=overlap, max_batched_tokens=24, max_num_seqs=6)
        outputs = run(engine, requests[: len(MIXED)]) | run(engine, requests[len(MIXED) :])
        found.append(outputs)
        assert_idle(engine)
    plain, overlapped = found
    for name, outputs in plain.items():
        assert tokens_of(overlapped[name]) == tokens_of(outputs), name
        assert told(overlapped[name]) == told(outputs), name


def told(outputs: list[TokenOutput]) -> list[tuple[Any, ...]]:
    """All that a caller sees but times; log-probabilities by their tokens. How a prefill was cut may differ."""
    return [
        (
            one.token_ids,
            one.num_cached_tokens,
            one.num_processed_tokens,
            one.finish_reason,
            one.logprobs and [[token for token, _ in scored.top] for scored in one.logprobs],
            one.prompt_logprobs and len(one.prompt_logprobs),
        )
        for one in outputs
        if one.token_ids
    ]


def test_a_storm(model: Model) -> None:
    check_storm(Storm(model, 0, overlap=True))


@pytest.mark.parametrize("max_tokens", [1, 2, MAX_MODEL_LEN - 6])
def test_lengths(max_tokens: int) -> None:
    """One token, whose step has no step after it, and up to the longest that the model takes."""
    engine = scripted_engine(overlap=True)
    one = request("0", random_prompt(6), greedy(max_tokens))
    outputs = run(engine, [one])["0"]
    assert [output.token_ids for output in outputs] == [(token,) for token in expected(one)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().num_steps == max_tokens, "no step is launched past the end"
    assert_idle(engine)


def test_a_stop_token_drops_what_was_launched_after_it() -> None:
    engine = scripted_engine(overlap=True)
    whole = expected(request("0", random_prompt(6), greedy(30)))
    stop = next(token for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
    outputs = run(engine, [request("0", random_prompt(6), greedy(30, stop_token_ids=frozenset({stop})))])["0"]
    assert tokens_of(outputs) == whole[: whole.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    stats = engine.stats()
    assert stats.generation_tokens == len(outputs)
    assert stats.num_steps == len(outputs) + 1, "the step after the stop token was launched already"
    assert_idle(engine)


def cached_after(*, overlap: bool) -> int:
    """Tokens that a second turn finds of the first."""
    engine = scripted_engine(overlap=overlap)
    first = request("0", random_prompt(6), greedy(30))
    answer = tokens_of(run(engine, [first])["0"])
    turn = request("1", [*random_prompt(6), *answer, 3, 4, 5], greedy(5))
    outputs = run(engine, [turn])["1"]
    assert tokens_of(outputs) == expected(turn)
    return outputs[0].num_cached_tokens


def test_output_becomes_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are known by their tokens, none of which is pending; hashed too early, they would not be found."""
    known = (6 + 30 - 1) // BLOCK * BLOCK
    assert cached_after(overlap=False) == cached_after(overlap=True) == known
    extend = PrefixHasher.extend
    monkeypatch.setattr(PrefixHasher, "extend", lambda self, token_ids, *_: extend(self, token_ids))
    assert cached_after(overlap=True) < known
