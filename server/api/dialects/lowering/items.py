"""The items of a kept conversation as OpenAI lists them, by pages. Imports no torch: a worker reads them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from prerope.server.errors import InvalidRequest
from prerope.server.workers.messages import as_it_lies


@dataclass(frozen=True, slots=True)
class Page:
    """A task for a worker: to read items takes as long as the client made them.

    given: a list, as JSON. after: the id of the item before the page.
    """

    given: bytes
    limit: int
    newest_first: bool
    after: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        return Page, (as_it_lies(self.given), self.limit, self.newest_first, self.after)

    def run(self, world: object) -> bytes:  # noqa: ARG002 - a page needs nothing of it
        items = [_with_id(item, index) for index, item in enumerate(json.loads(self.given))]
        while more := _called_alike(items):  # a page begins behind one of them
            for index, item in enumerate(items):
                if item["id"] in more:
                    item["id"] = f"{item['id']}_{index:08}"
        if self.newest_first:
            items.reverse()
        ids = [item["id"] for item in items]
        if self.after is not None and self.after not in ids:
            raise InvalidRequest("'after' is the id of none of the items", param="after")
        first = 0 if self.after is None else ids.index(self.after) + 1
        page = items[first : first + self.limit]
        told = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": first + self.limit < len(items),
        }
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def _called_alike(items: list[dict[str, Any]]) -> set[str]:
    """The ids that more than one item has."""
    return {called for called, times in Counter(item["id"] for item in items).items() if times > 1}


def _with_id(item: dict[str, Any], index: int) -> dict[str, Any]:
    """An item as OpenAI's lists have it: with a type, an id, and the content of a message in parts."""
    told = {"type": "message", **item}
    given = item.get("id")
    named = isinstance(given, str) and given
    told["id"] = given if named else f"{'msg' if told['type'] == 'message' else 'item'}_{index:08}"
    if told["type"] == "message" and isinstance(told.get("content"), str):
        kind = "output_text" if told.get("role") == "assistant" else "input_text"
        told["content"] = [{"type": kind, "text": told["content"], **({"annotations": []} if kind[0] == "o" else {})}]
    return {"status": "completed", **told}
