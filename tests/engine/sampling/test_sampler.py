"""The sampler's distributions against transformers' processors and warpers, its seeds, and its log-probabilities."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from prerope.cache.blocks.manager import PrefixHasher
from prerope.rope.frequencies import Rotary
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.engine.sampling.host import BANNED, NUCLEUS_CANDIDATES, adjust, draw, logprobs, sample
from prerope.server.engine.sequence import EngineRequest, SamplingParams, Sequence
from prerope.server.models.model import Model
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.engine.tiny_models import generate, prompt_of, request, run, tiny, tiny_engine, tokens_of

POSITIONS = resolve_model(RopeSpec(method="rope"), {"": Rotary(16, 16, 1e4, "default", 64, 64)}, None)
EOS = frozenset({2})
GRID = 500


def sequence(sampling: SamplingParams, prompt: list[int], output: list[int] | None = None) -> Sequence:
    generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
    one = Sequence(
        request=EngineRequest("0", prompt, sampling),
        positions=POSITIONS,
        hasher=PrefixHasher(16, POSITIONS, ""),
        generator=generator,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
    )
    for token in output or []:
        one.append(token)
    return one


def random_logits(size: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def frequencies(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """How often each token is drawn when the uniform number runs evenly through [0, 1): its probability, to 1/GRID."""
    counts = torch.zeros(logits.shape[0], dtype=torch.float64)
    with patch("prerope.server.engine.sampling.host.torch.rand") as rand:
        for point in (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID:
            rand.return_value = point
            counts[draw(logits, sampling, None)] += 1
    return counts / GRID


def warped(logits: Tensor, warpers: list[LogitsProcessor], ids: list[int] | None = None) -> Tensor:
    """Probabilities [V] after transformers' processors."""
    rows = LogitsProcessorList(warpers)(torch.tensor([ids or [0]]), logits[None].clone())
    return rows[0].double().softmax(-1)


