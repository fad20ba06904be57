"""Streamed text equals whole text: byte tokens, stop strings (any tokens: tests/fuzz). Chat templates and refusals."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prerope.server.api.chat.template import render_chat
from prerope.server.errors import ConfigurationError, InvalidRequest
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import TextStream, Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Checkpoint) -> Tokenizer:
    return Tokenizer.load(smollm2)


def llama_style(*, strip: bool) -> tuple[Tokenizer, Any]:
    """Byte fallback as in Llama 2 (the leading space stripped) or Gemma (not), with few ordinary tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "a", "b", "▁a", "▁the", "the", "é", "日", "▁日本", "\ufffd", "."]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    chain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Tokenizer(hf), hf


LLAMA_STYLE = {strip: llama_style(strip=strip) for strip in (True, False)}


def streamed(tokenizer: Tokenizer, groups: list[list[int]], **options: Any) -> str:
    stream = TextStream(tokenizer, **options)
    return "".join([*(stream.push(group) for group in groups), stream.finish()])


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40), strip=st.booleans(), size=st.integers(1, 5))
def test_byte_fallback_text_survives_the_round_trip(text: str, strip: bool, size: int) -> None:
    tokenizer, hf = LLAMA_STYLE[strip]
    ids = tokenizer.encode(text, add_special_tokens=False)
    groups = [ids[start : start + size] for start in range(0, len(ids), size)]
    assert streamed(tokenizer, groups, skip_special_tokens=False) == hf.decode(ids, skip_special_tokens=False)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
def test_text_survives_the_round_trip(smollm2_tokenizer: Tokenizer, text: str) -> None:
    every_byte = {smollm2_tokenizer.token_bytes(token_id) for token_id in range(300)}
    assume(all(bytes([byte]) in every_byte for byte in text.encode()))  # SmolLM2 lacks some bytes of rare planes
    ids = smollm2_tokenizer.encode(text)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(smollm2_tokenizer.token_bytes(token_id) for token_id in ids).decode() == text
    assert len(text) <= len(ids) * smollm2_tokenizer.max_chars_per_token


def test_incomplete_characters_are_held_back(smollm2_tokenizer: Tokenizer) -> None:
    stream = TextStream(smollm2_tokenizer)
    pieces = [stream.push([token_id]) for token_id in smollm2_tokenizer.encode("👩‍👩‍👧 日本")]
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == "👩‍👩‍👧 日本"


def test_a_character_of_byte_tokens_comes_as_soon_as_it_is_complete() -> None:
    tokenizer, _ = LLAMA_STYLE[True]
    stream = TextStream(tokenizer)
    ids = [3 + byte for byte in "€é".encode()]
    assert [stream.push([token_id]) for token_id in ids] == ["", "", "€", "", "é"]


def naive_stop(text: str, stops: list[str], after: int = 0) -> str | None:
    """The definition: character by character, the first end of any stop string past `after`; the longest of those."""
    for end in range(after + 1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@settings(deadline=None, max_examples=250)
@given(
    text=st.text("ab é日", max_size=30),
    stops=st.lists(st.text("ab é日", min_size=1, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 6),
    min_tokens=st.sampled_from([0, 0, 1, 2, 5]),
)
def test_stop_strings_cut_the_text_however_it_is_grouped(
    smollm2_tokenizer: Tokenizer, text: str, stops: list[str], size: int, min_tokens: int
) -> None:
    """A stop string that ends within the text of the first `min_tokens` tokens is none."""
    ids = smollm2_tokenizer.encode(text)
    stream = TextStream(smollm2_tokenizer, stop=stops, min_tokens=min_tokens)
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    begun = len(smollm2_tokenizer.decode(ids[:min_tokens]).rstrip("\ufffd"))
    expected = naive_stop(text, stops, begun)
    result = "".join(pieces) + stream.finish()
    assert stream.stopped == (expected is not None)
    assert result == (text if expected is None else expected)
    with_stop = streamed(smollm2_tokenizer, [ids], stop=stops, include_stop=True, min_tokens=min_tokens)
    if expected is not None:
        assert with_stop.startswith(expected)
        assert any(with_stop == expected + stop for stop in stops)


def test_a_stop_string_may_span_tokens_and_nothing_follows_it(smollm2_tokenizer: Tokenizer) -> None:
    stream = TextStream(smollm2_tokenizer, stop=["STOP here"])
    pieces = [stream.push([token_id]) for token_id in smollm2_tokenizer.encode("Go on. STOP here, please")]
    assert "".join(pieces) == "Go on. "
    assert stream.stopped
    assert stream.push([5]) == ""
    assert stream.finish() == ""


def test_what_only_looked_like_a_stop_string_is_given_back(smollm2_tokenizer: Tokenizer) -> None:
    stream = TextStream(smollm2_tokenizer, stop=["###"])
    assert stream.push(smollm2_tokenizer.encode("a ##")) == "a "
    assert stream.finish() == "##"
    assert not stream.stopped


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "ends"),
    [
        ("One.<|im_start|>user", ["<|im_start|>"], "One.", True),
        ("One.<|im_start|>user", ["<|im_start|>us"], "One.", True),
        ("One.<|im_start|>assistant", ["<|im_start|>user"], "One.assistant", False),
        ("One. Two<|im_start|>", ["Two<|im_start|>"], "One. ", True),
        ("One<|im_start|>Two<|im_end|>Three", ["<|im_end|>"], "OneTwo", True),
        ("One<|im_start|>Two", ["OneTwo"], "", True),
        ("One<|im_start|>", ["<|im_start|><|im_end|>"], "One", False),
    ],
)
def test_a_stop_string_may_hold_special_tokens_which_are_not_shown(
    smollm2_tokenizer: Tokenizer, text: str, stops: list[str], expected: str, ends: bool, size: int
) -> None:
    ids = smollm2_tokenizer.encode(text)
    stream = TextStream(smollm2_tokenizer, stop=stops)
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert ("".join(pieces) + stream.finish(), stream.stopped) == (expected, ends)


