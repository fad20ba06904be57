"""From what a client wrote (text, token ids, messages) to the token ids of a prompt. Refusals name limit and value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prerope.server.api.chat.messages import Message, as_template_input
from prerope.server.api.chat.tools import own_format
from prerope.server.api.chat.untold import as_text
from prerope.server.api.requests.body import MAX_SHOWN
from prerope.server.api.requests.documents import TokenizedPrompt, assembled
from prerope.server.api.requests.internal import Chat, Prompt
from prerope.server.engine.limits import check_vocabulary
from prerope.server.errors import InvalidRequest, ModelNotFound
from prerope.server.service import Service

if TYPE_CHECKING:
    from prerope.server.tokenizer import Tokenizer

INLINE_CHARS = 2_000
"""Text up to this long is tokenised on the event loop (about a millisecond); longer text on a thread."""

TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""What `chat_template_kwargs` may not set: these are the template engine's own arguments, not the template's."""


def check_model(service: Service, model: str | None) -> None:
    """The `model` field names the served model, or is missing or empty."""
    if model and not service.serves(model):
        raise not_served(service, model)


def not_served(service: Service, model: str) -> ModelNotFound:
    served = " and ".join(f"'{name}'" for name in service.served_names)
    return ModelNotFound(
        f"the model '{model[:MAX_SHOWN]}' is not served here; this server serves {served}",
        param="model",
        code="model_not_found",
    )


async def tokenized(service: Service, prompt: Prompt, *, to_be_cut: bool = False) -> TokenizedPrompt:
    """A prompt's token ids, and where its documents are. to_be_cut: it may be longer than what fits."""
    asked = prompt.documents
    if asked is None:
        special = prompt.add_special_tokens
        return TokenizedPrompt(await _ids(service, prompt.given, prompt.param, special=special, to_be_cut=to_be_cut))
    if to_be_cut:
        raise InvalidRequest(
            "'truncate_prompt_tokens' would cut the documents: send fewer of them", param="truncate_prompt_tokens"
        )
    prefix = await _ids(service, asked.prefix, "document_prefix", special=prompt.add_special_tokens, may_be_empty=True)
    documents = []
    for index, one in enumerate(asked.given):
        documents.append(await _ids(service, one, f"documents[{index}]"))
        await asyncio.sleep(0)  # a thousand short ones are no reason to hold other streams up
    return assembled(prefix, documents, await _ids(service, prompt.given, prompt.param), asked)


async def _ids(
    service: Service,
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
            _check_characters(service, len(given), param)
        encode = service.tokenizer.encode
        ids = await _off_loop(len(given), lambda: encode(given, add_special_tokens=special))
    else:
        ids = given
    check_vocabulary(ids, service.engine.info, param)
    if not ids and not may_be_empty:
        raise InvalidRequest(f"'{param}' is empty: the model needs at least one token to continue", param=param)
    return ids


async def chat_ids(
    service: Service, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), to_be_cut: bool = False
) -> list[int]:
    """Token ids of a chat, through the model's template, which is told of `tools`."""
    messages = chat.messages
    num_chars = sum(message.num_chars for message in messages)
    if not to_be_cut:
        _check_characters(service, num_chars, "messages")
    kwargs = dict(chat.template_kwargs)
    reserved = sorted(kwargs.keys() & TEMPLATE_ARGUMENTS)
    if reserved:
        raise InvalidRequest(
            f"'chat_template_kwargs.{reserved[0]}' may not be set: it is not the template's",
            param="chat_template_kwargs",
        )
    rendered = as_template_input(messages, knows_developer=service.tokenizer.template_names("developer"))
    tokenizer, told = service.tokenizer, [dict(tool) for tool in tools]
    if not _knows_tools(tokenizer, messages, told):
        rendered, told = as_text(rendered, told, system=tokenizer.template_names("system")), []

    def encode() -> list[int]:
        text = tokenizer.render_chat(
            rendered,
            tools=told,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            **kwargs,
        )
        if not to_be_cut:
            _check_characters(service, len(text), "messages")  # a template may write more than it was given
        return tokenizer.encode(text, add_special_tokens=chat.add_special_tokens)  # it writes the special ones itself

    ids = await _off_loop(INLINE_CHARS + 1 if tools else num_chars, encode)
    check_vocabulary(ids, service.engine.info, "messages")
    if not ids:
        raise InvalidRequest("'messages' come to no token at all through the chat template", param="messages")
    return ids


def _knows_tools(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether the template can write what the chat has of tools; one that knows none would leave calls out."""
    if tools and own_format(tokenizer) is None:
        return False
    named = tokenizer.template_names
    calls, answers = any(m.tool_calls for m in messages), any(m.role == "tool" for m in messages)
    return (named("tool_calls") or not calls) and (named("tool") or not answers)


def _check_characters(service: Service, num_chars: int, param: str) -> None:
    """Refuse what cannot fit whatever its words are, before spending time on tokenising it."""
    max_model_len = service.engine.info.max_model_len
    limit = max_model_len * service.tokenizer.max_chars_per_token
    if num_chars > limit:
        raise InvalidRequest(
            f"'{param}' has {num_chars} characters; at most {limit} can fit into {max_model_len} tokens "
            "(MAX_MODEL_LEN raises it)",
            param=param,
            code="context_length_exceeded",
        )


async def _off_loop(num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
    return encode() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode)
