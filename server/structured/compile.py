"""Grammars by llguidance: JSON schemas, regular expressions and Lark grammars, compiled for one tokenizer and kept.

Compiling takes milliseconds to seconds and happens on a thread, one at a time; clients send the same schema again and
again, so what was compiled is kept, least recently used last. The engine gets `CompiledGrammar`, which it knows as
`server.engine.sampling.mask.Grammar`.

JSON may be compact, on one line with spaces, or indented; whitespace is bounded, so that a model cannot fill its reply
with it and a bounded schema has a longest reply. A schema's own `x-guidance` key is overruled in that.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prerope.server.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from prerope.server.tokenizer import Tokenizer

MAX_GRAMMAR_CHARS = 65_536
"""Of a schema, as JSON, or of the text of a regex or grammar: the choices or tools of one request together."""

STACK_BYTES = 512 * 2**20
"""llguidance follows rules and references by recursion, some 8 KiB a level, and a stack overflow ends the process.
A chain of one rule in six characters fits into this five times over; pages that are not touched cost nothing."""

MAX_REASON_CHARS = 300
MAX_COMPILED = 64

MAX_LEXER_STATES = 30_000
"""Of one sequence, at 1–2 KiB each; llguidance's own 250 000 would be half a gigabyte."""

JSON_WHITESPACE = r"[ ]|\r?\n[ \t]{0,32}"
"""At most this at each place where JSON allows whitespace."""

Kind = Literal["json", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class GrammarText:
    """What a client asks for: `text` is a JSON schema, a regex or a grammar. `param` is the request's field."""

    kind: Kind
    text: str
    param: str = field(compare=False)
    compact: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidRequest where it is too long."""
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                f"'{self.param}' has {len(self.text)} characters; at most {MAX_GRAMMAR_CHARS} make a grammar",
                param=self.param,
                code="grammar_too_large",
            )


def json_text(value: Any, param: str) -> str:
    """`value` as JSON. A body may nest deeper than Python can write."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidRequest(
            f"'{param}' nests too deep to be compiled", param=param, code="grammar_too_large"
        ) from None


def json_options(compact: bool = False) -> dict[str, Any]:
    """What llguidance is told about whitespace in JSON (its `x-guidance`)."""
    return {"whitespace_flexible": False} if compact else {"whitespace_pattern": JSON_WHITESPACE}


class TokenMatcher:
    """llguidance's matcher as the engine's `Matcher`."""

    __slots__ = ("_failure", "_inner")

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner
        self._failure = ""

    def mask(self) -> bytes:
        return self._inner.compute_bitmask()

    def accept(self, token_id: int) -> None:
        if not self._inner.consume_token(token_id) and not self._inner.is_error():
            self._failure = "a token was drawn that it forbids"

    @property
    def accepting(self) -> bool:
        return self._inner.is_accepting()

    @property
    def finished(self) -> bool:
        return self._inner.is_stopped()

    @property
    def failure(self) -> str:
        return _shorten(self._inner.get_error()) if self._inner.is_error() else self._failure


class CompiledGrammar:
    """A grammar over one tokenizer's tokens. Safe to share: a matcher is a copy."""

    __slots__ = ("_prototype", "_tokenizer")

    def __init__(self, prototype: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._prototype = prototype
        self._tokenizer = tokenizer

    def matcher(self) -> TokenMatcher:
        return TokenMatcher(self._prototype.deep_copy())

    def prefix(self) -> Prefix:
        return Prefix(self._prototype.deep_copy(), self._tokenizer)


class Prefix:
    """Tells whether the reply's text up to a place is complete by the grammar; places come in rising order."""

    def __init__(self, inner: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._start = inner
        self._tokenizer = tokenizer
        self._inner = inner.deep_copy()
        self._num_read = 0

    def complete(self, text: str) -> bool:
        """Whether `text`, the reply so far, could be the whole reply. Work is for what is new since the last call."""
        if len(text) < self._num_read:
            self._inner, self._num_read = self._start.deep_copy(), 0
        new = self._tokenizer.greedy_tokenize(text[self._num_read :])
        self._num_read = len(text)
        return self._inner.consume_tokens(new) and self._inner.is_accepting()


class Grammars:
    """Compiles and keeps grammars. The tokenizer's tables are built at the first one, once."""

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        self._get_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[GrammarText, CompiledGrammar] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()

    async def compile(self, wanted: GrammarText) -> CompiledGrammar:
        """InvalidRequest, with llguidance's reason, for what it cannot compile."""
        if wanted not in self._kept:
            async with self._one_at_a_time:  # of two with the same schema, the second finds it kept
                if wanted not in self._kept:
                    self._kept[wanted] = await asyncio.to_thread(_on_a_deep_stack, self._compile, wanted)
        self._kept.move_to_end(wanted)
        grammar = self._kept[wanted]
        if len(self._kept) > MAX_COMPILED:
            self._kept.popitem(last=False)
        return grammar

    def _compile(self, wanted: GrammarText) -> CompiledGrammar:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = token_tables(self._get_tokenizer(), wanted.param)
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, _to_llguidance(wanted), log_level=0, limits=limits)
        except ValueError as error:
            raise _refusal(wanted, str(error)) from None
        matcher.compute_bitmask()  # the first is the slowest, and copies begin with what it found
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        return CompiledGrammar(matcher, self._tokenizer)


def token_tables(tokenizer: Tokenizer, param: str) -> LLTokenizer:
    """The vocabulary as llguidance wants it: about a second for a large one. InvalidRequest where it cannot read it."""
    from llguidance import hf

    try:
        return hf.from_tokenizer(tokenizer.hf)
    except Exception as error:
        raise InvalidRequest(
            f"'{param}' is not supported with this model: llguidance cannot read its tokenizer "
            f"({_shorten(str(error))})",
            param=param,
            code="unsupported_field",
        ) from error


def _to_llguidance(wanted: GrammarText) -> str:
    """The grammar in llguidance's own form; a Lark grammar may also be written in llama.cpp's GBNF."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if wanted.kind == "json":
        options: Any = json_options(wanted.compact)
        return LLMatcher.grammar_from_json_schema(wanted.text, overrides=options)
    if wanted.kind == "regex":  # with \d as 0 to 9: what matches so does in every client's dialect
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(wanted.text, 'd')}/")
    return grammar_from("grammar", wanted.text)


def _refusal(wanted: GrammarText, reason: str) -> InvalidRequest:
    names = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}
    return InvalidRequest(
        f"'{wanted.param}' is no {names[wanted.kind]} that can be compiled: {_shorten(reason)}",
        param=wanted.param,
        code="bad_grammar",
    )


def _shorten(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"


def _on_a_deep_stack(function: Callable[[GrammarText], CompiledGrammar], wanted: GrammarText) -> CompiledGrammar:
    """`function(wanted)` on a thread of its own."""
    result: Future[CompiledGrammar] = Future()

    def run() -> None:
        try:
            result.set_result(function(wanted))
        except BaseException as error:
            result.set_exception(error)

    before = threading.stack_size(STACK_BYTES)  # of threads started from now on
    try:
        thread = threading.Thread(target=run, name="grammar")
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    return result.result()
