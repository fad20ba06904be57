"""Whether a reply may or must call a function, and which, as the clients of several APIs write it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from prerope.server.api.requests.wording import MAX_SHOWN
from prerope.server.errors import InvalidRequest
from pydantic import PlainValidator, WithJsonSchema


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a reply may or must call a function. `name` narrows `required` to one; of `names`, where there are any,
    the model is told alone."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    names: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """All names of tools that this choice mentions: the request's tools have to include them."""
        return self.names if self.name is None else (self.name,)

    def check_names(self, tools: Set[str]) -> None:
        """Raise InvalidRequest unless the request's tools hold those that are named."""
        for name in self.all_names:
            if name not in tools:
                raise InvalidRequest(
                    f"'tool_choice' names the function '{name[:MAX_SHOWN]}', which 'tools' does not hold",
                    param="tool_choice",
                )


MODES: Mapping[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "required": "required",
    "any": "required",  # Mistral's word, and Anthropic's
}


def tool_choice(value: Any) -> ToolChoice:
    """A choice as OpenAI's chats and Responses, Mistral and Anthropic write it."""
    match value:
        case str() if value in MODES:
            return ToolChoice(MODES[value])
        case {"type": str(mode), **others} if mode in MODES and not others:
            return ToolChoice(MODES[mode])
        case {"type": "function", "function": {"name": str(name), **more}, **others} if not more and not others:
            return ToolChoice("required", name)
        case {"type": "function" | "tool", "name": str(name), **others} if not others:
            return ToolChoice("required", name)
        case {"type": "allowed_tools"}:
            return _allowed(value.get("allowed_tools", value))
    raise InvalidRequest(
        "'tool_choice' is 'none', 'auto', 'required' or {\"type\": \"function\", \"function\": {\"name\": …}}",
        param="tool_choice",
    )


def _allowed(value: Any) -> ToolChoice:
    """OpenAI's {"mode": "auto", "tools": […]}: those tools, and no others of the request's."""
    value = value if isinstance(value, dict) else {}
    names, tools = [], value.get("tools")
    for one in tools if isinstance(tools, list) else ():
        match one:
            case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
                names.append(name)
            case _:
                names.clear()
                break
    mode = value.get("mode", "auto")
    if not names or mode not in ("auto", "required"):
        raise InvalidRequest(
            "'tool_choice' of the type 'allowed_tools' has the mode 'auto' or 'required' and 'tools', each "
            '{"type": "function", "function": {"name": …}}',
            param="tool_choice",
        )
    return ToolChoice(mode, names=tuple(dict.fromkeys(names)))


ToolChoiceField = Annotated[
    ToolChoice,
    PlainValidator(tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(MODES)},
                {
                    "type": "object",
                    "properties": {"type": {"enum": list(MODES)}},
                    "required": ["type"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"type": {"enum": ["function", "tool"]}, "name": {"type": "string"}},
                    "required": ["type", "name"],
                    "additionalProperties": False,
                },
                {"type": "object", "properties": {"type": {"const": "allowed_tools"}}, "required": ["type"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "function"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
