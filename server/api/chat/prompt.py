"""From a chat to the token ids of its prompt: written by the model's template, and where in it documents are.

What a template cannot say is told in words: tools in the system's (`tools_as_text`), documents at the beginning of what
the user says first. Refusals name limit and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prerope.server.api.chat.documents import HEADING, Content, Document, as_plain_text, texts_of
from prerope.server.api.chat.marks import Marks, Span
from prerope.server.api.chat.messages import Message, as_template_input
from prerope.server.api.chat.template import render_chat, template_names
from prerope.server.api.chat.tools import own_format
from prerope.server.api.chat.tools_as_text import as_text
from prerope.server.api.requests.documents import Piece, TokenizedPrompt, assembled, check_number, not_cut
from prerope.server.errors import TOO_LONG, InvalidRequest

if TYPE_CHECKING:
    from prerope.server.api.requests.internal import Chat
    from prerope.server.api.requests.reading import ModelText
    from prerope.server.tokenizer import Tokenizer


class ChatWriter:
    """Writes one chat, with or without marks around its documents."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._tools = [dict(tool) for tool in tools]
        self._tools_in_template = _knows_tools(tokenizer, chat.messages, self._tools)
        self._messages, self._documents = list(chat.messages), list(chat.documents)
        self._written = self._render(self._messages, self._documents)
        if self._documents and self._written == self._render(self._messages, []):  # it takes no documents
            self._messages, self._documents = _with_documents(self._messages, self._documents), []
            self._written = self._render(self._messages, [])

    def written(self) -> str:
        """The prompt's text."""
        return self._written

    def spans(self) -> list[Span] | None:
        """Where all documents are in `written`, in order; None where the template changes what it is given of them."""
        marks, count = Marks(), len(self._documents) + self._num_in_messages
        for strip in (False, True):  # many templates trim what they write
            marked = self._render(*self._marked(marks, strip=strip))
            if spans := marks.spans(marked, self._written, count):
                return spans
        return None

    @property
    def _num_in_messages(self) -> int:
        return sum(len(message.content.documents) for message in self._messages)

    def _marked(self, marks: Marks, *, strip: bool) -> tuple[list[Message], list[Any]]:
        messages, index = [], len(self._documents)
        for message in self._messages:
            content = message.content.stripped() if strip else message.content
            messages.append(message.model_copy(update={"content": marks.in_content(content, index)}))
            index += len(content.documents)
        return messages, [marks.in_fields(one, i, strip=strip) for i, one in enumerate(self._documents)]

    def _render(self, messages: Sequence[Message], documents: Sequence[Any]) -> str:
        tokenizer, chat, tools = self._tokenizer, self._chat, self._tools
        rendered = as_template_input(messages, knows_developer=template_names(tokenizer, "developer"))
        if not self._tools_in_template:
            rendered, tools = as_text(rendered, tools, system=template_names(tokenizer, "system")), []
        return render_chat(
            tokenizer,
            rendered,
            tools=tools,
            documents=documents,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            variables=chat.template_kwargs,
        )


def _with_documents(messages: Sequence[Message], documents: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Documents as parts of the first thing that the user says."""
    first = next((index for index, message in enumerate(messages) if message.role == "user"), 0)
    message = messages[first]
    parts = [HEADING, *(Document.whole(as_plain_text(one)) for one in documents), message.content]
    told = message.model_copy(update={"content": Content.joined(parts)})
    return [*messages[:first], told, *messages[first + 1 :]]


def _knows_tools(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether the template can write what the chat has of tools; one that knows none would leave calls out."""
    if tools and own_format(tokenizer) is None:
        return False
    calls, answers = any(m.tool_calls for m in messages), any(m.role == "tool" for m in messages)
    return (template_names(tokenizer, "tool_calls") or not calls) and (template_names(tokenizer, "tool") or not answers)


TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "self", "conversations", "kwargs"),
    }
)
"""What `chat_template_kwargs` may not set: these are the template engine's own arguments, not the template's."""


def chat_prompt(
    text: ModelText, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), to_be_cut: bool = False
) -> TokenizedPrompt:
    """A chat's token ids through the model's template, which is told of `tools`, and where its documents are."""
    in_messages = sum(len(message.content.documents) for message in chat.messages)
    num_documents = in_messages + len(chat.documents)
    check_number(num_documents, "messages" if in_messages else "documents")
    if num_documents and to_be_cut:
        raise not_cut()
    _check_chat(text, chat, to_be_cut=to_be_cut)
    writer = ChatWriter(text.tokenizer, chat, tools)
    written = writer.written()
    if not to_be_cut:
        text.check_characters(len(written), "messages")  # a template may write more than it was given
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
    text.check_vocabulary(prompt.ids, "messages")
    if not prompt.ids:
        raise InvalidRequest("'messages' come to no token at all through the chat template", param="messages")
    return prompt


def newest_that_fit(
    text: ModelText, chat: Chat, max_tokens: int | None, *, tools: Sequence[Mapping[str, Any]] = ()
) -> TokenizedPrompt:
    """The prompt of a chat, without its oldest messages where it would leave no room for `max_tokens`. What tells the
    model what it is stays, and so does the user's last message. Each of the user's goes with what follows it: no
    result is there without its call."""
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


def _check_chat(text: ModelText, chat: Chat, *, to_be_cut: bool) -> None:
    """Before a chat is rendered."""
    if not to_be_cut:
        text.check_characters(sum(message.num_chars for message in chat.messages), "messages")
        text.check_characters(sum(len(one) for document in chat.documents for one in texts_of(document)), "documents")
    reserved = sorted(chat.template_kwargs.keys() & TEMPLATE_ARGUMENTS)
    if reserved:
        raise InvalidRequest(
            f"'chat_template_kwargs.{reserved[0]}' may not be set: it is not the template's",
            param="chat_template_kwargs",
        )
