"""llguidance's compiler: JSON schemas, regular expressions and Lark grammars for one tokenizer.

JSON may be compact, on one line with spaces, or indented; whitespace is bounded, so that a model cannot fill its reply
with it and a bounded schema has a longest reply. A schema's own `x-guidance` key is overruled in that.

What compiling takes cannot be told from the text: 45 characters of a schema can ask for minutes and for more memory
than there is. So each grammar is compiled on trial first, as a `Trial` in a process that can be killed, and then here,
at a cost that is known.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prerope.server.errors import InvalidRequest
from prerope.server.structured.matcher import QUICK_S, CompiledGrammar, shorten
from prerope.server.structured.rules import check_rules
from prerope.server.structured.text import GrammarText, Within, json_options
from prerope.server.structured.unique.follow import Part
from prerope.server.structured.unique.items import MARK
from prerope.server.structured.unique.mask import token_texts, vocabulary
from prerope.server.structured.unique.places import Place, Places
from prerope.server.structured.unique.seen import Language

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from prerope.server.tokenizer import Tokenizer

T = TypeVar("T")

STACK_BYTES = 512 * 2**20
"""llguidance follows rules and references by recursion, some 8 KiB a level, and a stack overflow ends the process.
A chain of one rule in six characters fits into this five times over; pages that are not touched cost nothing."""

MAX_COMPILED_BYTES = 64 * 2**20
"""Of one grammar, with its first mask."""

LEAST_BYTES = 32 * 2**10
"""What any grammar is counted as."""

MAX_LEXER_STATES = 30_000
"""Of one sequence, at 1–2 KiB each; llguidance's own 250 000 would be half a gigabyte."""

PAGE_BYTES = 4096

ONE_OF = (
    "'oneOf' has branches that may both match one value, which a grammar cannot rule out: write 'anyOf' instead, or "
    "tell the branches apart by a required property with another 'const' in each"
)
"""In place of llguidance's words, which name a remedy that no client has."""


class HasTokenizer(Protocol):
    """What a trial needs of the workers' world."""

    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True, slots=True)
class Cost:
    """What compiling a grammar took, and computing its first mask."""

    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Trial:
    """A task for a worker: compile a grammar and say what that took. InvalidRequest for what cannot be compiled."""

    wanted: GrammarText

    def run(self, world: HasTokenizer) -> Cost:
        cost = on_a_deep_stack(lambda: self._measured(world.tokenizer)).result()
        num_bytes = cost.num_bytes
        if num_bytes > MAX_COMPILED_BYTES:
            raise InvalidRequest(
                f"'{self.wanted.param}' takes {num_bytes // 2**20} MiB of memory once it is compiled; at most "
                f"{MAX_COMPILED_BYTES // 2**20} MiB are accepted",
                param=self.wanted.param,
                code="grammar_too_large",
            )
        return cost

    def _measured(self, tokenizer: Tokenizer) -> Cost:
        warm_up(tokenizer)  # the pages that any grammar touches are not this one's
        tables = token_tables(tokenizer, self.wanted.param)
        if MARK in self.wanted.text:
            token_texts(tables)  # nor is this table, of which a process has one
        before, began = resident_bytes(), time.perf_counter()
        made = new_matcher(self.wanted, tables), differing_parts(self.wanted, tables)
        cost = Cost(max(resident_bytes() - before, LEAST_BYTES), time.perf_counter() - began)
        del made
        return cost


def compile_here(wanted: GrammarText, tokenizer: Tokenizer, cost: Cost) -> CompiledGrammar:
    """The grammar, in this process. For what a trial has shown to be cheap."""
    tables = token_tables(tokenizer, wanted.param)
    matcher = new_matcher(wanted, tables, on_trial=False)
    began = time.perf_counter()
    matcher.deep_copy().compute_bitmask()
    slow = time.perf_counter() - began > QUICK_S
    if parts := differing_parts(wanted, tables):
        vocabulary(tables)  # now, on this thread: its matchers are made on the engine's
    return CompiledGrammar(matcher, tables, cost.num_bytes, slow=slow, parts=parts)


