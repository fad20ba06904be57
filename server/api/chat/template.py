"""A model's chat template: a program of the model's that writes messages as the text of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from prerope.server.errors import InvalidRequest, first_line, one_line
from prerope.server.tokenizer import Tokenizer


def template_text(tokenizer: Tokenizer, *, with_tools: bool) -> str:
    """The source of the chat template; some models have one of its own for chats with tools."""
    if not tokenizer.hf.chat_template:
        return ""
    try:
        return str(tokenizer.hf.get_chat_template(tools=[{}] if with_tools else None))
    except ValueError:  # of several by name, none is the default
        return ""


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

    Raises InvalidRequest if the model has no template that can be run, or the template refuses.
    """
    named = _usable_template(tokenizer)
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
    except MemoryError:  # of a worker, which has as much as one request may take
        raise
    except Exception as error:  # a template is a program of the model's: whatever it raises, the messages caused it
        raise _refusal(error) from error
    return text


def _usable_template(tokenizer: Tokenizer) -> Any:
    """The template, or several by name. InvalidRequest where there is none that can be run."""
    if tokenizer.template_fault is not None:
        raise InvalidRequest(tokenizer.template_fault, param="messages", code="no_chat_template")
    if not tokenizer.hf.chat_template:
        raise InvalidRequest(
            "This model has no chat template; use /v1/completions or /generate with the whole prompt.",
            param="messages",
            code="no_chat_template",
        )
    return tokenizer.hf.chat_template


def _refusal(error: Exception) -> InvalidRequest:
    """What a template has raised, in words."""
    if isinstance(error, TemplateSyntaxError):
        return InvalidRequest(
            f"This model's chat template is no valid Jinja (line {error.lineno}: {first_line(error, 200)}). Correct "
            "chat_template (in tokenizer_config.json, or chat_template.jinja), or use /v1/completions or /generate "
            "with the whole prompt.",
            param="messages",
            code="no_chat_template",
        )
    reason = one_line(str(error).strip().split("\n")[0][:200]) or "it does not say why"
    if isinstance(error, RecursionError):
        reason = "something in them, or in their tools, nests deeper than it can follow"
    return InvalidRequest(f"The model's chat template refuses these messages: {reason}", param="messages")
