"""From request fields to a grammar: OpenAI's `response_format`, vLLM's `structured_outputs` and the `guided_*` fields
that it had before, and the plain names of /generate. One request has one constraint at most.

A stop string under a grammar ends the reply only where the text before it is complete; elsewhere it is part of the
reply. So a reply that ends with `stop` matches its grammar; one that ends with `length` may be cut short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from prerope.server.api.fairness import current_hold
from prerope.server.api.requests.body import MAX_DEPTH, RequestBody, Text, current_report, unicode_text
from prerope.server.api.requests.foreign import FORMAT, IGNORED, Foreign
from prerope.server.api.requests.wording import MAX_SHOWN, json_type
from prerope.server.errors import InvalidRequest
from prerope.server.nesting import nests_deeper
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.structured.rewrite import enforceable
from prerope.server.structured.text import GrammarText, json_text, too_deep
from prerope.server.structured.values import Unenforceable
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

if TYPE_CHECKING:
    from prerope.server.service import Service

MAX_CHOICES = 4096

_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "object"}, {"type": "boolean"}]}
_SCHEMA_OR_TEXT: dict[str, Any] = {"anyOf": [*_SCHEMA["anyOf"], {"type": "string"}]}


def _schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise ValueError(f"a JSON schema is an object, not {json_type(value)}")
    return value


def _schema_or_text(value: Any) -> Any:
    """vLLM takes a schema as JSON text, too."""
    if not isinstance(value, str):
        return _schema(value)
    try:
        schema = _schema(json.loads(value))
        deeper = nests_deeper(schema, MAX_DEPTH) if isinstance(schema, dict) else False
    except RecursionError:
        deeper = True
    except ValueError as error:
        raise ValueError(f"a JSON schema is an object, or the text of one ({error})") from None
    if deeper:
        raise ValueError(f"a JSON schema nests {MAX_DEPTH} lists and objects at most")
    return schema


def _schema_or_pattern(value: Any) -> Any:
    return unicode_text(value, "response_format.value") if isinstance(value, str) else _schema(value)


def _choice(value: Any) -> Any:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one string")
    if len(value) > MAX_CHOICES:
        raise ValueError(f"takes at most {MAX_CHOICES} strings, not {len(value)}")
    return [unicode_text(text, f"choice[{index}]") for index, text in enumerate(value)]


JsonSchema = Annotated[dict[str, Any] | bool, BeforeValidator(_schema), WithJsonSchema(_SCHEMA)]
JsonSchemaOrText = Annotated[
    dict[str, Any] | bool,
    BeforeValidator(_schema_or_text),
    WithJsonSchema(_SCHEMA_OR_TEXT),
]
Choice = Annotated[
    list[str],
    BeforeValidator(_choice),
    WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_CHOICES}),
]


class JsonSchemaFormat(RequestBody):
    """`response_format.json_schema`. The schema is followed whether `strict` is set or not."""

    path: ClassVar[str] = "response_format.json_schema."
    foreign: ClassVar[Mapping[str, Foreign]] = FORMAT

    name: Text = Field("", max_length=64)
    schema_: JsonSchema = Field(alias="schema")


FORMATS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "json": ("value", "schema"),
    "regex": ("value", "pattern"),
    "grammar": ("grammar", "value"),
}
"""The types of `response_format`, each with the fields that go with it."""


class ResponseFormat(RequestBody):
    """OpenAI's `response_format`: text, json_object or json_schema; a schema beside json_object, as llama.cpp and
    Together have it; TGI's json and regex, with a value; Fireworks' grammar."""

    path: ClassVar[str] = "response_format."

    type: str = Field(json_schema_extra={"enum": list(FORMATS)})
    json_schema: JsonSchemaFormat | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    value: Annotated[Any, BeforeValidator(_schema_or_pattern), WithJsonSchema(_SCHEMA_OR_TEXT)] = None
    pattern: Text | None = None
    grammar: Text | None = Field(None, description="Lark as llguidance reads it, or GBNF.")

    @model_validator(mode="after")
    def _known_type(self) -> ResponseFormat:
        if self.type not in FORMATS:
            raise InvalidRequest(
                f"'response_format.type' is '{self.type[:MAX_SHOWN]}'; it is one of {', '.join(FORMATS)}",
                param="response_format",
                code="unsupported_field",
            )
        taken = FORMATS[self.type]
        given = [name for name, value in self._given().items() if value is not None]
        for name in given:
            if name not in taken:
                fitting = ", ".join(f"'{type_}'" for type_, names in FORMATS.items() if name in names)
                raise InvalidRequest(
                    f"'response_format.{name}' goes with the type {fitting}, and only with it", param="response_format"
                )
        if len(given) > 1 or (not given and self.type not in ("text", "json_object")):
            raise InvalidRequest(
                f"'response_format' of the type '{self.type}' has one of {', '.join(taken)}", param="response_format"
            )
        return self

    def _given(self) -> Mapping[str, Any]:
        names = ("json_schema", "value", "pattern", "grammar")
        return {"schema": self.schema_, **{name: getattr(self, name) for name in names}}

    def wanted(self) -> GrammarText | None:
        name, value = next(((f"response_format.{k}", v) for k, v in self._given().items() if v is not None), ("", None))
        match self.type, value:
            case "text", _:
                return None
            case "json_object", None:
                return schema_grammar({"type": "object"}, "response_format")
            case "json_schema", JsonSchemaFormat():
                return schema_grammar(value.schema_, f"{name}.schema")
            case (("json_object" | "json_schema" | "json"), dict() | bool()):
                return schema_grammar(value, name)
            case "regex", str():
                return regex_grammar(value, name)
            case "grammar", str():
                return lark_grammar(value, name)
        raise InvalidRequest(f"'{name}' must be {'a JSON schema' if self.type == 'json' else 'text'}", param=name)


class StructuredOutputs(RequestBody):
    """vLLM's `structured_outputs`: one of its five constraints."""

    path: ClassVar[str] = "structured_outputs."
    foreign: ClassVar[Mapping[str, Foreign]] = {
        "structural_tag": Foreign("write a 'grammar'"),
        "whitespace_pattern": Foreign("JSON whitespace is bounded; 'disable_any_whitespace' leaves none"),
        "disable_additional_properties": Foreign("say so in the schema"),
        "disable_fallback": IGNORED,
        "backend": IGNORED,
    }

    json_: JsonSchemaOrText | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choice | None = None
    grammar: Text | None = Field(None, description="Lark as llguidance reads it, or GBNF.")
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def wanted(self) -> GrammarText:
        compact = self.disable_any_whitespace
        found = [
            optional_schema(self.json_, "structured_outputs.json", compact=compact),
            regex_grammar(self.regex, "structured_outputs.regex"),
            choice_grammar(self.choice, "structured_outputs.choice"),
            lark_grammar(self.grammar, "structured_outputs.grammar"),
            optional_schema({"type": "object"} if self.json_object else None, "structured_outputs", compact=compact),
        ]
        one = only_one(found)
        if one is None:
            raise InvalidRequest(
                "'structured_outputs' holds no constraint: give json, regex, choice, grammar or json_object",
                param="structured_outputs",
            )
        return one