def assert_same_distribution(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1.01 / GRID
    assert not actual[expected == 0].any(), "a token was drawn that must not be"
    assert actual[expected > 2 / GRID].all(), "a token was never drawn that must be"


CASES: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "hot": ({"temperature": 2.5}, [TemperatureLogitsWarper(2.5)]),
    "top_k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top_k of one": ({"top_k": 1}, [TopKLogitsWarper(1)]),
    "top_k of all": ({"top_k": 1000}, []),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "top_p of next to nothing": ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    "top_p of nearly all": ({"top_p": 0.995}, [TopPLogitsWarper(0.995)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "top_k, top_p": ({"top_k": 12, "top_p": 0.8}, [TopKLogitsWarper(12), TopPLogitsWarper(0.8)]),
    "top_p, min_p": ({"top_p": 0.9, "min_p": 0.2}, [TopPLogitsWarper(0.9), MinPLogitsWarper(0.2)]),
    "all": (
        {"temperature": 1.7, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.85), MinPLogitsWarper(0.05)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_warpers(name: str) -> None:
    options, warpers = CASES[name]
    logits = random_logits(40)
    actual = frequencies(logits, SamplingParams(max_tokens=1, **options))
    assert_same_distribution(actual, warped(logits, warpers))


@pytest.mark.parametrize(("spread", "top_p"), [(4.0, 0.9), (0.2, 0.9), (4.0, 0.5), (0.02, 0.05)])
def test_top_p_over_a_vocabulary_larger_than_its_candidates(spread: float, top_p: float) -> None:
    """Peaked, where the best 512 hold enough, and flat, where the whole vocabulary must be sorted."""
    logits = random_logits(4 * NUCLEUS_CANDIDATES, spread=spread)
    actual = frequencies(logits, SamplingParams(max_tokens=1, top_p=top_p))
    assert_same_distribution(actual, warped(logits, [TopPLogitsWarper(top_p)]))


PROMPT, OUTPUT = [3, 4, 5, 5, 9], [4, 7, 7, 7]


def adjusted(sampling: SamplingParams, output: list[int] | None = None) -> Tensor:
    row = random_logits(20)
    adjust(row, sequence(sampling, PROMPT, OUTPUT if output is None else output), EOS)
    return row


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_over_prompt_and_output(penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), random_logits(20)[None])[0]
    assert torch.equal(adjusted(SamplingParams(max_tokens=9, repetition_penalty=penalty)), expected)


def test_presence_and_frequency_are_over_the_output() -> None:
    """OpenAI: μ − count·α_frequency − (count > 0)·α_presence."""
    expected = random_logits(20)
    expected[4] -= 0.4 + 0.25 * 1
    expected[7] -= 0.4 + 0.25 * 3
    actual = adjusted(SamplingParams(max_tokens=9, presence_penalty=0.4, frequency_penalty=0.25))
    torch.testing.assert_close(actual, expected)
    nothing_yet = adjusted(SamplingParams(max_tokens=9, presence_penalty=0.4, frequency_penalty=0.25), output=[])
    assert torch.equal(nothing_yet, random_logits(20))


def test_penalties_and_bad_words_follow_a_reply_as_it_grows() -> None:
    """What is kept from draw to draw is what would be found anew."""
    bad = ((5,), (3, 4, 6), (6, 6, 1), (7, 2), (39, 99))
    sampling = SamplingParams(max_tokens=99, presence_penalty=0.4, frequency_penalty=0.25, bad_token_ids=bad)
    grown, drawn = sequence(sampling, PROMPT), random.Random(0)
    for _ in range(200):
        anew = sequence(sampling, PROMPT, grown.token_ids[len(PROMPT) :])
        rows = random_logits(40), random_logits(40), random_logits(40)
        adjust(rows[0], grown, EOS)
        adjust(rows[1], anew, EOS)
        assert torch.equal(rows[0], rows[1])
        output = grown.token_ids[len(PROMPT) :]
        for token, count in Counter(output).items():
            rows[2][token] -= 0.4 + 0.25 * count
        endings = [one for one in bad if one[-1] < 40 and tuple(output[len(output) + 1 - len(one) :]) == one[:-1]]
        rows[2][[one[-1] for one in endings if len(output) >= len(one) - 1]] += BANNED
        torch.testing.assert_close(rows[0], rows[2])
        grown.append(drawn.choice([3, 4, 6, 6, 6, 7, 2, drawn.randrange(40)]))


def test_bias_comes_before_the_repetition_penalty() -> None:
    bias = {4: 3.0, 11: -100.0, 0: 1.5}
    processors = [
        SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()}),
        RepetitionPenaltyLogitsProcessor(1.5),
    ]
    expected = LogitsProcessorList(processors)(torch.tensor([PROMPT + OUTPUT]), random_logits(20)[None])[0]
    actual = adjusted(SamplingParams(max_tokens=9, logit_bias=bias, repetition_penalty=1.5))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("min_tokens", [0, 4, 5, 100])
@pytest.mark.parametrize("stop_token_ids", [frozenset(), frozenset({8, 12}), frozenset({8, 5000})])
def test_min_tokens_forbids_every_end(min_tokens: int, stop_token_ids: frozenset[int]) -> None:
    ends = sorted(end for end in stop_token_ids | EOS if end < 20)
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, ends)
    expected = processor(torch.tensor([PROMPT + OUTPUT]), random_logits(20)[None])[0]
    actual = adjusted(SamplingParams(max_tokens=200, min_tokens=min_tokens, stop_token_ids=stop_token_ids))
    assert torch.equal(actual, expected)
    assert torch.isinf(actual).any() == (min_tokens > len(OUTPUT))