def differing_parts(wanted: GrammarText, tables: LLTokenizer) -> list[Part]:
    """The JSON documents within, where values must differ in one of them; schemas without a mark are not read.
    InvalidRequest where the tokenizer lacks what that takes."""
    given = (Within((), (), wanted.text),) if wanted.kind == "json" else wanted.within
    if not any(MARK in one.schema for one in given):
        return []
    words = token_texts(tables)
    if not words.is_whole:
        raise InvalidRequest(
            f"'{wanted.param}' asks for values that differ ('uniqueItems', 'minProperties'), which is not supported "
            "with this model: its tokenizer has no token for some single characters",
            param=wanted.param,
            code="unsupported_field",
        )

    @cache
    def language(mark: str) -> Language:
        said = json.loads(mark)
        matcher = new_matcher(GrammarText("json", json.dumps(said["schema"]), wanted.param), tables, on_trial=False)
        return Language(matcher, tables, words.bytes, endless=said["endless"], decimals=said["decimals"])

    def places(schema: str) -> Place | None:
        return Places(json.loads(schema), lambda mark: language(json.dumps(mark))).root if MARK in schema else None

    return [Part(words.spelled(one.head), words.spelled(one.next_head), places(one.schema)) for one in given]


def new_matcher(wanted: GrammarText, tables: LLTokenizer, *, on_trial: bool = True) -> LLMatcher:
    """One whose first mask is computed: it is the slowest, and copies begin with what it found. on_trial: nothing has
    been found out about the grammar before."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    try:
        matcher = LLMatcher(tables, _to_llguidance(wanted, on_trial=on_trial), log_level=0, limits=limits)
    except ValueError as error:
        raise _refusal(wanted, str(error)) from None
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(wanted, matcher.get_error())
    return matcher


def token_tables(tokenizer: Tokenizer, param: str) -> LLTokenizer:
    """The vocabulary as llguidance wants it: half a second for a middling one, with the interpreter's lock held, so a
    server asks for it while it loads. InvalidRequest where llguidance cannot read the tokenizer."""
    tables = _tables(tokenizer.backend_json, tokenizer.eos_token_id)
    if isinstance(tables, str):
        raise InvalidRequest(
            f"'{param}' is not supported with this model: llguidance cannot read its tokenizer ({tables})",
            param=param,
            code="unsupported_field",
        )
    return tables


def prepare_tables(tokenizer: Tokenizer) -> None:
    """Build them now, for later."""
    _tables(tokenizer.backend_json, tokenizer.eos_token_id)


def warm_up(tokenizer: Tokenizer) -> None:
    """Build the tables and compile something."""
    with contextlib.suppress(InvalidRequest):
        new_matcher(GrammarText("json", "{}", "json_schema"), token_tables(tokenizer, "json_schema"))


@lru_cache(maxsize=1)
def _tables(backend: str, eos_token_id: int | None) -> LLTokenizer | str:
    """The tables of the one tokenizer of a process, or why there are none."""
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(backend, eos_token=eos_token_id)
    except Exception as error:
        return shorten(str(error))


def resident_bytes() -> int:
    """Memory of this process that is in use; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
    except OSError:
        return 0


def on_a_deep_stack(function: Callable[[], T]) -> Future[T]:
    """`function()` on a thread of its own, which nobody waits for at exit."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # whoever waits for it may leave, and it cannot be stopped

    def run() -> None:
        try:
            value = function()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)

    with _stack_size:
        before = threading.stack_size(STACK_BYTES)  # of threads started from now on
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return result


_stack_size = threading.Lock()


def _to_llguidance(wanted: GrammarText, *, on_trial: bool) -> str:
    """The grammar in llguidance's own form; a Lark grammar may also be written in llama.cpp's GBNF."""
    from llguidance import LLMatcher, regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    if wanted.kind == "json":
        options: Any = json_options(wanted.compact)
        return LLMatcher.grammar_from_json_schema(wanted.text, overrides=options)
    if wanted.kind == "regex":  # with \d as 0 to 9: what matches so does in every client's dialect
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(wanted.text, 'd')}/")
    try:
        lark = any_to_lark(wanted.text)
    except Exception as error:  # of its own kind, and of Python's where it nests too deep
        raise ValueError(f"it cannot be read as GBNF: {error}") from None
    if on_trial:  # it holds the interpreter's lock
        check_rules(lark)
    return LLMatcher.grammar_from_lark(lark)


def _refusal(wanted: GrammarText, reason: str) -> InvalidRequest:
    reason = ONE_OF if "coerce_one_of" in reason else reason
    names = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}
    return InvalidRequest(
        f"'{wanted.param}' is no {names[wanted.kind]} that can be compiled: {shorten(reason)}",
        param=wanted.param,
        code="bad_grammar",
    )
