"""A chat written by the model's template, and where in it documents are. What a template cannot say is told in words:
tools in the system's (`tools_as_text`), documents at the beginning of what the user says first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prerope.server.api.chat.documents import HEADING, Content, Document, as_plain_text
from prerope.server.api.chat.marks import Marks, Span
from prerope.server.api.chat.messages import Message, as_template_input
from prerope.server.api.chat.template import render_chat, template_names
from prerope.server.api.chat.tools import own_format
from prerope.server.api.chat.tools_as_text import as_text

if TYPE_CHECKING:
    from prerope.server.api.requests.internal import Chat
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
