"""Values in the files beside config.json that are of another kind than they should be.

transformers reads them as they come, and fails in words about its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prerope.server.models.config.values import shown

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""What every tokenizer may have; a number or a flag under another name that ends so is not read."""


def wrong_in_text_file(name: str, values: Mapping[str, Any]) -> str | None:
    """The first value of this file that cannot be, as a clause; None where there is none."""
    if name == "added_tokens.json":
        return next(
            (
                f"'{token}' is {shown(value)}, and it is the number of a token"
                for token, value in values.items()
                if type(value) is not int
            ),
            None,
        )
    if name == "generation_config.json":
        ends = values.get("eos_token_id")
        if all(one is None or type(one) is int for one in (ends if isinstance(ends, list) else [ends])):
            return None
        return f"'eos_token_id' is {shown(ends)}, and it is the number of a token, or a list of such numbers"
    if name not in ("tokenizer_config.json", "special_tokens_map.json"):
        return None
    for key, value in values.items():
        wanted = _wanted(key, value)
        if wanted is not None:
            return f"'{key}' is {shown(value)}, and it is {wanted}"
    return None


def _wanted(key: str, value: Any) -> str | None:
    """What a value of this name should be, where it is not."""
    if value is None:
        return None
    if key in SPECIAL:
        return None if isinstance(value, str | Mapping) else "a token, as text or as an object"
    if key in ("tokenizer_class", "padding_side", "truncation_side"):
        return None if isinstance(value, str) else "a name"
    if key in ("extra_special_tokens", "additional_special_tokens"):
        return None if isinstance(value, list | Mapping) else "a list of tokens"
    if key == "added_tokens_decoder":
        return None if _are_tokens(value) else "an object of tokens by their numbers"
    if key == "chat_template" and not isinstance(value, str | Mapping):
        return None if isinstance(value, list) and all(map(_is_named, value)) else "a text, or a list of them by name"
    return None


def _are_tokens(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(str(number).isdecimal() and isinstance(token, Mapping) for number, token in value.items())


def _is_named(template: Any) -> bool:
    return isinstance(template, Mapping) and {"name", "template"} <= set(template)