class OpenAIConstraints(RequestBody):
    """The constraint fields of chat and completions."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchemaOrText | None = None
    guided_regex: Text | None = None
    guided_choice: Choice | None = None
    guided_grammar: Text | None = None

    def wanted_grammar(self) -> GrammarText | None:
        """What constrains the reply, if anything."""
        return only_one(
            [
                None if self.response_format is None else self.response_format.wanted(),
                None if self.structured_outputs is None else self.structured_outputs.wanted(),
                optional_schema(self.guided_json, "guided_json"),
                regex_grammar(self.guided_regex, "guided_regex"),
                choice_grammar(self.guided_choice, "guided_choice"),
                lark_grammar(self.guided_grammar, "guided_grammar"),
            ]
        )


class GenerateConstraints(RequestBody):
    """The constraint fields of /generate."""

    json_schema: JsonSchema | None = Field(None, description="The output is JSON that this schema describes.")
    regex: Text | None = Field(None, description="The whole output matches it; Rust's syntax, without look-around.")
    choice: Choice | None = Field(None, description="The output is one of these.")
    grammar: Text | None = Field(None, description="Lark as llguidance reads it, or GBNF.")

    def wanted_grammar(self) -> GrammarText | None:
        """What constrains the output, if anything."""
        return only_one(
            [
                optional_schema(self.json_schema, "json_schema"),
                regex_grammar(self.regex, "regex"),
                choice_grammar(self.choice, "choice"),
                lark_grammar(self.grammar, "grammar"),
            ]
        )


def schema_grammar(schema: Mapping[str, Any] | bool, param: str, *, compact: bool = False) -> GrammarText:
    return GrammarText("json", schema_text(schema, param), param, compact)


def optional_schema(
    schema: Mapping[str, Any] | bool | None, param: str, *, compact: bool = False
) -> GrammarText | None:
    return None if schema is None else schema_grammar(schema, param, compact=compact)


def schema_text(schema: Any, param: str, *, strict: bool = True) -> str:
    """A client's JSON schema as the text that is compiled. One that cannot be enforced is refused; with STRICT_FIELDS
    off, and where the client does not ask for it (strict), what is not enforced is named in the header."""
    GrammarText("json", json_text(schema, param), param)  # what is too long is refused before there is work on it
    try:
        rewritten = enforceable(schema)
    except RecursionError:
        raise too_deep(param) from None
    except Unenforceable as error:
        raise InvalidRequest(f"'{param}' cannot be enforced: {error}", param=param, code="bad_grammar") from None
    for keyword, reason in rewritten.dropped.items():
        if strict and current_report().strict:
            raise InvalidRequest(f"'{param}' cannot be enforced: {reason}", param=param, code="bad_grammar")
        current_report().ignore(f"{param}.{keyword}")
    return json_text(rewritten.schema, param)


def regex_grammar(regex: str | None, param: str) -> GrammarText | None:
    return GrammarText("regex", regex, param) if regex else None  # "" asks for nothing


def choice_grammar(choice: list[str] | None, param: str) -> GrammarText | None:
    if choice is None:
        return None
    return GrammarText("lark", "start: " + " | ".join(quoted(text) for text in choice), param)


def lark_grammar(grammar: str | None, param: str) -> GrammarText | None:
    return GrammarText("lark", grammar, param) if grammar else None


def quoted(text: str) -> str:
    """A literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def only_one(found: list[GrammarText | None]) -> GrammarText | None:
    """The one constraint; InvalidRequest where there are two."""
    given = [one for one in found if one is not None]
    if len(given) > 1:
        raise InvalidRequest(
            f"'{given[0].param}' and '{given[1].param}' both constrain the output: give one of them",
            param=given[1].param,
        )
    return given[0] if given else None


async def compiled(service: Service, wanted: GrammarText) -> CompiledGrammar:
    """The grammar, new or from an earlier request. InvalidRequest says why it cannot be compiled."""
    hold = current_hold()
    tenant = hold.tenant if service.settings.prefix_sharing == "key" else ""
    return await service.grammars.compile(wanted, tenant, hold.line)
