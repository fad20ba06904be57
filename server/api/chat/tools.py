"""Tools of a chat: what clients send, how a model's template writes calls, and the grammar that makes a reply a call.

The format is read off the template's own text, not off the model's name:

    Hermes, Qwen, SmolLM3   <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>      once for each call
    SmolLM2                 <tool_call>[{"name": …, "arguments": …}, …]</tool_call>
    Mistral                 [TOOL_CALLS][{"name": …, "arguments": …}, …]
    later Mistral           [TOOL_CALLS]name[ARGS]{…}                                    once for each call
    Llama 3.1               {"name": …, "parameters": …}                                as the whole reply
    Qwen3-Coder, Qwen3.5    <tool_call>\\n<function=…>\\n<parameter=…>\\n…                read by `xml_calls`

Under tool_choice `required` or a named function the reply follows a grammar made of the functions' parameter schemas,
so that it always parses. Under `auto` it is free text, and `tool_calls` finds the calls in it; where a function is
`strict`, what follows a mark has to be a call (Llama's format has no mark, and there `strict` is without effect).
Values between tags have no quotes and no schema can hold them: where a grammar is needed such a model writes Hermes'
calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from prerope.server.api.chat.template import template_text
from prerope.server.api.chat.tool_choice import ToolChoice, ToolChoiceField
from prerope.server.api.chat.xml_calls import Types, types_of
from prerope.server.api.requests.body import RequestBody, Text
from prerope.server.api.requests.constraints import quoted, schema_text
from prerope.server.api.requests.foreign import FUNCTION, TOOL, Foreign
from prerope.server.api.requests.wording import json_type
from prerope.server.errors import InvalidRequest
from prerope.server.structured.text import GrammarText, Within, json_options
from prerope.server.structured.versions import as_drafted
from prerope.server.tokenizer import Tokenizer
from pydantic import BeforeValidator, Field, model_validator

if TYPE_CHECKING:
    from prerope.server.api.requests.internal import Chat

MAX_TOOLS = 128
MAX_PARALLEL_CALLS = 16
"""The most calls of one reply that must hold calls: without a limit it might never end."""


def _schema_of_object(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"a function's parameters are a JSON schema (an object), not {json_type(value)}")
    if value.get("type", "object") != "object":
        raise ValueError("a function's parameters are a JSON schema of the type 'object'")
    return value


class Function(RequestBody):
    """A function that the model may call. Without `parameters` it takes none.

    `strict` asks for arguments that follow the schema under `auto`, too; where a call is required they always do.
    """

    path: ClassVar[str] = "tools.function."
    foreign: ClassVar[Mapping[str, Foreign]] = FUNCTION

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: Text | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_schema_of_object)] | None = None
    strict: bool = False

    @property
    def schema_text(self) -> str:
        """The parameters' JSON schema for llguidance."""
        schema = self.parameters or {"properties": {}, "additionalProperties": False}
        return schema_text(
            {**as_drafted(schema), "type": "object", "x-guidance": json_options()},
            "tools.function.parameters",
            strict=self.strict,
        )


class Tool(RequestBody):
    """`{"type": "function", "function": {…}}`."""

    path: ClassVar[str] = "tools."
    foreign: ClassVar[Mapping[str, Foreign]] = TOOL

    type: Literal["function"]
    function: Function


class ToolFields(RequestBody):
    """The fields of a chat about tools. `parallel_tool_calls`: false keeps a reply to one call; where it is left out, a
    model whose template knows no tools is kept to one, too, where it must call: none has taught it when to stop."""

    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _names_agree(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools]
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise InvalidRequest(f"'tools' holds two functions of the name '{twice}'", param="tools")
        choice = self.tool_choice
        if choice is None or choice.mode == "none" or (choice.mode == "auto" and not names):
            return self
        if not names:
            raise InvalidRequest("'tool_choice' needs 'tools' to choose from", param="tool_choice")
        choice.check_names({*names})
        return self


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written: begin opening CALL [between CALL]… closing end, and sections of these one a line.

    Attributes:
        begin, end: the marks around a section; without a mark the reply itself begins with a call.
        between: what separates the calls of a section; None where a section has one.
        key: what the arguments are called.
        repeats: whether a reply may hold several sections.
        short_ids: the template takes call ids of 9 letters and digits only.
        args: the mark between a call's name and its arguments; without one a call is JSON as a whole.
        apart: what separates sections.
        tags: a call is tags around values (`xml_calls`), and the other attributes but the marks say nothing.
    """

    begin: str
    opening: str
    between: str | None
    closing: str
    end: str
    key: str = "arguments"
    repeats: bool = False
    short_ids: bool = False
    args: str = ""
    apart: str = "\n"
    tags: bool = False


HERMES = ToolFormat("<tool_call>", "\n", None, "\n", "</tool_call>", repeats=True)
SMOLLM2 = ToolFormat("<tool_call>", "[", ", ", "]", "</tool_call>")
MISTRAL = ToolFormat("[TOOL_CALLS]", "[", ", ", "]", "", short_ids=True)
MISTRAL_NAMED = ToolFormat("[TOOL_CALLS]", "", None, "", "", repeats=True, short_ids=True, args="[ARGS]", apart="")
LLAMA = ToolFormat("", "", None, "", "", key="parameters")
QWEN_TAGS = ToolFormat("<tool_call>", "", None, "", "</tool_call>", repeats=True, tags=True)


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template writes calls in; None where it is none of these."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        if re.search(r"<tool_call>(\s|\\n)*<function=", template):
            return QWEN_TAGS
        if "<arg_key>" in template:  # GLM's tags
            return None
        return SMOLLM2 if re.search(r"<tool_call>\s*(\\n)?\s*\[", template) else HERMES
    return LLAMA if re.search(r'\\?"name\\?":.*\\?"parameters\\?":', template) else None


def own_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """The format of the served model's template; None where it takes no tools, or writes calls in a way that is not
    read here: then `tools_as_text` tells the model of them."""
    template = template_text(tokenizer, with_tools=True)
    return format_of(template) if re.search(r"\btools\b", template) else None


def special_marks(tokenizer: Tokenizer, form: ToolFormat) -> dict[str, int]:
    """The format's marks that are special tokens: text leaves those out unless it is told to keep them."""
    return {
        mark: token_id
        for mark in (form.begin, form.end, form.args)
        if mark and (token_id := tokenizer.special_id(mark)) is not None
    }


