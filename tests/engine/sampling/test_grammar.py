"""Constrained sequences through the engine: the mask against an oracle of another library, and what must not change it.

The oracle is the `regex` package's partial matching: a token may come next if the text with it is still the beginning
of some match.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import regex
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import FinishReason, TokenOutput
from prerope.server.engine.sampling.mask import allowed, constrain
from prerope.server.engine.sequence import SamplingParams
from prerope.server.errors import InvalidRequest
from prerope.server.models.model import Model
from prerope.server.structured.matcher import QUICK_S, CompiledGrammar, Prefix, TokenMatcher

from tests.engine.sampling.test_sampler import sequence
from tests.engine.tiny_models import VOCABULARY, assert_idle, greedy, prompt_of, request, run, tiny_engine, tokens_of

EOS = 2
WORDS = [
    *("<pad>", "<s>", "</s>"),
    *"abcdefxyz0123456789 -,.:\"'{}[]()\n",
    *("ab", "abc", "bc", "cd", "00", "12", "2024", "-0", ", ", '{"', '":', "true", "é", "ée", "日", "日本", "🙂"),
]
assert len(WORDS) < VOCABULARY - 8, "the model has more logits than there are tokens, as models do"


class Vocabulary:
    """What llguidance reads a vocabulary from."""

    eos_token_id = EOS
    bos_token_id = 1
    tokens = tuple(word.encode() for word in WORDS)
    special_token_ids = (0, 1, 2)

    def __call__(self, text: str | bytes) -> list[int]:
        """The longest word first."""
        data, ids = text.encode() if isinstance(text, str) else text, []
        while data:
            best = max((i for i, word in enumerate(self.tokens) if data.startswith(word)), key=lambda i: len(WORDS[i]))
            ids.append(best)
            data = data[len(self.tokens[best]) :]
        return ids


@pytest.fixture(scope="module")
def tables() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Vocabulary()))


def compiled(tables: LLTokenizer, pattern: str, *, forcing: bool = True) -> CompiledGrammar:
    """Where only one text can follow, llguidance allows only the token that the tokenizer would write it with."""
    options = "" if forcing else '%llguidance {"no_forcing": true}\n'
    matcher = LLMatcher(tables, LLMatcher.grammar_from_lark(f"{options}start: /{pattern}/"))
    assert not matcher.is_error(), matcher.get_error()
    return CompiledGrammar(matcher, tables)


def constrained(grammar: CompiledGrammar, **sampling: Any) -> SamplingParams:
    return SamplingParams(max_tokens=sampling.pop("max_tokens", 40), grammar=grammar, **sampling)


def text_of(outputs: list[TokenOutput]) -> str:
    return "".join(WORDS[token] for output in outputs for token in output.token_ids if token != EOS)


def expected_next(pattern: str, text: str) -> set[int]:
    """Every token by which `text` stays the beginning of a match, and the end where it is a whole one."""
    allowed = {
        token
        for token, word in enumerate(WORDS)
        if token > EOS and regex.fullmatch(pattern, text + word, partial=True) is not None
    }
    return allowed | ({EOS} if regex.fullmatch(pattern, text) else set())


def allowed_next(grammar: CompiledGrammar, output: list[int], **sampling: Any) -> set[int]:
    one = sequence(constrained(grammar, **sampling), [5, 6])
    one.matcher = grammar.matcher()
    for token in output:
        one.append(token)
        one.matcher.accept(token)
    bits = np.unpackbits(allowed(one, VOCABULARY, frozenset({EOS})), bitorder="little")
    return set(bits.nonzero()[0].tolist())


PATTERNS = [
    r"[a-c]{2,5}-[0-9]+",
    r"(abc|ab|a)(\.[0-9]{2})?",
    r"\d{4}-\d{2}-\d{2}",
    r'\{"(a|bc)": (true|[0-9]{1,3})\}',
    r"[é日本🙂]{1,4}",
    r"(x|y|z)*",
]


@pytest.mark.parametrize("forcing", [False, True], ids=["every token", "canonical tokens"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_is_that_of_the_oracle(tables: LLTokenizer, pattern: str, forcing: bool) -> None:
    """Along random walks through what is allowed, at every place."""
    grammar = compiled(tables, pattern, forcing=forcing)
    places = 0
    for walk in range(12):
        draw = random.Random(walk)
        text, output = "", list[int]()
        while len(output) < 12:
            found, expected = allowed_next(grammar, output), expected_next(pattern, text)
            forced = forcing and len({WORDS[token][0] for token in expected - {EOS}}) == 1 and EOS not in expected
            assert found <= expected if forced else found == expected, repr(text)
            assert found, f"{text!r} is a dead end"
            places += 1
            more = sorted(found - {EOS})
            if not more:
                break
            output.append(draw.choice(more))
            text += WORDS[output[-1]]
    assert places > 12


def test_forbidden_logits_are_minus_infinity_and_others_untouched(tables: LLTokenizer) -> None:
    """Rows without a grammar are left alone, ids beyond the tokenizer's are forbidden."""
    grammar = compiled(tables, r"[a-c]{2,5}-[0-9]+")
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    rows = [sequence(SamplingParams(max_tokens=9), [5]) for _ in range(3)]
    rows[1].matcher = grammar.matcher()
    constrain(logits, rows, frozenset({EOS}))
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    kept = logits[1].isfinite()
    assert set(kept.nonzero()[:, 0].tolist()) == expected_next(r"[a-c]{2,5}-[0-9]+", "")
    assert torch.equal(logits[1][kept], before[1][kept])


