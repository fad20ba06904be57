"""What clients may send to /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from prerope.server.api.chat.documents import ChatDocumentFields
from prerope.server.api.chat.messages import MAX_MESSAGES, Messages
from prerope.server.api.chat.tools import MAX_TOOLS, Tool
from prerope.server.api.requests.body import RequestBody, Text, token_ids
from prerope.server.api.requests.fields import IDS_SCHEMA
from prerope.server.api.requests.foreign import BODY, CHAT, OF_A_REPLY, Foreign
from prerope.server.api.requests.internal import Chat
from prerope.server.api.requests.schemas import asks_for_reply
from prerope.server.api.requests.thinking import ThinkingFields
from prerope.server.errors import InvalidRequest
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator


class TokenizeRequest(ThinkingFields, ChatDocumentFields):
    """POST /tokenize, in vLLM's shape: a prompt or chat messages. Routers post the whole body of a chat."""

    foreign: ClassVar[Mapping[str, Foreign]] = {**CHAT, **OF_A_REPLY}

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = Field(True, description="For a prompt; a chat template writes its own.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give 'prompt' or 'messages', one of the two", param="prompt")
        return self

    def chat(self) -> Chat:
        """The messages as the internal request has them."""
        messages = self.messages or []
        continues = self.continue_final_message or bool(messages and messages[-1].prefix)
        return Chat(
            messages=messages,
            tools=self.tools,
            add_generation_prompt=asks_for_reply(self.add_generation_prompt, continues),
            continue_final_message=continues,
            documents=self.documents,
            reading=self.document_reading(),
            template_kwargs=self.thinking_kwargs() | self.chat_template_kwargs,
        )


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    foreign: ClassVar[Mapping[str, Foreign]] = BODY

    model: Text | None = None
    tokens: Annotated[list[int], PlainValidator(lambda value: token_ids(value, "tokens")), WithJsonSchema(IDS_SCHEMA)]