def test_lists_of_a_whole_vocabulary_and_long_prompts_cost_a_row_next_to_nothing() -> None:
    """What one request names is no work of every step: 15 ms a list it was, for each row and each draft."""
    size, prompt = 50_000, list(range(20_000))
    everything = SamplingParams(
        max_tokens=99,
        min_tokens=99,
        repetition_penalty=1.3,
        allowed_token_ids=tuple(range(1, size)),
        stop_token_ids=frozenset(range(size // 2, size)),
        logit_bias=dict.fromkeys(range(300), 1.0),
    )
    one, took = sequence(everything, prompt), []
    for token in range(20):
        row = random_logits(size)
        expected = row.clone()
        expected[:300] += 1.0
        seen = torch.tensor(sorted({*prompt, *range(20_000, 20_000 + token)}))
        expected[seen] = torch.where(expected[seen] < 0, expected[seen] * 1.3, expected[seen] / 1.3)
        expected[0] += BANNED
        expected[size // 2 :] = -torch.inf
        began = time.thread_time()
        adjust(row, one, EOS)
        took.append(time.thread_time() - began)
        expected[sorted(EOS)] = -torch.inf
        assert torch.equal(row, expected)
        one.append(20_000 + token)
    assert min(took) < 0.003


def test_a_row_of_greedy_among_sampled_ones() -> None:
    """Each row has its own parameters: greedy after penalties, sampled by its own seed."""
    logits = random_logits(3 * 20).view(3, 20)
    best = int(logits[1].argmax())
    sequences = [
        sequence(SamplingParams(max_tokens=9, temperature=1.0, seed=3), PROMPT),
        sequence(SamplingParams(max_tokens=9, temperature=0.0), PROMPT),
        sequence(SamplingParams(max_tokens=9, temperature=0.0, logit_bias={13: 100.0}), PROMPT),
    ]
    tokens = sample(logits.clone(), sequences, EOS)
    alone = sample(logits[:1].clone(), [sequence(SamplingParams(max_tokens=9, seed=3), PROMPT)], EOS)
    assert tokens == [alone[0], best, 13]


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 1.4}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """χ² of seeded draws against their probabilities, at about 4 standard deviations."""
    logits, num_draws = random_logits(30), 4000
    sampling = SamplingParams(max_tokens=1, **options)
    warpers: list[LogitsProcessor] = (
        [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
    )
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    expected = warped(logits, warpers) * num_draws
    generator = torch.Generator().manual_seed(1)
    drawn = torch.zeros(30, dtype=torch.float64)
    for _ in range(num_draws):
        drawn[draw(logits, sampling, generator)] += 1
    assert not drawn[expected == 0].any()
    enough = expected >= 5
    chi_square = ((drawn - expected)[enough].square() / expected[enough]).sum()
    freedom = int(enough.sum()) - 1
    assert abs(chi_square - freedom) < 4 * (2 * max(freedom, 1)) ** 0.5


@pytest.mark.parametrize("num_top", [0, 1, 5, 50])
def test_logprobs_are_log_softmax(num_top: int) -> None:
    rows = random_logits(4 * 20, spread=5.0).view(4, 20)
    tokens = [0, 19, 7, int(rows[3].argmax())]
    expected = rows.double().log_softmax(-1)
    for row, token, scored in zip(expected, tokens, logprobs(rows, tokens, num_top), strict=True):
        assert scored.token_id == token
        assert scored.logprob == pytest.approx(float(row[token]), abs=1e-5)
        order = row.argsort(descending=True)[:num_top].tolist()
        assert [one for one, _ in scored.top] == order
        assert [value for _, value in scored.top] == pytest.approx(row[order].tolist(), abs=1e-5)


# --- through the engine -----------------------------------------------------------------------------------------------


def test_logprobs_of_a_row_are_the_same_to_the_bit_with_any_threads_and_neighbours() -> None:
    """Of one row of 50,000 torch's threads each sum a part: two in 64 differed in their last bit."""
    rows, token_ids = 3 * torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0)), list(range(64))
    threads = torch.get_num_threads()
    found = []
    try:
        for count, number in itertools.product((1, 2, 5), (1, 3, 64)):
            torch.set_num_threads(count)
            parts = [slice(first, first + number) for first in range(0, 64, number)]
            found.append([one for part in parts for one in logprobs(rows[part], token_ids[part], 2)])
    finally:
        torch.set_num_threads(threads)
    assert all(one == found[0] for one in found)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    model = Model(tiny("llama"))

    def sampled(seed: int | None) -> SamplingParams:
        return SamplingParams(max_tokens=20, temperature=1.3, top_p=0.95, seed=seed, ignore_eos=True)

    prompt = prompt_of(20)
    alone = generate(tiny_engine(model), [prompt], sampled(5))[0]
    others = [request(f"other {i}", prompt_of(10 + i, seed=i), sampled(None if i % 2 else i)) for i in range(6)]
    engine = tiny_engine(model, max_batched_tokens=20, max_num_seqs=8, num_blocks=8, stream_gap_s=None)
    outputs = run(engine, [*others[:3], request("it", prompt, sampled(5)), *others[3:]])
    assert tokens_of(outputs["it"]) == alone
    assert engine.scheduler.num_preemptions > 0, "a preempted sequence keeps its place in its random stream"
    assert generate(tiny_engine(model), [prompt], sampled(6))[0] != alone
    assert len({*alone}) > 5


def test_logprobs_are_of_the_raw_distribution() -> None:
    """Bias, penalties and temperature change what is drawn, not what is reported."""
    model = Model(tiny("llama"))
    prompt = prompt_of(30)
    plain = SamplingParams(max_tokens=1, temperature=0.0, logprobs=128, ignore_eos=True)
    forced = SamplingParams(max_tokens=1, temperature=0.3, logprobs=128, logit_bias={77: 100.0}, repetition_penalty=1.5)
    outputs = run(tiny_engine(model), [request("plain", prompt, plain), request("forced", prompt, forced)])
    (expected,), (actual,) = (outputs[name][0].logprobs or () for name in ("plain", "forced"))
    assert actual.token_id == 77
    assert dict(actual.top) == pytest.approx(dict(expected.top), abs=1e-4)
    assert actual.logprob == pytest.approx(dict(expected.top)[77], abs=1e-4)