@pytest.mark.parametrize("sampling", [{"min_tokens": 3}, {"ignore_eos": True}])
def test_the_end_is_put_off_only_while_something_else_fits(tables: LLTokenizer, sampling: dict[str, Any]) -> None:
    letters = compiled(tables, r"[xyz]*")
    x = WORDS.index("x")
    assert EOS in allowed_next(letters, [x])
    assert EOS not in allowed_next(letters, [x], **sampling)
    one = compiled(tables, r"x")
    assert allowed_next(one, [x], **sampling) == {EOS}


def test_a_stop_id_below_min_tokens(tables: LLTokenizer) -> None:
    grammar = compiled(tables, r"[xy]*")
    x, y = WORDS.index("x"), WORDS.index("y")
    assert allowed_next(grammar, [], stop_token_ids=frozenset({x}), min_tokens=2) == {y}
    only_x = compiled(tables, r"x{3}")
    assert allowed_next(only_x, [], stop_token_ids=frozenset({x}), min_tokens=2) == {x}, "the grammar goes first"


# --- through the engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_match(model: Model, tables: LLTokenizer, pattern: str) -> None:
    grammar = compiled(tables, pattern)
    requests = [
        request(f"{temperature} {seed}", prompt_of(5 + seed, seed), constrained(grammar, seed=seed, **options))
        for temperature, options in enumerate(
            [{"temperature": 0.0}, {"temperature": 1.5}, {"top_p": 0.7, "repetition_penalty": 1.5}, {"top_k": 3}]
        )
        for seed in range(4)
    ]
    outputs = run(tiny_engine(model, max_num_seqs=16), requests)
    for one in outputs.values():
        if one[-1].finish_reason is FinishReason.STOP:
            assert regex.fullmatch(pattern, text_of(one)), text_of(one)
        else:
            assert regex.fullmatch(pattern, text_of(one), partial=True)
    assert any(one[-1].finish_reason is FinishReason.STOP for one in outputs.values())


@pytest.mark.parametrize("sampling", [{}, {"ignore_eos": True}, {"min_tokens": 30}])
def test_what_is_complete_ends(model: Model, tables: LLTokenizer, sampling: dict[str, Any]) -> None:
    """With the token that completes it, no end-of-sequence needed, whatever puts ends off."""
    grammar = compiled(tables, r"\d{4}-\d{2}-\d{2}")
    outputs = run(tiny_engine(model), [request("0", prompt_of(9), constrained(grammar, **sampling))])["0"]
    assert regex.fullmatch(r"\d{4}-\d{2}-\d{2}", text_of(outputs))
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].token_ids
    assert outputs[-1].token_ids[-1] != EOS


def test_an_empty_match_ends_at_once(model: Model, tables: LLTokenizer) -> None:
    grammar = compiled(tables, r"x?")
    bias = {WORDS.index("x"): -100.0}
    outputs = run(tiny_engine(model), [request("0", prompt_of(9), constrained(grammar, logit_bias=bias))])["0"]
    assert [output.token_ids for output in outputs] == [(EOS,)]
    assert outputs[-1].finish_reason is FinishReason.STOP


def mixed(grammar: CompiledGrammar) -> Iterator[Any]:
    """Free, greedy requests between constrained ones that draw."""
    for index in range(5):
        yield request(f"free {index}", prompt_of(20 + 3 * index, seed=index), greedy(24))
        options = {"temperature": 1.2, "seed": index, "max_tokens": 24}
        yield request(f"bound {index}", prompt_of(18 + 2 * index, seed=50 + index), constrained(grammar, **options))


