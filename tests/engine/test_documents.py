"""Documents that are read on their own: against stock transformers with keys moved by hand, and the same whatever the
order, the chunks, the neighbours, preemption and what the cache knows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prerope.cache.blocks.documents import DocumentSpan, filled_from, layout, longest_readings, next_copied, span_at
from prerope.rope.spec import METHOD_NAMES, RopeSpec
from prerope.server.engine.documents import COPIED
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.sequence import EngineRequest
from prerope.server.engine.tiers import Tiers, open_tier
from prerope.server.models.model import Model
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.engine.tiny_models import assert_idle, greedy, prompt_of, request, run, tiny, tiny_engine, tokens_of
from tests.tiers import every

PREFIX, QUESTION = prompt_of(9, seed=100), prompt_of(7, seed=101)
LENGTHS = (1, 5, 16, 31, 40)
NEW = 8


def spans_of(lengths: list[int], reread: int, prefix: int = len(PREFIX)) -> tuple[DocumentSpan, ...]:
    spans, start = [], prefix
    for length in lengths:
        spans.append(DocumentSpan(start, start + length, reread))
        start += length
    return tuple(spans)


def asked(name: str, documents: list[list[int]], reread: int = 4, **options: Any) -> EngineRequest:
    prompt = [*PREFIX, *(token for document in documents for token in document), *QUESTION]
    spans = spans_of([len(document) for document in documents], reread)
    return request(name, prompt, greedy(NEW, logprobs=0), documents=spans, **options)


def reply(engine: Engine, one: EngineRequest) -> tuple[list[int], list[float]]:
    outputs = run(engine, [one])[one.request_id]
    return tokens_of(outputs), [entry.logprob for output in outputs for entry in output.logprobs or ()]


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny("llama"))


@pytest.fixture
def documents() -> list[list[int]]:
    return [prompt_of(length, seed=length) for length in LENGTHS]


class Oracle:
    """Stock transformers. Keys and values of a document are caught before rotation, and turned at their new place."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.cache = DynamicCache()
        self.length = 0

    def read(self, ids: list[int]) -> torch.Tensor:
        positions = torch.arange(self.length, self.length + len(ids))[None]
        with torch.no_grad():
            output = self.stock(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=self.cache)
        self.length += len(ids)
        return output.logits[0, -1]

    def raw(self, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        caught: list[torch.Tensor] = []
        layers = self.stock.model.layers
        hooks = [
            projection.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
            for layer in layers
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        with torch.no_grad():
            self.stock(input_ids=torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        dim = layers[0].self_attn.head_dim
        heads = [tensor.view(1, len(ids), -1, dim).transpose(1, 2) for tensor in caught]
        return list(zip(heads[::2], heads[1::2], strict=True))

    def place(self, raw: list[tuple[torch.Tensor, torch.Tensor]], first: int) -> None:
        """Append rows `first` … of what was caught, turned for the positions that come next."""
        count = raw[0][0].shape[2] - first
        positions = torch.arange(self.length, self.length + count)[None]
        for index, (key, value) in enumerate(raw):
            key, value = key[:, :, first:], value[:, :, first:]
            cos, sin = self.stock.model.rotary_emb(value, positions)
            self.cache.update(apply_rotary_pos_emb(key, key, cos, sin)[1], value, index)
        self.length += count


def by_hand(stock: Any, documents: list[list[int]], reread: int) -> tuple[list[int], list[float]]:
    oracle = Oracle(stock)
    oracle.read(PREFIX)
    for document in documents:
        if document[:reread]:
            oracle.read(document[:reread])
        if document[reread:]:
            oracle.place(oracle.raw(PREFIX + document), len(PREFIX) + reread)
    tokens, scores, logits = [], [], oracle.read(QUESTION)
    for _ in range(NEW):
        scores.append(logits.log_softmax(-1).max().item())
        tokens.append(int(logits.argmax()))
        logits = oracle.read(tokens[-1:])
    return tokens, scores


@pytest.mark.parametrize("reread", [0, 4, 100])
def test_documents_are_read_as_by_hand(stock: Any, model: Model, documents: list[list[int]], reread: int) -> None:
    engine = tiny_engine(model)
    for order in (documents, documents[::-1], documents[2:], [documents[1]] * 3):
        expected, scores = by_hand(stock, order, reread)
        tokens, found = reply(engine, asked("one", order, reread))
        assert tokens == expected
        assert found == pytest.approx(scores, abs=1e-4)
        assert_idle(engine)


METHODS = [name for name in METHOD_NAMES if name not in ("longrope", "llama3", "proportional", "auto", "model")]


@pytest.mark.parametrize("method", every(6, METHODS, quick=2))
def test_nothing_but_the_prompt_decides(model: Model, method: str) -> None:
    """Cold, warm, in small chunks, beside others and preempted, for any lengths: the same reply to the bit."""
    dice = random.Random(method)
    spec = RopeSpec(method=method, train_length=64)
    documents = [prompt_of(dice.randint(1, 60), seed=seed) for seed in range(4)]
    shuffled = dice.sample(documents, 4)
    prompts = [documents, shuffled, shuffled[:2]]
    expected = [reply(tiny_engine(model, spec), asked("cold", prompt)) for prompt in prompts]
    xpos = 1e-5 if method == "xpos" else 0.0
    engine = tiny_engine(model, spec)
    chunked = tiny_engine(model, spec, max_batched_tokens=dice.randint(5, 30), max_num_seqs=4)
    overlapped = tiny_engine(model, spec, overlap=True, max_batched_tokens=40, max_num_seqs=4)
    for prompt, (tokens, scores) in zip(prompts, expected, strict=True):
        for other in (engine, chunked, overlapped):
            found = reply(other, asked("again", prompt))
            assert found[0] == tokens
            assert found[1] == pytest.approx(scores, abs=max(xpos, 1e-5))
    small = tiny_engine(model, spec, num_blocks=28, max_batched_tokens=48, max_num_seqs=4)
    outputs = run(small, [asked(str(index), prompt) for index, prompt in enumerate([*prompts, *prompts])])
    for index, (tokens, _) in enumerate([*expected, *expected]):
        assert tokens_of(outputs[str(index)]) == tokens
    assert_idle(small)


def test_what_was_read_is_found_in_any_order(model: Model, documents: list[list[int]]) -> None:
    engine = tiny_engine(model)
    run(engine, [asked("first", documents)])
    before = engine.stats().prompt_tokens
    outputs = run(engine, [asked("second", documents[::-1])])["second"]
    # Rows that are computed: what the first tokens of each document and the question are, and the prefix's last block.
    computed = engine.stats().prompt_tokens - before
    assert computed <= len(PREFIX) + len(QUESTION) + 4 * len(documents)
    found = outputs[-1].num_cached_tokens
    assert found == sum(max(0, length - 4) for length in LENGTHS)


def test_an_edit_reads_that_document_alone(model: Model, documents: list[list[int]]) -> None:
    engine = tiny_engine(model)
    run(engine, [asked("first", documents)])
    before = engine.stats().prompt_tokens
    edited = [*documents[:3], prompt_of(31, seed=7), documents[4]]
    run(engine, [asked("second", edited)])
    computed = engine.stats().prompt_tokens - before
    assert 31 <= computed <= 31 + 2 * len(PREFIX) + len(QUESTION) + 4 * len(documents)


def test_documents_are_not_the_plain_prompt(model: Model, documents: list[list[int]]) -> None:
    """The same tokens without documents share no block with them past the prefix, before or after."""
    plain_request = request("plain", asked("x", documents).prompt_token_ids, greedy(NEW, logprobs=0))
    plain, own = reply(tiny_engine(model), plain_request), reply(tiny_engine(model), asked("own", documents))
    assert plain != own
    engine = tiny_engine(model)
    assert reply(engine, asked("own", documents)) == own
    assert reply(engine, plain_request) == plain
    assert reply(engine, asked("own", documents)) == own


def test_salts_keep_documents_apart(model: Model, documents: list[list[int]]) -> None:
    engine = tiny_engine(model)
    run(engine, [asked("a", documents, cache_salt="a")])
    outputs = run(engine, [asked("b", documents[::-1], cache_salt="b")])["b"]
    assert outputs[-1].num_cached_tokens == 0


def test_aborts_at_any_step_leave_nothing(model: Model, documents: list[list[int]]) -> None:
    for steps in range(12):
        engine = tiny_engine(model, max_batched_tokens=24, max_num_seqs=8)
        engine.add(asked("a", documents))
        engine.add(asked("b", documents[::-1]))
        for _ in range(steps):
            engine.step()
            engine.check_integrity()
        engine.abort("a")
        engine.check_integrity()
        while engine.has_work():
            engine.step()
            engine.check_integrity()
        assert_idle(engine)


def test_progress_counts_documents_as_they_are_read(model: Model, documents: list[list[int]]) -> None:
    engine = tiny_engine(model, max_batched_tokens=16, max_num_seqs=4)
    outputs = run(engine, [asked("one", documents, report_progress=True)])["one"]
    processed = [output.num_processed_tokens for output in outputs]
    assert processed == sorted(processed)
    assert len(set(processed)) > len(LENGTHS)
    assert processed[-1] == outputs[-1].num_prompt_tokens


def test_spans() -> None:
    spans = spans_of([10, 3, 20], reread=5, prefix=4)  # 4…14, 14…17 (read at its place), 17…37
    assert [span_at(spans, position) for position in (3, 8, 9, 13, 14, 16, 21, 22, 36, 37)] == [
        *(None, None, spans[0], spans[0], None, None, None, spans[2], spans[2], None)
    ]
    assert [next_copied(spans, position, 50) for position in (0, 9, 14, 22, 37)] == [9, 9, 22, 22, 50]
    assert [filled_from(spans, position) for position in (14, 17, 37, 20)] == [9, 17, 22, 20]
    assert filled_from(spans_of([4, 4], reread=0, prefix=4), 12) == 4
    assert layout(spans, 0, 9) == b""
    assert layout(spans, 8, 16) != layout(spans_of([9, 4, 20], reread=5, prefix=4), 8, 16)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.sampled_from([0, 1, 3, 20])), min_size=1),
    place=st.floats(-0.1, 1.2),
    size=st.integers(1, 16),
)
def test_places_among_spans(shapes: list[tuple[int, int, int]], place: float, size: int) -> None:
    """By their definitions: all spans are looked at."""
    spans: list[DocumentSpan] = []
    for gap, length, reread in shapes:
        start = gap + (spans[-1].stop if spans else 0)
        spans.append(DocumentSpan(start, start + length, reread))
    position = int(place * spans[-1].stop)
    within = [span for span in spans if span.copied <= position < span.stop]
    assert span_at(spans, position) == (within[0] if within else None)
    copied = [span.copied for span in spans if position <= span.copied < span.stop]
    assert next_copied(spans, position, 500) == min(copied, default=500)
    readings = [span.stop - span.start for span in spans if span.copied < span.stop > position]
    rest = longest_readings(spans)[sum(span.stop <= position for span in spans)]
    assert rest == max([spans[0].start + length for length in readings], default=0)
    stop = position + size
    inside = [span for span in spans if span.copied < min(span.stop, stop) and span.stop > position]
    told = (spans[0].start, [(span.start, span.copied, min(span.stop, stop)) for span in inside])
    assert layout(spans, position, stop) == (repr(told).encode() if inside else b"")


