"""From the bytes of a body to all that its endpoint needs: decoded, checked, lowered, rendered and tokenised.

    bytes ─ parsed ─ a body (`requests.schemas`, dialects) ─ lowered: GenerationRequest ─ prepare: token ids ─ Read

All of this is work of the client's size, so it is plain functions that know no event loop. A small body is read where
it came; a larger one is read by a worker, which sends back a `Read` without the text that the ids stand for. Imports
no torch. Refusals name limit and value.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from prerope.server.api.chat.prompt import chat_prompt, newest_that_fit
from prerope.server.api.chat.tools import ToolUse
from prerope.server.api.openai.schemas import CompletionRequest
from prerope.server.api.requests.body import MAX_DEPTH, RequestBody, in_words_of
from prerope.server.api.requests.documents import Piece, TokenizedPrompt, assembled, not_cut
from prerope.server.api.requests.internal import Chat, GenerationRequest, Prompt
from prerope.server.api.requests.surrogates import ESCAPED_SURROGATE, refuse_surrogates
from prerope.server.api.requests.tokenize import DetokenizeRequest, TokenizeRequest
from prerope.server.api.requests.wording import MAX_SHOWN, first_invalid, shown_number
from prerope.server.errors import TOO_LONG, InvalidRequest, ModelNotFound
from prerope.server.nesting import nests_deeper
from prerope.server.structured.text import GrammarText
from pydantic import ValidationError

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer

B = TypeVar("B", bound=RequestBody)

MAX_BAD_TOKENS = 4096
"""Of all bad words together: at each draw as many may be compared, if a reply is made of them."""

TOO_DEEP = f"The body is nested too deeply: at most {MAX_DEPTH} lists and objects may stand within each other."


@dataclass(frozen=True, slots=True)
class ModelText:
    """What turning text into ids depends on. Workers have a copy.

    served_names: what clients may call the model; `any_name`: or whatever they like.
    """

    tokenizer: Tokenizer
    served_names: tuple[str, ...]
    any_name: bool
    max_model_len: int
    vocab_size: int

    def check_name(self, model: str | None) -> None:
        """The `model` field names the served model, or is missing or empty. The only model takes any name, unless
        SERVED_MODEL_NAME is set: then it takes those."""
        if model and not self.any_name and model not in self.served_names:
            raise self.not_served(model)

    def not_served(self, model: str) -> ModelNotFound:
        served = " and ".join(f"'{name}'" for name in self.served_names)
        return ModelNotFound(
            f"the model '{model[:MAX_SHOWN]}' is not served here; this server serves {served}",
            param="model",
            code="model_not_found",
        )

    def check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        """InvalidRequest unless every id is in the model's vocabulary. `param` names the request's field."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            index, wrong = next((i, token) for i, token in enumerate(token_ids) if not 0 <= token < self.vocab_size)
            raise InvalidRequest(
                f"'{param}[{index}]' is {shown_number(wrong)}; the model's token ids go from 0 to "
                f"{self.vocab_size - 1}",
                param=param,
                code="bad_token_id",
            )

    def max_tokens_that_fit(self, num_prompt_tokens: int, max_tokens: int | None, default: int | None) -> int:
        """Tokens to generate: as asked, or refused; where nothing is asked the default as far as it fits, None: all."""
        room = self.max_model_len - num_prompt_tokens
        if max_tokens is None and room >= 1:
            return room if default is None else min(default, room)
        if max_tokens is not None and max_tokens <= room:
            return max_tokens
        wanted = "leaves no room to generate" if max_tokens is None else f"max_tokens is {max_tokens}"
        raise InvalidRequest(
            f"the prompt has {_plural(num_prompt_tokens, 'token')} and {wanted}: prompt and output together may have "
            f"{_plural(self.max_model_len, 'token')}; shorten the prompt, lower max_tokens or raise MAX_MODEL_LEN",
            param="prompt" if room < 1 else "max_tokens",
            code=TOO_LONG,
        )

    def check_characters(self, num_chars: int, param: str) -> None:
        """Refuse what cannot fit whatever its words are, before spending time on tokenising it."""
        limit = self.max_model_len * self.tokenizer.max_chars_per_token
        if num_chars > limit:
            raise InvalidRequest(
                f"'{param}' has {num_chars} characters; at most {limit} can fit into {self.max_model_len} tokens "
                "(MAX_MODEL_LEN raises it)",
                param=param,
                code=TOO_LONG,
            )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `running.start` needs of a request beside its fields.

    Attributes:
        tools: how a chat's reply may call tools.
        constraint: what the reply has to match.
        bad_token_ids: what may not be drawn one after another.
        allowed_token_ids: each once; None: all are.
    """

    prompts: Sequence[TokenizedPrompt]
    tools: ToolUse | None = None
    constraint: GrammarText | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: array[int] | None = None


@dataclass(frozen=True, slots=True)
class Read(Generic[B]):
    """A body that was read: what it asks for, or (/tokenize, /detokenize) the reply itself.

    ignored: fields that a worker left out, for the report of whoever asked.
    """

    body: B
    request: GenerationRequest | None = None
    prepared: Prepared | None = None
    reply: bytes = b""
    ignored: Sequence[str] = ()

    @property
    def ready(self) -> tuple[GenerationRequest, Prepared]:
        """The request and its prompts; only for bodies that ask for a reply."""
        assert self.request is not None
        assert self.prepared is not None
        return self.request, self.prepared


def read_body(model: type[B], raw: bytes, text: ModelText) -> Read[B]:
    """Raises InvalidRequest or ModelNotFound."""
    value = parsed(raw)
    try:
        body: Any = model.schema_of(value).model_validate(value)
    except ValidationError as error:
        raise first_invalid(error.errors()) from None
    del value
    if isinstance(body, TokenizeRequest):
        return Read(body, reply=_tokenize(text, body))  # type: ignore[arg-type]
    if isinstance(body, DetokenizeRequest):
        return Read(body, reply=_detokenize(text, body))  # type: ignore[arg-type]
    if not hasattr(body, "lowered"):  # it asks about the model, and for nothing of it
        return Read(body)
    try:
        with in_words_of(body):
            request: GenerationRequest = body.lowered()
            prepared = prepare(text, request)
    except RecursionError:  # of a template's, say
        raise InvalidRequest(TOO_DEEP, code="invalid_json") from None
    if isinstance(body, CompletionRequest) and body.echo:  # as it was given, or as its ids read
        body.prompt = [one if isinstance(one, str) else text.tokenizer.decode(one) for one in body.prompt]
    return Read(body, request, prepared)


def parsed(raw: bytes) -> Any:
    """JSON. What it cannot be is told by name, without a word of it."""
    try:
        value = json.loads(raw.decode("utf-8-sig") if raw else "null")
    except json.JSONDecodeError as error:
        message = f"The body is not valid JSON: {error.msg} at character {error.pos}."
    except UnicodeDecodeError as error:
        message = f"The body is not valid UTF-8: at byte {error.start}."
    except RecursionError:
        message = TOO_DEEP
    except ValueError:  # of Python's own limit to what takes quadratic time
        message = f"The body holds a number of more than {sys.get_int_max_str_digits()} digits."
    else:
        if not isinstance(value, dict):
            raise InvalidRequest("The body must be a JSON object.", code="invalid_body")
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and nests_deeper(value, MAX_DEPTH):
            raise InvalidRequest(TOO_DEEP, code="invalid_json")
        if ESCAPED_SURROGATE.search(raw):
            refuse_surrogates(value)
        return value
    raise InvalidRequest(message, code="invalid_json")


def prepare(text: ModelText, request: GenerationRequest) -> Prepared:
    """All that depends on the model's text side."""
    text.check_name(request.model)
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        text.check_vocabulary(list(getattr(request.sampling, name) or ()), name)
    given, cut = request.input, request.truncation is not None
    bad, allowed = bad_token_ids(text, request.sampling.bad_words), allowed_token_ids(request)
    if not isinstance(given, Chat):
        read = [tokenized(text, prompt, to_be_cut=cut) for prompt in given]
        prompts = [TokenizedPrompt(truncated(text, one.ids, request), one.documents) for one in read]
        return Prepared(prompts, None, request.constraint, bad, allowed)
    use = ToolUse.of(text.tokenizer, given)
    constraint = _constraint(request, use)
    tools = () if use is None else use.for_template
    if given.leaves_out_oldest:
        read_chat = newest_that_fit(text, given, request.sampling.max_tokens, tools=tools)
    else:
        read_chat = chat_prompt(text, given, tools=tools, to_be_cut=cut)
    prompt = TokenizedPrompt(truncated(text, read_chat.ids, request), read_chat.documents)
    return Prepared([prompt], use, constraint, bad, allowed)