LONG = r"([a-c]{2}[0-9]{2}){5}-[xyz]{4}"


@pytest.fixture(scope="module")
def alone(model: Model, tables: LLTokenizer) -> dict[str, list[int]]:
    """Each request in an engine of its own."""
    outputs: dict[str, list[int]] = {}
    for one in mixed(compiled(tables, LONG)):
        found = run(tiny_engine(model), [one])[one.request_id]
        outputs[one.request_id] = [token for output in found for token in output.token_ids]
    return outputs


@pytest.mark.parametrize(
    ("options", "preempts"),
    [
        ({"max_num_seqs": 16}, False),
        ({"max_num_seqs": 10, "max_batched_tokens": 10}, False),
        ({"max_num_seqs": 10, "max_batched_tokens": 40, "num_blocks": 40, "block_size": 4, "stream_gap_s": None}, True),
    ],
    ids=["at once", "chunked", "preempted"],
)
def test_neighbours_chunks_and_preemption_change_nothing(
    model: Model, tables: LLTokenizer, alone: dict[str, list[int]], options: dict[str, Any], preempts: bool
) -> None:
    engine: Engine = tiny_engine(model, **options)
    outputs = run(engine, list(mixed(compiled(tables, LONG))))
    for name, one in outputs.items():
        assert [token for output in one for token in output.token_ids] == alone[name], name
        if name.startswith("bound"):
            assert regex.fullmatch(LONG, text_of(one))
    assert (engine.scheduler.num_preemptions > 0) == preempts
    assert_idle(engine)


def test_logprobs_stay_those_of_the_raw_logits(model: Model, tables: LLTokenizer) -> None:
    grammar = compiled(tables, r"[xyz]{4}")
    free = request("free", prompt_of(12), greedy(1, logprobs=VOCABULARY))
    bound = request("bound", prompt_of(12), constrained(grammar, logprobs=VOCABULARY, temperature=0.0))
    outputs = run(tiny_engine(model), [free, bound])
    (expected,), (actual,) = (outputs[name][0].logprobs or () for name in ("free", "bound"))
    assert dict(actual.top) == pytest.approx(dict(expected.top), abs=1e-4)
    best = max(expected_next(r"[xyz]{4}", ""), key=lambda token: dict(expected.top)[token])
    assert actual.token_id == best


class _Failing:
    """A matcher whose library gives up after two tokens."""

    accepting = finished = False
    begun = True

    def __init__(self) -> None:
        self.accepted = 0
        self.ready: Future[bytes] = Future()
        self.ready.set_result(b"")

    def matcher(self) -> _Failing:
        return _Failing()

    def mask(self) -> bytes:
        return b"\xf8"

    def accept(self, _token_id: int) -> None:
        self.accepted += 1

    @property
    def failure(self) -> str:
        return "too complex" if self.accepted == 2 else ""


def test_a_grammar_that_gives_up_fails_its_request_alone(model: Model) -> None:
    engine = tiny_engine(model)
    bound = request("bound", prompt_of(12), SamplingParams(max_tokens=9, grammar=_Failing()))
    outputs = run(engine, [request("free", prompt_of(12), greedy(9)), bound])
    assert len(outputs["free"]) == 9
    assert [output.token_ids != () for output in outputs["bound"]] == [True, False]
    failure = outputs["bound"][-1].failure
    assert isinstance(failure, InvalidRequest)
    assert "too complex" in failure.message
    assert failure.code == "grammar_failed"
    assert_idle(engine)


class _Panic(BaseException):
    """As pyo3's: no `Exception`."""


class _Panicking:
    """llguidance's matcher, but for one method, which raises when it is called for the third time."""

    def __init__(self, inner: LLMatcher, method: str) -> None:
        self._inner, self._method, self._calls_left = inner, method, 2

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._calls_left -= 1
            if self._calls_left < 0:
                raise _Panic("out of bounds")
        return getattr(self._inner, name)


class _Broken:
    """A grammar whose matchers panic."""

    def __init__(self, grammar: CompiledGrammar, method: str) -> None:
        self._grammar, self._method = grammar, method

    def matcher(self) -> TokenMatcher:
        matcher = self._grammar.matcher()
        matcher.ready.result()
        matcher._inner = _Panicking(matcher._inner, self._method)
        return matcher


