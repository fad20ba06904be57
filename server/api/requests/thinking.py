"""Whether a model is to think before it answers, and what is told of it, by the names that servers and services have.

Templates know `reasoning_effort` and `enable_thinking`; what a template doesn't name changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from prerope.server.api.requests.body import RequestBody
from prerope.server.api.requests.foreign import Foreign, hints, ignored
from pydantic import Field


class Thinking(RequestBody):
    """`thinking` of DeepSeek, GLM and Anthropic: {"type": "enabled"}."""

    path: ClassVar[str] = "thinking."
    foreign: ClassVar[Mapping[str, Foreign]] = hints("budget_tokens", "display", "clear_thinking")

    type: Literal["enabled", "disabled", "adaptive", "auto"]


class Reasoning(RequestBody):
    """`reasoning` of OpenRouter and SGLang: {"effort": "low", "enabled": true, "exclude": false}."""

    path: ClassVar[str] = "reasoning."
    foreign: ClassVar[Mapping[str, Foreign]] = {**hints("max_tokens", "summary"), **ignored("generate_summary")}

    effort: str | float | None = None
    enabled: bool | None = None
    exclude: bool = False


class ThinkingFields(RequestBody):
    """The fields of a chat about thoughts."""

    reasoning_effort: str | float | None = Field(None, description="Handed to the chat template; none: no thinking.")
    enable_thinking: bool | None = Field(None, description="Likewise, where the template asks for that (Qwen).")
    think: bool | str | None = Field(None, description="Either of them, as Ollama has it.")
    thinking: bool | Thinking | None = Field(None, description="enable_thinking, as DeepSeek has it.")
    reasoning: str | Reasoning | None = Field(None, description="All of these, as OpenRouter has it.")
    include_reasoning: bool = Field(True, description="Whether thoughts are told, as reasoning_content.")
    separate_reasoning: bool = Field(True, description="Whether thoughts are told apart from the content (SGLang).")
    stream_reasoning: bool = Field(True, description="Whether thoughts are streamed as they come (SGLang).")
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "parsed", "none", "raw", "hidden"] | None = Field(
        None, description="none, raw: thoughts are part of the content; hidden: they are not told (llama.cpp, Groq)."
    )

    def thinking_kwargs(self) -> dict[str, Any]:
        """Arguments for the chat template about thinking; a field that has the argument's own name comes first."""
        told = {}
        match self.thinking:
            case Thinking(type=type_):
                told["enable_thinking"] = type_ != "disabled"
            case bool():
                told["enable_thinking"] = self.thinking
        given = self.reasoning
        effort = given.effort if isinstance(given, Reasoning) else given
        if isinstance(given, Reasoning) and given.enabled is not None:
            told["enable_thinking"] = given.enabled
        if isinstance(self.think, bool):
            told["enable_thinking"] = self.think
        elif self.think is not None:
            effort = self.think
        told |= effort_kwargs(effort if self.reasoning_effort is None else self.reasoning_effort)
        return told if self.enable_thinking is None else told | {"enable_thinking": self.enable_thinking}

    @property
    def tells_thoughts(self) -> bool:
        """Whether the reply has the model's thoughts at all."""
        hidden = self.reasoning_format == "hidden" or (isinstance(self.reasoning, Reasoning) and self.reasoning.exclude)
        return self.include_reasoning and not hidden

    @property
    def separates_thoughts(self) -> bool:
        """Whether thoughts stand apart from the content."""
        return self.separate_reasoning and self.reasoning_format not in ("none", "raw")


def effort_kwargs(effort: str | float | None) -> dict[str, Any]:
    """Arguments for the chat template about the effort that a client asks for; a template takes those that it knows."""
    return {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
