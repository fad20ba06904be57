"""Text to token ids and back, whole and as a stream. Knows transformers' tokenizers; neither the engine nor HTTP.

`TextStream` turns the tokens of one sequence into text as they come and finds stop strings. Its pieces, joined, are
the text that the non-streamed reply carries, byte for byte, however the tokens were grouped.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prerope.server.errors import ConfigurationError
from prerope.server.models.end_tokens import end_tokens
from prerope.server.models.tokenizer_files import beyond_the_model, limit_words, processor_template, why_unread

if TYPE_CHECKING:
    from prerope.server.models.checkpoint import Checkpoint

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(self, hf: Any, end_tokens: Mapping[int, str] | None = None) -> None:
        """end_tokens: id → who names it, of the tokens that end a reply."""
        self._hf = hf
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()  # once, here: changing it while another thread encodes is an error
        self._backend.no_padding()
        self._bytes: dict[int, bytes] = {}  # these two have an entry a token at most
        self._strings: dict[int, str] = {}
        decoder_types = _decoder_types(self._backend)
        self.byte_level = decoder_types == {"ByteLevel"}  # tokens are byte strings (GPT-2, Llama 3, Qwen)
        self.byte_fallback = "ByteFallback" in decoder_types  # some tokens are single bytes, `<0xE2>` (Llama 2, Gemma)
        self._special = {i: str(token.content) for i, token in hf.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(self._special)
        self.end_tokens = dict(end_tokens or {})
        self.template_fault: str | None = None
        """Why the chat template is not to be run, where that was found out."""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Raises ConfigurationError if the checkpoint has no tokenizer of the `tokenizers` kind."""
        from transformers import AutoTokenizer

        known = {} if checkpoint.gguf_file else {"config": checkpoint.config()}
        try:
            hf = AutoTokenizer.from_pretrained(
                checkpoint.source,
                revision=checkpoint.revision,
                **known,
                trust_remote_code=False,
                **({"gguf_file": checkpoint.gguf_file} if checkpoint.gguf_file else {}),
            )
        except Exception as error:  # a damaged file makes transformers and tokenizers raise whatever they meet
            raise ConfigurationError(
                f"{checkpoint.name}: its tokenizer cannot be read: {why_unread(error, checkpoint)}"
            ) from error
        if getattr(hf, "backend_tokenizer", None) is None:
            raise ConfigurationError(
                f"{checkpoint.name}: no fast tokenizer ({type(hf).__name__}); a tokenizer.json is needed."
            )
        if len(hf) <= sum(1 for one in hf.added_tokens_decoder.values() if one.special):
            raise ConfigurationError(
                f"{checkpoint.name}: its tokenizer has {len(hf)} tokens, none of which stands for text: tokenizer.json "
                "is damaged, or of another program; download it again"
            )
        if (beyond := beyond_the_model(hf, checkpoint)) is not None:
            raise ConfigurationError(f"{checkpoint.name}: {beyond}")
        if not hf.chat_template:
            hf.chat_template = processor_template(Path(checkpoint.source))
        if isinstance(hf.chat_template, str):
            hf.chat_template = hf.chat_template.removeprefix("\ufeff")  # which an editor put there, and no prompt has
        limit_words(hf)
        return cls(hf, end_tokens(checkpoint, hf))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._hf, self.end_tokens)

    @property
    def hf(self) -> Any:
        """transformers' tokenizer itself, for libraries that read it."""
        return self._hf

    @cached_property
    def backend_json(self) -> str:
        """The whole tokenizer as text, for libraries that read it."""
        return str(self._backend.to_str())

    @property
    def eos_token_id(self) -> int | None:
        """The one end-of-sequence token that the tokenizer itself names."""
        token_id: int | None = self._hf.eos_token_id
        return token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.end_tokens)

    @property
    def vocab_size(self) -> int:
        return len(self._hf)

    @cached_property
    def max_chars_per_token(self) -> int:
        """Characters that the longest token stands for: a longer prompt than this × max_model_len cannot fit."""
        return max(len(piece) for piece in self._backend.get_vocab(with_added_tokens=True))

    def special_id(self, text: str) -> int | None:
        """The special token that is written so."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def special_tokens_in(self, texts: Sequence[str], token_ids: frozenset[int]) -> dict[int, str]:
        """Those of these special tokens that are written in one of `texts`, each with its text."""
        if not texts:
            return {}
        written = {token_id: self._special[token_id] for token_id in token_ids}
        return {token_id: piece for token_id, piece in written.items() if any(piece in text for text in texts)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The whole text. The same as transformers' decode, except that a run of byte tokens which is not UTF-8 keeps
        its valid characters, as a stream must, instead of losing them with the invalid ones."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        if "\ufffd" not in text or not self.byte_fallback:
            return text
        stream = TextStream(self, skip_special_tokens=skip_special_tokens)
        return stream.push(token_ids) + stream.finish()

    def raw_decode(self, token_ids: list[int]) -> str:
        """transformers' decode, special tokens included."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, on its own: part of a character perhaps. Empty outside the vocabulary."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._compute_bytes(token_id)
        return self._bytes[token_id]

    def _compute_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.byte_level:  # a token with any other character stands for itself
            values = [BYTE_LEVEL.get(character) for character in piece]
            return piece.encode() if None in values else bytes(value for value in values if value is not None)
        match = BYTE_TOKEN.fullmatch(piece) if self.byte_fallback else None
        return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()

    def token_string(self, token_id: int) -> str:
        """The token as text; where its bytes are none by themselves, as OpenAI writes them: `bytes:\\xe2\\x80`."""
        if token_id not in self._strings:
            data = self.token_bytes(token_id)
            try:
                self._strings[token_id] = data.decode()
            except UnicodeDecodeError:
                self._strings[token_id] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self._strings[token_id]

    def is_byte(self, token_id: int) -> bool:
        """Whether this is a byte-fallback token."""
        piece = self._backend.id_to_token(token_id) if self.byte_fallback else None
        return piece is not None and BYTE_TOKEN.fullmatch(piece) is not None

    def is_known(self, token_id: int) -> bool:
        """Models often have more logits than the vocabulary has tokens; such an id has no text."""
        return self._backend.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def described(self) -> dict[str, Any]:
        """What tokenizer_config.json says, and the chat template, as vLLM tells it; without paths of this machine."""
        said = json.loads(json.dumps(self._hf.init_kwargs, default=str))
        ours = ("name_or_path", "is_local", "local_files_only", "backend")
        kept = {name: value for name, value in said.items() if not name.endswith("_file") and name not in ours}
        special = {name: str(token) for name, token in self._hf.special_tokens_map.items() if isinstance(token, str)}
        named = self._hf.chat_template
        whole = named.get("default") if isinstance(named, dict) else named  # a model may have others alone
        template = {"chat_template": str(whole)} if whole else {}
        return {**kept, **special, **template, "tokenizer_class": type(self._hf).__name__}