@pytest.mark.parametrize("method", ["compute_bitmask", "consume_token"])
def test_a_panic_of_the_grammar_library_ends_its_request_alone(model: Model, tables: LLTokenizer, method: str) -> None:
    engine, grammar = tiny_engine(model), compiled(tables, r"\d{4}-\d{2}-\d{2}")
    free = request("free", prompt_of(12), greedy(9))
    bound = request("bound", prompt_of(12, 1), constrained(grammar))
    broken = SamplingParams(max_tokens=40, grammar=_Broken(grammar, method))
    outputs = run(engine, [free, bound, request("broken", prompt_of(12, 2), broken)])
    assert len(outputs["free"]) == 9
    assert outputs["bound"][-1].finish_reason is FinishReason.STOP
    assert len(tokens_of(outputs["broken"])) in (2, 3), "what was drawn before it, and nothing that was drawn blindly"
    assert regex.fullmatch(r"\d{4}-\d{2}-\d{2}", text_of(outputs["broken"]), partial=True)
    failure = outputs["broken"][-1].failure
    assert isinstance(failure, InvalidRequest)
    assert failure.code == "grammar_failed"
    assert "_Panic: out of bounds" in failure.message
    assert_idle(engine)


@pytest.mark.parametrize("method", ["deep_copy", "is_accepting"])
@pytest.mark.parametrize("slow", [False, True])
def test_a_panic_before_the_first_token_ends_its_request_alone(
    model: Model, tables: LLTokenizer, method: str, slow: bool
) -> None:
    class Unbegun(_Panicking):
        """Raises at the first call; so do its copies."""

        def __init__(self, inner: LLMatcher) -> None:
            super().__init__(inner, method)
            self._calls_left = 0

        def deep_copy(self) -> Any:
            return self.__getattr__("deep_copy") and Unbegun(self._inner.deep_copy())

    engine, grammar = tiny_engine(model), compiled(tables, r"\d{4}")
    broken = SamplingParams(max_tokens=40, grammar=CompiledGrammar(Unbegun(grammar._prototype), tables, slow=slow))
    outputs = run(engine, [request("free", prompt_of(12), greedy(9)), request("broken", prompt_of(12, 2), broken)])
    assert len(outputs["free"]) == 9
    assert tokens_of(outputs["broken"]) == []
    failure = outputs["broken"][-1].failure
    assert isinstance(failure, InvalidRequest)
    assert "_Panic: out of bounds" in failure.message
    assert_idle(engine)


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_program_is_no_failure_of_a_reply(tables: LLTokenizer, end: type[BaseException]) -> None:
    def ended(*_: object) -> LLMatcher:
        raise end

    grammar = compiled(tables, r"(ab)*")
    with pytest.raises(end):
        Prefix(ended, tables).complete("ab")
    with pytest.raises(end):
        TokenMatcher(ended, tables)
    matcher = grammar.matcher()
    matcher.ready.result()
    monitor = cast("Any", matcher)
    monitor._inner = SimpleNamespace(consume_token=ended)
    with pytest.raises(end):
        matcher.accept(1)


def test_a_mask_is_slow_by_all_that_it_takes(tables: LLTokenizer) -> None:
    """What differs is found under the interpreter's lock: one thread of those that do so is enough."""
    computed_by: list[str] = []

    class Slow:
        def accept(self, token_id: int) -> None:
            """What was drawn."""

        def allowed(self, _: LLMatcher, mask: bytes) -> bytes:
            computed_by.append(threading.current_thread().name)
            until = time.thread_time() + 2 * QUICK_S
            while time.thread_time() < until:
                pass
            return mask

    matcher = TokenMatcher(compiled(tables, r"(ab)*")._copy, tables, cast("Any", Slow()))
    for _ in range(2):
        allowed = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
        matcher.accept(int(allowed.argmax()))
    matcher.ready.result()
    assert [name.startswith("slow") for name in computed_by] == [False, True, True]


@pytest.mark.parametrize("method", ["consume_tokens", "is_accepting"])
def test_a_panic_while_a_stop_string_is_looked_for_completes_nothing(tables: LLTokenizer, method: str) -> None:
    grammar = compiled(tables, r"(ab)*")
    prefix, whole = Prefix(lambda: cast("LLMatcher", _Panicking(grammar._copy(), method)), tables), grammar.prefix()
    texts = ["ab" * count for count in range(1, 5)]
    assert [whole.complete(text) for text in texts] == [True, True, True, True]
    assert [prefix.complete(text) for text in texts] == [True, True, False, False]
