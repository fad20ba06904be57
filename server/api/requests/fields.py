"""Types of fields that a request may do without: stop strings, biases, and tokens that are allowed or not."""

from __future__ import annotations

from typing import Annotated, Any

from prerope.server.api.requests.body import token_ids, unicode_text
from prerope.server.api.requests.wording import MAX_SHOWN, json_type, shown_number
from prerope.server.errors import InvalidRequest
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

MAX_STOP_STRINGS = 256
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256

IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _stop(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise InvalidRequest(f"'stop' must be a string or a list of strings, not {json_type(value)}", param="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"'stop' takes at most {MAX_STOP_STRINGS} strings, not {len(strings)}", param="stop")
    for index, text in enumerate(strings):
        if len(unicode_text(text, f"stop[{index}]")) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"'stop[{index}]' takes at most {MAX_STOP_CHARS} characters, not {len(text)}", param="stop"
            )
    return [text for text in strings if text]


def _bad_words(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise InvalidRequest(f"'bad_words' must be a list of strings, not {json_type(value)}", param="bad_words")
    if len(value) > MAX_BAD_WORDS:
        raise InvalidRequest(f"'bad_words' takes at most {MAX_BAD_WORDS} words, not {len(value)}", param="bad_words")
    return [word for index, text in enumerate(value) if (word := unicode_text(text, f"bad_words[{index}]"))]


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"'logit_bias' must be an object of token id → bias, not {json_type(value)}", param="logit_bias"
        )
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"'logit_bias' takes at most {MAX_LOGIT_BIAS} tokens, not {len(value)}", param="logit_bias"
        )
    return {_biased_token(key): _bias(key, bias) for key, bias in value.items()}


def _biased_token(key: Any) -> int:
    text = str(key)
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise InvalidRequest(
            f"'logit_bias' has the key '{text[:MAX_SHOWN]}': keys are token ids, in digits", param="logit_bias"
        )
    return int(text)


def _bias(key: Any, bias: Any) -> float:
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
        shown = shown_number(bias) if isinstance(bias, float | int) else json_type(bias)
        raise InvalidRequest(f"'logit_bias[{key}]' must be a number from -100 to 100, not {shown}", param="logit_bias")
    return float(bias)


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]
_STOP_STRING: dict[str, Any] = {"type": "string", "maxLength": MAX_STOP_CHARS}
Stop = Annotated[
    list[str],
    BeforeValidator(_stop),
    WithJsonSchema({"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]}),
]
StopTokenIds = Annotated[
    list[int],
    Field(max_length=MAX_STOP_TOKEN_IDS),
    BeforeValidator(lambda value: token_ids(value, "stop_token_ids")),
    WithJsonSchema({**IDS_SCHEMA, "maxItems": MAX_STOP_TOKEN_IDS}),
]


AllowedTokenIds = Annotated[
    list[int],
    Field(min_length=1),
    BeforeValidator(lambda value: token_ids(value, "allowed_token_ids")),
    WithJsonSchema({**IDS_SCHEMA, "minItems": 1}),
]
BadWords = Annotated[
    list[str],
    BeforeValidator(_bad_words),
    WithJsonSchema({"type": "array", "items": {"type": "string"}, "maxItems": MAX_BAD_WORDS}),
]