class TextStream:
    """The text of one sequence, token by token, cut at the first stop string.

    Text is held back while its last character is incomplete, and while its end may be the beginning of a stop string.
    Of several stop strings the one that is complete first wins; of those complete at once, the longest. A special token
    that a stop string holds is read with the text, though it is not shown. Work per token does not grow with the
    output.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_special_ids: frozenset[int] = frozenset(),
        may_stop: Callable[[str], bool] | None = None,
        min_tokens: int = 0,
    ) -> None:
        """shown_special_ids: special tokens that are text all the same. may_stop: whether a stop string may end the
        text before it, which is the argument. min_tokens: none ends within the text of that many."""
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._skip = tokenizer.special_ids - shown_special_ids if skip_special_tokens else frozenset[int]()
        self._read_unseen = tokenizer.special_tokens_in(self._stop, self._skip)
        self._may_stop = may_stop
        self._num_unsearched = min_tokens  # tokens to come in whose text no stop string ends
        self._released = ""  # kept for `may_stop` alone
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None
        self._held = ""
        self._searched_from = 0  # no stop string ends in the first so many characters of `_held`
        self._unseen: list[tuple[int, int]] = []  # stretches of `_held` that are special tokens, not to be shown
        self.stopped = False
        self.stop_string: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain; empty once `stopped`."""
        released = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self._num_unsearched -= 1
            if token_id not in self._skip:
                released += self._release(self._text_of(token_id))
            elif token_id in self._read_unseen:
                released += self._release(self._read_unseen[token_id], unseen=True)
        return released

    def finish(self) -> str:
        """The text that was held back. Call once, after the last push."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        return text + self._cut(len(self._held))

    def _text_of(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        if tokenizer.byte_level:
            return self._utf8.decode(tokenizer.token_bytes(token_id))
        if not tokenizer.is_known(token_id):
            return ""
        previous, self._previous = self._previous, token_id
        if tokenizer.is_byte(token_id):
            byte = tokenizer.token_bytes(token_id)
            first_space = previous is None and byte == b" "  # which the decoder may strip
            return tokenizer.raw_decode([token_id]) if first_space else self._utf8.decode(byte)
        # A decoder may treat the first token apart (strip its space), so a token is read after its predecessor.
        before = "" if previous is None else tokenizer.raw_decode([previous])
        after = tokenizer.raw_decode([token_id] if previous is None else [previous, token_id])
        return self._utf8.decode(b"", final=True) + after[len(before) :]

    def _release(self, text: str, *, unseen: bool = False) -> str:
        if unseen:
            self._unseen.append((len(self._held), len(self._held) + len(text)))
        self._held += text
        if self._num_unsearched >= 0:
            self._searched_from = len(self._held)
        if match := self._first_stop(self._held):
            start, end = match
            self.stop_string = self._held[start:end]
            stop = self.stop_string if self._include_stop else ""
            text = self._cut(start) + stop
            self.stopped, self._held, self._unseen = True, "", []
            return text
        released = self._cut(len(self._held) - self._possible_stop(self._held))
        if self._may_stop is not None:
            self._released += released
        return released

    def _cut(self, length: int) -> str:
        """Take the first `length` characters from what is held, and return what is to be seen of them."""
        seen = self._seen(length)
        self._held = self._held[length:]
        self._searched_from = max(0, self._searched_from - length)
        if self._unseen:
            shifted = ((max(start - length, 0), end - length) for start, end in self._unseen)
            self._unseen = [(start, end) for start, end in shifted if end > 0]
        return seen

    def _seen(self, length: int) -> str:
        """The first `length` characters of what is held, without special tokens."""
        pieces, position = [], 0
        for start, end in self._unseen:
            pieces.append(self._held[position : min(start, length)])
            position = min(end, length)
        return "".join(pieces) + self._held[position:length]

    def _first_stop(self, buffer: str) -> tuple[int, int] | None:
        """(start, end) of the stop string that ends first."""
        if self._may_stop is not None:
            return self._first_allowed_stop(buffer, self._may_stop)
        first = self._searched_from + 1  # where one may end
        starts = [(stop, buffer.find(stop, max(0, first - len(stop)))) for stop in self._stop]
        found = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _first_allowed_stop(self, buffer: str, may_stop: Callable[[str], bool]) -> tuple[int, int] | None:
        """The same among the stop strings that may end the text before them."""
        pairs = ((stop, start) for stop in self._stop for start in range(len(buffer)))
        for end, start in sorted((start + len(stop), start) for stop, start in pairs if buffer.startswith(stop, start)):
            if end > self._searched_from and may_stop(self._released + self._seen(start)):
                return start, end
        return None

    def _possible_stop(self, buffer: str) -> int:
        """Length of the longest end of the buffer that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if stop[length - 1] == buffer[-1] and buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _decoder_types(backend: Any) -> set[str]:
    """The kinds of decoder that a tokenizer chains; `Sequence` itself left out."""
    state = backend.decoder.__getstate__() if backend.decoder is not None else b"{}"
    found = set(re.findall(r'"type":\s*"(\w+)"', bytes(state).decode()))
    return found - {"Sequence"}