def tokenized(text: ModelText, prompt: Prompt, *, to_be_cut: bool = False) -> TokenizedPrompt:
    """A prompt's token ids, and where its documents are. to_be_cut: it may be longer than what fits."""
    asked = prompt.documents
    if asked is None:
        special = prompt.add_special_tokens
        return TokenizedPrompt(_ids(text, prompt.given, prompt.param, special=special, to_be_cut=to_be_cut))
    if to_be_cut:
        raise not_cut()
    prefix = _ids(text, asked.prefix, "document_prefix", special=prompt.add_special_tokens, may_be_empty=True)
    documents = [Piece(_ids(text, one, f"documents[{i}]"), is_document=True) for i, one in enumerate(asked.given)]
    rest = _ids(text, prompt.given, prompt.param)
    return assembled([Piece(prefix), *documents, Piece(rest)], asked.reading)


def _ids(
    text: ModelText,
    given: str | list[int],
    param: str,
    *,
    special: bool = False,
    may_be_empty: bool = False,
    to_be_cut: bool = False,
) -> list[int]:
    """Token ids of text, or ids as they are."""
    if isinstance(given, str):
        if not to_be_cut:
            text.check_characters(len(given), param)
        ids = text.tokenizer.encode(given, add_special_tokens=special)
    else:
        ids = given
    text.check_vocabulary(ids, param)
    if not ids and not may_be_empty:
        raise InvalidRequest(f"'{param}' is empty: the model needs at least one token to continue", param=param)
    return ids


