"""Text that arrives token by token is the text that arrives at once: any tokens, cut anywhere, and any stop strings.

What the text must be is written down here from the bytes of the tokens; the streamed code is not asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from prerope.server.api.stream.generation import Transcript
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import TextStream, Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.fuzz.budget import budget

NASTY = [
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪🇫🇷",
        "e\u0301\u0323",
        "पाठशाला",
        "ﷺ",
        "日本語",
        "𝔘𝔫𝔦",
        "\u200b",
        "\u200d",
        "\ufe0f",
    ),
    *("\ufffd", " ", "  ", " a", "\n\n", "\r\n", "\t", "\x00", "naïve", "€", "▁", "<s>", "<|im_end|>", "\u2028", "Ġ"),
]
BYTE = re.compile(r"<0x(..)>")
SPECIAL = re.compile(r"<s>|<\|im_end\|>")

texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=4) | st.text("ab ", max_size=3), max_size=8).map("".join)


def unigram(*, strip: bool) -> Tokenizer:
    """SentencePiece as Llama 2 (the first space stripped) and Gemma have it: pieces, and bytes for all else."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "a", "b", "▁a", "▁the", "the", "é", "日", "▁日本", "\ufffd", ".", "👩", "\u200d", "\u0301"]
    scores = [-1.0 - len(pieces) / 100 + index / 100 for index in range(len(pieces))]
    backend = Backend(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if strip else "never", split=False)
    chain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@cache
def spoken(tokenizer: Tokenizer) -> Callable[[int], bytes | str | None]:
    """What a token says: bytes, or text that ends a run of bytes, or nothing at all."""
    backend, inverse = tokenizer._backend, {}
    if tokenizer.byte_level:  # GPT-2's alphabet: printable bytes stand for themselves, the others for 256, 257, …
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        inverse = {chr(byte): byte for byte in printable} | {
            chr(256 + place): byte for place, byte in enumerate(others)
        }
    added = {token.content for token in backend.get_added_tokens_decoder().values()}

    def say(token_id: int) -> bytes | str | None:
        piece = backend.id_to_token(token_id)
        if piece is None:
            return None
        if tokenizer.byte_level:
            return piece.encode() if piece in added else bytes(inverse[character] for character in piece)
        byte = BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ")

    return say


def written(tokenizer: Tokenizer, token_ids: Sequence[int], *, strip: bool, skip: bool = True) -> str:
    """The text of these tokens: runs of bytes are UTF-8, what is wrong in them is U+FFFD, one first space goes."""
    text, run = "", b""
    for token_id in token_ids:
        said = None if skip and token_id in tokenizer.special_ids else spoken(tokenizer)(token_id)
        if isinstance(said, bytes):
            run += said
        elif said is not None:
            text, run = text + run.decode(errors="replace") + said, b""
    text += run.decode(errors="replace")
    return text[1:] if strip and text.startswith(" ") else text


@pytest.fixture(scope="module")
def kinds(smollm2: Checkpoint) -> dict[str, tuple[Tokenizer, bool]]:
    """Name → tokenizer, and whether its decoder strips the first space."""
    return {
        "byte-level": (Tokenizer.load(smollm2), False),
        "byte fallback": (unigram(strip=False), False),
        "byte fallback, stripped": (unigram(strip=True), True),
    }


KINDS = st.sampled_from(["byte-level", "byte fallback", "byte fallback, stripped"])


def draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Tokens of nasty text with others strewn in: special ones, single bytes, ones outside the vocabulary."""
    ids = tokenizer.encode(data.draw(texts), add_special_tokens=data.draw(st.booleans()))
    others = st.integers(0, 300) | st.sampled_from(sorted(tokenizer.special_ids)) | st.integers(0, len_vocab(tokenizer))
    for place, token_id in data.draw(st.lists(st.tuples(st.integers(0, 60), others), max_size=6)):
        ids.insert(place, token_id)
    return ids[data.draw(st.integers(0, 3)) :]  # may begin within a character


def len_vocab(tokenizer: Tokenizer) -> int:
    return tokenizer.vocab_size + 3


def cut(data: st.DataObject, ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """The same tokens in groups of any sizes, empty ones too."""
    rest = list(ids)
    for size in data.draw(st.lists(st.integers(0, 5), max_size=10)):
        yield rest[:size]
        rest = rest[size:]
    yield rest


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) by definition: the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None


def draw_stops(data: st.DataObject, text: str) -> list[str]:
    """Parts of the text itself, parts of it with another end, and strings that are not in it. No special tokens: they
    stop where they are not shown, too (tests/server/checkpoints/test_tokenizer.py)."""
    start = st.integers(0, max(0, len(text) - 1))
    parts = st.builds(lambda place, length: text[place : place + length], start, st.integers(1, 6))
    stops = data.draw(st.lists(parts | parts.map(lambda part: part + "x") | st.sampled_from(NASTY), max_size=4))
    return [stop for stop in stops if stop and SPECIAL.search(stop) is None]


@budget(150)
@given(data=st.data(), kind=KINDS, skip=st.booleans())
def test_any_tokens_in_any_groups(
    kinds: dict[str, tuple[Tokenizer, bool]], data: st.DataObject, kind: str, skip: bool
) -> None:
    tokenizer, strip = kinds[kind]
    ids = draw_ids(data, tokenizer)
    whole = written(tokenizer, ids, strip=strip, skip=skip)
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    pieces, pushed = [], 0
    for group in cut(data, ids):
        pieces.append(stream.push(group))
        pushed += len(group)
        shown, due = "".join(pieces), written(tokenizer, ids[:pushed], strip=strip, skip=skip)
        held = due.removeprefix(shown)  # what cannot begin one is wrong byte by byte, once the next byte says so
        assert shown + held == due, "what is shown is never taken back"
        assert held in ("", *("\ufffd" * n for n in (1, 2, 3))), "only the beginning of one character is held back"
    pieces.append(stream.finish())
    assert "".join(pieces) == whole
    assert tokenizer.decode(ids, skip_special_tokens=skip) == whole
    if "\ufffd" not in whole or tokenizer.byte_level:  # where bytes that are not UTF-8 may be dropped or multiplied
        assert tokenizer.hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False) == whole


@budget(120)
@given(data=st.data(), kind=KINDS, include=st.booleans())
def test_stop_strings_across_tokens(
    kinds: dict[str, tuple[Tokenizer, bool]], data: st.DataObject, kind: str, include: bool
) -> None:
    tokenizer, strip = kinds[kind]
    ids = draw_ids(data, tokenizer)
    whole = written(tokenizer, ids, strip=strip)
    stops = draw_stops(data, whole)
    found = first_stop(whole, stops)
    stream = TextStream(tokenizer, stops, include_stop=include)
    shown = ""
    for group in cut(data, ids):
        shown += stream.push(group)
        assert whole.startswith(shown), "what is shown is never taken back"
        assert include or not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += stream.finish()
    note(f"{whole!r} {stops} {shown!r}")
    assert stream.stopped == (found is not None)
    assert shown == (whole if found is None else whole[: found[1] if include else found[0]])
    assert stream.push(ids) == stream.finish() == "" or found is None


@budget(100)
@given(data=st.data(), kind=KINDS)
def test_text_and_tokens_of_a_reply(kinds: dict[str, tuple[Tokenizer, bool]], data: st.DataObject, kind: str) -> None:
    tokenizer, strip = kinds[kind]
    ids = draw_ids(data, tokenizer)
    whole = written(tokenizer, ids, strip=strip)
    stops = draw_stops(data, whole)
    transcript = Transcript(tokenizer, stops)
    text, tokens = "", []
    for group in cut(data, ids):
        more, released = transcript.push(group)
        text, tokens = text + more, tokens + released
        if transcript.stopped:
            break
    more, released = transcript.finish()
    text, tokens = text + more, tokens + released
    found = first_stop(whole, stops)
    assert transcript.stopped == (found is not None)
    assert text == (whole if found is None else whole[: found[0]])
    starts = [token.start for token in tokens]
    assert [token.token_id for token in tokens] == ids[: len(tokens)]
    assert starts == sorted(starts)
    assert len(tokens) == len(ids) if found is None else all(start < len(text) for start in starts)


# --- through the server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(serve_module: Any, tiny_checkpoint: Path) -> Iterator[httpx.Client]:
    """A random model: its replies are words, bytes and special tokens at random."""
    url = serve_module(model_id=str(tiny_checkpoint), rope_method="rope", max_model_len=512)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def chat_body(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]}


ENDPOINTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/generate": lambda prompt: {"prompt": prompt},
    "/v1/completions": lambda prompt: {"prompt": prompt, "n": 2},
    "/v1/chat/completions": lambda prompt: {**chat_body(prompt), "n": 2},
}


def whole_reply(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """Choice → (text, finish reason)."""
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    reply = response.json()
    choices = reply.get("choices", [reply])
    return {
        choice.get("index", 0): (
            choice["message"]["content"] if "message" in choice else choice["text"],
            choice["finish_reason"],
        )
        for choice in choices
    }


def streamed_reply(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """The same, of the events; each of them is UTF-8 and JSON by itself."""
    response = http.post(path, json={**body, "stream": True})
    frames = [frame for frame in response.content.split(b"\n\n") if frame.startswith(b"data: ")]
    assert frames[-1] == b"data: [DONE]"
    text: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for frame in frames[:-1]:
        event = json.loads(frame.removeprefix(b"data: ").decode())
        for choice in event.get("choices", [{**event, "index": 0}]):
            index = choice["index"]
            piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            text[index] = text.get(index, "") + (piece or "")
            if choice.get("finish_reason"):
                reasons[index] = choice["finish_reason"]
    return {index: (text[index], reasons[index]) for index in text}


@pytest.mark.parametrize("path", ENDPOINTS)
@budget(3)
@given(data=st.data(), prompt=texts.filter(str.strip), seed=st.integers(0, 2**32))
def test_streamed_replies_equal_whole_ones(
    http: httpx.Client, path: str, data: st.DataObject, prompt: str, seed: int
) -> None:
    body = {**ENDPOINTS[path](f"a{prompt}"), "seed": seed, "max_tokens": 16, "ignore_eos": True}
    free = whole_reply(http, path, body)
    assert streamed_reply(http, path, body) == free
    stops = draw_stops(data, "".join(text for text, _ in free.values()))
    stopped = whole_reply(http, path, {**body, "stop": stops})
    assert streamed_reply(http, path, {**body, "stop": stops}) == stopped
    for index, (text, _) in free.items():
        found = first_stop(text, stops)
        assert stopped[index] == ((text, "length") if found is None else (text[: found[0]], "stop"))


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_stop_string_that_the_end_completes(
    http: httpx.Client, kinds: dict[str, tuple[Tokenizer, bool]], path: str
) -> None:
    """Half a character becomes U+FFFD when no more tokens come; whoever stops there is told that it was a stop."""
    tokenizer, _ = kinds["byte-level"]
    half = next(token_id for token_id in range(300) if tokenizer.token_bytes(token_id) == b"\xe2")
    body = {**ENDPOINTS[path]("Go on"), "logit_bias": {str(half): 100}, "temperature": 0, "max_tokens": 1}
    assert set(whole_reply(http, path, body).values()) == {("\ufffd", "length")}
    for reply in (whole_reply, streamed_reply):
        assert set(reply(http, path, {**body, "stop": ["\ufffd"]}).values()) == {("", "stop")}
