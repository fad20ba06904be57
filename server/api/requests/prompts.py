"""From what a client wrote (text, token ids, messages) to the token ids of a prompt. Refusals name limit and value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prerope.server.api.chat.documents import texts_of
from prerope.server.api.chat.writer import ChatWriter
from prerope.server.api.requests.body import MAX_SHOWN
from prerope.server.api.requests.documents import Piece, TokenizedPrompt, assembled, check_number
from prerope.server.api.requests.internal import Chat, GenerationRequest, Prompt
from prerope.server.engine.limits import check_vocabulary
from prerope.server.errors import InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer

TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "self", "conversations", "kwargs"),
    }
)
"""What `chat_template_kwargs` may not set: these are the template engine's own arguments, not the template's."""

TOO_LONG = "context_length_exceeded"
"""The code of a refusal."""


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


def check_model(text: ModelText, model: str | None) -> None:
    """The `model` field names the served model, or is missing or empty. The only model takes any name, unless
    SERVED_MODEL_NAME is set: then it takes those."""
    if model and not text.any_name and model not in text.served_names:
        raise not_served(text, model)


def not_served(text: ModelText, model: str) -> ModelNotFound:
    served = " and ".join(f"'{name}'" for name in text.served_names)
    return ModelNotFound(
        f"the model '{model[:MAX_SHOWN]}' is not served here; this server serves {served}",
        param="model",
        code="model_not_found",
    )


def tokenized(text: ModelText, prompt: Prompt, *, to_be_cut: bool = False) -> TokenizedPrompt:
    """A prompt's token ids, and where its documents are. to_be_cut: it may be longer than what fits."""
    asked = prompt.documents
    if asked is None:
        special = prompt.add_special_tokens
        return TokenizedPrompt(_ids(text, prompt.given, prompt.param, special=special, to_be_cut=to_be_cut))
    if to_be_cut:
        raise _documents_are_not_cut()
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
            _check_characters(text, len(given), param)
        ids = text.tokenizer.encode(given, add_special_tokens=special)
    else:
        ids = given
    check_vocabulary(ids, text.vocab_size, param)
    if not ids and not may_be_empty:
        raise InvalidRequest(f"'{param}' is empty: the model needs at least one token to continue", param=param)
    return ids


def chat_prompt(
    text: ModelText, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), to_be_cut: bool = False
) -> TokenizedPrompt:
    """A chat's token ids through the model's template, which is told of `tools`, and where its documents are."""
    in_messages = sum(len(message.content.documents) for message in chat.messages)
    num_documents = in_messages + len(chat.documents)
    check_number(num_documents, "messages" if in_messages else "documents")
    if num_documents and to_be_cut:
        raise _documents_are_not_cut()
    _check_chat(text, chat, to_be_cut=to_be_cut)
    writer = ChatWriter(text.tokenizer, chat, tools)
    written = writer.written()
    if not to_be_cut:
        _check_characters(text, len(written), "messages")  # a template may write more than it was given
    spans = writer.spans() if num_documents else []
    if spans is None and chat.reading.attention == "own":
        raise InvalidRequest(
            "the model's chat template writes these documents otherwise than they are, so they cannot be read on their "
            "own: leave 'document_attention' out or set it to 'full', or send them as parts of a message",
            param="document_attention",
        )
    encode, position, pieces = text.tokenizer.encode, 0, list[Piece]()
    for start, stop in (*(spans or ()), (len(written), len(written))):
        special = chat.add_special_tokens and not pieces  # else the template writes the special ones itself
        pieces.append(Piece(encode(written[position:start], add_special_tokens=special)))
        pieces.append(Piece(encode(written[start:stop], add_special_tokens=False), is_document=True))
        position = stop
    prompt = assembled(pieces, chat.reading)
    check_vocabulary(prompt.ids, text.vocab_size, "messages")
    if not prompt.ids:
        raise InvalidRequest("'messages' come to no token at all through the chat template", param="messages")
    return prompt


def newest_that_fit(
    text: ModelText, chat: Chat, max_tokens: int | None, *, tools: Sequence[Mapping[str, Any]] = ()
) -> TokenizedPrompt:
    """The prompt of a chat, without its oldest messages where it would leave no room for `max_tokens`. What tells the
    model what it is stays, and so does the last turn; turns go whole, so that no result is there without its call."""
    most = text.max_model_len - (max_tokens or 1)
    told = next((i for i, one in enumerate(chat.messages) if one.role not in ("system", "developer")), 0)
    begins = [i for i, one in enumerate(chat.messages) if i > told and one.role == "user"]

    def without(start: int) -> TokenizedPrompt | None:
        left = replace(chat, messages=[*chat.messages[:told], *chat.messages[start:]])
        try:
            prompt = chat_prompt(text, left, tools=tools)
        except InvalidRequest as error:
            if error.code != TOO_LONG:
                raise
            return None
        return prompt if len(prompt.ids) <= most else None

    if (whole := without(told)) is not None or not begins:
        return whole or chat_prompt(text, chat, tools=tools)
    found = None
    while begins:  # fewer messages are fewer tokens
        middle = len(begins) // 2
        if (prompt := without(begins[middle])) is None:
            begins = begins[middle + 1 :]
        else:
            found, begins = prompt, begins[:middle]
    return found or chat_prompt(text, chat, tools=tools)


def _documents_are_not_cut() -> InvalidRequest:
    return InvalidRequest(
        "'truncate_prompt_tokens' would cut the documents: send fewer of them", param="truncate_prompt_tokens"
    )


def _check_chat(text: ModelText, chat: Chat, *, to_be_cut: bool) -> None:
    """Before a chat is rendered."""
    if not to_be_cut:
        _check_characters(text, sum(message.num_chars for message in chat.messages), "messages")
        _check_characters(text, sum(len(one) for document in chat.documents for one in texts_of(document)), "documents")
    reserved = sorted(chat.template_kwargs.keys() & TEMPLATE_ARGUMENTS)
    if reserved:
        raise InvalidRequest(
            f"'chat_template_kwargs.{reserved[0]}' may not be set: it is not the template's",
            param="chat_template_kwargs",
        )


def _check_characters(text: ModelText, num_chars: int, param: str) -> None:
    """Refuse what cannot fit whatever its words are, before spending time on tokenising it."""
    max_model_len = text.max_model_len
    limit = max_model_len * text.tokenizer.max_chars_per_token
    if num_chars > limit:
        raise InvalidRequest(
            f"'{param}' has {num_chars} characters; at most {limit} can fit into {max_model_len} tokens "
            "(MAX_MODEL_LEN raises it)",
            param=param,
            code=TOO_LONG,
        )


def truncated(text: ModelText, ids: list[int], request: GenerationRequest) -> list[int]:
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