def truncated(text: ModelText, ids: Sequence[int], request: GenerationRequest) -> Sequence[int]:
    """A prompt cut as the request asks; −1 leaves room for what is to be generated."""
    truncation, sampling = request.truncation, request.sampling
    if truncation is None:
        return ids
    num_tokens = truncation.num_tokens
    if num_tokens < 0:
        asked = sampling.default_max_tokens if sampling.max_tokens is None else sampling.max_tokens
        num_tokens = max(1, text.max_model_len - (1 if asked is None else asked))
    if num_tokens == 0:
        raise InvalidRequest(
            "'truncate_prompt_tokens' is 0: the model needs at least one token to continue",
            param="truncate_prompt_tokens",
        )
    return ids[-num_tokens:] if truncation.side == "left" else ids[:num_tokens]


def allowed_token_ids(request: GenerationRequest) -> array[int] | None:
    """Each of those that may be drawn once: a body has room for millions."""
    given = request.sampling.allowed_token_ids
    return None if given is None else array("i", sorted(set(given)))


def bad_token_ids(text: ModelText, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token ids of words at the beginning of a text and after a space: what may not be drawn one after another."""
    encode = text.tokenizer.encode
    spelled = (tuple(encode(space + word, add_special_tokens=False)) for word in words for space in ("", " "))
    found = tuple(dict.fromkeys(ids for ids in spelled if ids))
    if (total := sum(map(len, found))) > MAX_BAD_TOKENS:
        raise InvalidRequest(
            f"'bad_words' are {total} tokens together, at the beginning of a text and after a space; at most "
            f"{MAX_BAD_TOKENS} can be watched for: give fewer or shorter ones",
            param="bad_words",
        )
    return found


def _constraint(request: GenerationRequest, use: ToolUse | None) -> GrammarText | None:
    """What the reply has to match: a format of its text, or that it calls a tool."""
    wanted = request.constraint
    if use is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest(
            f"'{wanted.param}' constrains the reply's text and 'tools' lets the reply be a call: give one of them, or "
            "tool_choice 'none'",
            param=wanted.param,
        )
    return use.grammar


def _tokenize(text: ModelText, body: TokenizeRequest) -> bytes:
    """The very ids that a generating endpoint would make of the same prompt or messages."""
    text.check_name(body.model)
    if body.messages is not None:
        chat = body.chat()
        use = ToolUse.of(text.tokenizer, chat)
        ids = chat_prompt(text, chat, tools=() if use is None else use.for_template).ids
    elif body.prompt:
        ids = tokenized(text, Prompt(given=body.prompt, add_special_tokens=body.add_special_tokens)).ids
    else:
        ids = []
    reply: dict[str, Any] = {"count": len(ids), "max_model_len": text.max_model_len, "tokens": ids}
    if body.return_token_strs:
        reply["token_strs"] = [text.tokenizer.token_string(token_id) for token_id in ids]
    return _json(reply)


def _detokenize(text: ModelText, body: DetokenizeRequest) -> bytes:
    text.check_name(body.model)
    text.check_vocabulary(body.tokens, "tokens")
    return _json({"prompt": text.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