@pytest.mark.parametrize("stop", ["im_start", "<|", "|>", "start|>us", "One.<|im", "|><|"])
def test_a_part_of_a_special_token_that_is_not_shown_ends_nothing(smollm2_tokenizer: Tokenizer, stop: str) -> None:
    """It is no text of the reply, as for vLLM; where special tokens are shown, it is."""
    ids = smollm2_tokenizer.encode("One.<|im_start|><|im_start|>user")
    hidden = TextStream(smollm2_tokenizer, stop=[stop])
    assert hidden.push(ids) + hidden.finish() == "One.user"
    assert not hidden.stopped
    shown = TextStream(smollm2_tokenizer, stop=[stop], skip_special_tokens=False)
    assert shown.push(ids) == "One.<|im_start|><|im_start|>user".partition(stop)[0]
    assert shown.stopped


def test_work_per_token_does_not_grow(smollm2_tokenizer: Tokenizer) -> None:
    ids = smollm2_tokenizer.encode("The quick brown fox. ") * 2000
    stream = TextStream(smollm2_tokenizer, stop=["never there"])

    def seconds(part: list[int]) -> float:
        start = time.perf_counter()
        for token_id in part:
            stream.push([token_id])
        return time.perf_counter() - start

    seconds(ids[:100])
    first, last = seconds(ids[:4000]), seconds(ids[-4000:])
    assert last < 3 * first + 0.05


MEMORY_OF_WORDS = """
import ctypes, random, string, sys
import psutil
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer

tokenizer, rng = Tokenizer.load(Checkpoint(sys.argv[1], "model")), random.Random(0)
ctypes.CDLL(None).malloc_trim(0)  # what loading has freed: words could lie there
begun = psutil.Process().memory_info().rss
for _ in range(400):
    tokenizer.encode(" ".join("".join(rng.choices(string.ascii_letters, k=253)) for _ in range(15)))
print((psutil.Process().memory_info().rss - begun) / 2**20)
"""


def test_words_that_clients_make_up_are_kept_up_to_few_megabytes(tiny_checkpoint: Path) -> None:
    """Of 6,000 the library keeps 50 MiB by itself. In a process of its own, where no test before has left room."""
    command = [sys.executable, "-c", MEMORY_OF_WORDS, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 25


def test_digits_are_split_as_in_training(smollm2_tokenizer: Tokenizer) -> None:
    pieces = [smollm2_tokenizer.token_text(token_id) for token_id in smollm2_tokenizer.encode("a\n\n12")]
    assert pieces == ["a", "\n\n", "1", "2"]


def test_the_end_of_turn_is_an_end_of_sequence(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.encode("<|im_end|>")[0] in smollm2_tokenizer.eos_token_ids


def test_a_token_outside_the_vocabulary_has_no_text(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.token_bytes(smollm2_tokenizer.vocab_size + 7) == b""
    assert smollm2_tokenizer.token_text(smollm2_tokenizer.vocab_size + 7) == ""


def test_a_chat_becomes_the_models_own_prompt(smollm2_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(smollm2_tokenizer, messages) == text
    without = render_chat(smollm2_tokenizer, messages, add_generation_prompt=False)
    assert text.removesuffix("<|im_start|>assistant\n") == without


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        render_chat(LLAMA_STYLE[True][0], [{"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages"


@pytest.fixture
def strict_template(smollm2_tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    template = smollm2_tokenizer._hf.chat_template
    smollm2_tokenizer._hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    yield smollm2_tokenizer
    smollm2_tokenizer._hf.chat_template = template


def test_a_template_that_refuses_is_a_bad_request(strict_template: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render_chat(strict_template, [{"role": "user", "content": "Hi"}])


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigurationError, match="tokenizer cannot be read"):
        Tokenizer.load(Checkpoint(str(tmp_path), "empty"))


def test_a_tokenizer_is_described_whose_templates_have_no_default() -> None:
    tokenizer, _ = llama_style(strip=False)
    tokenizer.hf.chat_template = {"rag": "R", "tool_use": "T"}
    assert "chat_template" not in tokenizer.described()
    tokenizer.hf.chat_template["default"] = "D"
    assert tokenizer.described()["chat_template"] == "D"
