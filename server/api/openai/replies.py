"""What the replies of both OpenAI endpoints have in common: the head of an object, and usage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prerope.server.api.stream.generation import Generation


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that every object of one reply repeats."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def new(cls, reply_id: str, kind: str, model: str) -> Head:
        return cls(reply_id, kind, int(time.time()), model)

    @property
    def fields(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}

    def chunk_fields(self, include_usage: bool) -> dict[str, Any]:
        """With include_usage every chunk has `usage`: null, and the last one the figures."""
        return {**self.fields, "usage": None} if include_usage else self.fields


def usage(generations: Sequence[Generation], num_choices: int) -> dict[str, Any]:
    """Tokens of the whole request; a prompt is counted once, whatever its number of choices."""
    firsts = [generation.usage for generation in generations[::num_choices]]
    num_prompt = sum(one.prompt_tokens for one in firsts)
    num_completion = sum(generation.usage.completion_tokens for generation in generations)
    accepted = sum(generation.usage.accepted_tokens for generation in generations)
    drafted = sum(generation.usage.drafted_tokens for generation in generations)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in firsts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def documents_of(generations: Sequence[Generation]) -> dict[str, Any]:
    """How much of each document that is read on its own was cached; no field where there are no documents."""
    documents = generations[0].documents
    return {"documents": documents} if documents else {}