def call_grammar(
    tools: Sequence[Tool], choice: ToolChoice, form: ToolFormat, marks: dict[str, int], *, parallel: bool
) -> GrammarText:
    """Replies that are calls and nothing else; a named function is called once. Under `auto`: text in which what
    follows the mark is a call."""
    functions = [tool.function for tool in tools if choice.name in (None, tool.function.name)]
    more = MAX_PARALLEL_CALLS - 1 if parallel and choice.name is None else 0
    free = choice.mode == "auto"

    def mark(text: str) -> str:
        return f"<[{marks[text]}]>" if text in marks else quoted(text) if text else ""

    calls = "call" if form.between is None or not more else f"call ({quoted(form.between)} call){{0,{more}}}"
    opening, closing = (quoted(text) if text else "" for text in (form.opening, form.closing))
    apart = quoted(form.apart) if form.apart else ""
    sections = f"section ({apart} section){{0,{more}}}" if form.repeats and more else "section"
    begin = "text_and_mark" if free else mark(form.begin)
    lines = [
        "%llguidance {}",
        f"start: section{{0,{more + 1 if form.repeats else 1}}} TEXT" if free else f"start: {sections}",
        f"section: {begin} {opening} {calls} {closing} {mark(form.end)}",
        "call: " + " | ".join(f"call_{index}" for index in range(len(functions))),
    ]
    if free:
        lazy = "" if form.begin in marks else "[lazy]"  # text ends where the mark does
        lines += [r"TEXT: /(.|\n)*/", f"text_and_mark{lazy}: TEXT {mark(form.begin)}"]
    within = []
    for index, function in enumerate(functions):
        schema, call_head, behind = function.schema_text, _call_head(function.name, form), "" if form.args else "}"
        written = " ".join(mark(one) for one in call_head)
        lines += [f"call_{index}: {written} arguments_{index} {mark(behind)}", f"arguments_{index}: %json {schema}"]
        spelled = tuple(marks.get(one, one) for one in call_head)
        next_head = () if form.between is None else (behind, form.between, *spelled)
        within.append(Within((marks.get(form.begin, form.begin), form.opening, *spelled), next_head, schema))
    return GrammarText("lark", "\n".join(lines), "tools", within=tuple(within))


def _call_head(name: str, form: ToolFormat) -> tuple[str, ...]:
    """What a call begins with, before its arguments: texts and marks."""
    return (name, form.args) if form.args else (f'{{"name": "{name}", "{form.key}": ',)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, and how the served model calls them. types: of their arguments, for a form of tags."""

    tools: Sequence[Tool]
    form: ToolFormat
    marks: dict[str, int]
    parallel: bool
    grammar: GrammarText | None
    types: Mapping[str, Types] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer, chat: Chat) -> ToolUse | None:
        """None where the model is told of no tools: with tool_choice none it is told of none."""
        choice = chat.tool_choice or ToolChoice("auto")
        choice.check_names({tool.function.name for tool in chat.tools})  # not every dialect's have been
        tools = [tool for tool in chat.tools if tool.function.name in choice.names] if choice.names else chat.tools
        if not tools or choice.mode == "none":
            return None
        own = own_format(tokenizer)
        form = own or HERMES
        strict = any(tool.function.strict for tool in tools) and form.begin != ""
        held = choice.mode == "required" or strict
        if held and form.tags:
            form = HERMES
        marks = special_marks(tokenizer, form)
        parallel = chat.parallel_tool_calls
        if parallel is None:
            parallel = own is not None or choice.mode != "required"
        grammar = None
        if held:
            grammar = call_grammar(tools, choice, form, marks, parallel=parallel)
        types = {tool.function.name: types_of(tool.function.parameters or {}) for tool in tools} if form.tags else {}
        return cls(tools, form, marks, parallel, grammar, types)

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.tools]

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]