@pytest.mark.parametrize("alone", every(1, [True, False], quick=1))
def test_a_step_copies_no_more_than_it_has_time_for(
    model: Model, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    """A thousand documents that were all known were looked up and copied in one step of two seconds."""
    short, long = [prompt_of(17, seed=n) for n in range(30)], prompt_of(1200, seed=30)
    options: dict[str, Any] = {"num_blocks": 400, "max_model_len": 2400, "max_batched_tokens": 8, "stream_gap_s": None}
    engine, order = tiny_engine(model, **options), [*short[::-1], long]
    run(engine, [asked("first", [*short, long])])
    expected = reply(tiny_engine(model, **options), asked("cold", order))
    if not alone:
        engine.add(request("stream", prompt_of(5), greedy(300)))
        engine.step()
    engine.add(asked("again", order))
    outputs, copied, copy = list[TokenOutput](), list[int](), engine.copy
    monkeypatch.setattr(engine, "copy", lambda slots: (copied.append(slots.shape[1]), copy(slots)))
    while not outputs or outputs[-1].finish_reason is None:
        outputs += [output for name, output in engine.step() if name == "again"]
        assert sum(-(-count // COPIED) for count in copied) <= 8
        copied.clear()
        engine.check_integrity()
    assert tokens_of(outputs) == expected[0]
    assert [entry.logprob for output in outputs for entry in output.logprobs or ()] == expected[1]
    assert outputs[-1].document_cached_tokens == (*[13] * 30, 1196)


def with_tier(model: Model, folder: Path, **options: Any) -> Engine:
    engine = tiny_engine(model, tier_dir=folder, **options)
    engine.tiers = Tiers(open_tier(model, engine.config, engine.storage, print), engine.storage, engine.scheduler.cache)
    return engine


@pytest.mark.parametrize("num_blocks", [100, 24])
def test_a_restart_finds_prefixes_and_documents(
    model: Model, documents: list[list[int]], tmp_path: Path, num_blocks: int
) -> None:
    order = documents[::-1]
    expected = reply(tiny_engine(model), asked("cold", order))
    plain = request("plain", prompt_of(70, seed=5), greedy(NEW, logprobs=0))
    plain_expected = reply(tiny_engine(model), plain)
    first = with_tier(model, tmp_path)
    run(first, [asked("first", documents), plain])
    first.close()
    second = with_tier(model, tmp_path, num_blocks=num_blocks)
    assert reply(second, plain) == plain_expected
    outputs = run(second, [asked("again", order)])["again"]
    assert tokens_of(outputs) == expected[0]
    assert second.tiers is not None
    assert second.tiers.tier.stats.num_read >= 10
    assert outputs[-1].num_cached_tokens == sum(max(0, length - 4) for length in LENGTHS)
    assert_idle(second)
    other = with_tier(Model(tiny("llama", seed=1)), tmp_path)
    run(other, [asked("other", documents)])
    assert other.tiers is not None
    assert other.tiers.tier.stats.num_read == 0
    second.close()
    other.close()
