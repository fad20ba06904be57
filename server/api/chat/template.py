"""A model's chat template: a program of the model's that writes messages as the text of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prerope.server.errors import InvalidRequest
from prerope.server.tokenizer import Tokenizer


def template_text(tokenizer: Tokenizer, *, with_tools: bool) -> str:
    """The source of the chat template; some models have one of its own for chats with tools."""
    if not tokenizer.hf.chat_template:
        return ""
    return str(tokenizer.hf.get_chat_template(tools=[{}] if with_tools else None))


def template_names(tokenizer: Tokenizer, role: str) -> bool:
    """Whether the chat template names a role; one that names none writes whatever role it is given."""
    return bool(re.search(rf"\b{re.escape(role)}\b", str(tokenizer.hf.chat_template)))


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Messages → the prompt's text, special tokens included: `Tokenizer.encode` is to add none.

    Raises InvalidRequest if the model has no template or the template refuses.
    """
    named = tokenizer.hf.chat_template
    if not named:
        raise InvalidRequest(
            "This model has no chat template; use /v1/completions or /generate with the whole prompt.",
            param="messages",
            code="no_chat_template",
        )
    try:
        text: str = tokenizer.hf.apply_chat_template(
            list(messages),
            chat_template="rag" if documents and not tools and isinstance(named, dict) and "rag" in named else None,
            tools=list(tools) if tools else None,
            documents=list(documents) or None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(variables or {}),
        )
    except Exception as error:  # a template is a program of the model's: whatever it raises, the messages caused it
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "something in them, or in their tools, nests deeper than it can follow"
        raise InvalidRequest(f"The model's chat template refuses these messages: {reason}", param="messages") from error
    return text
