"""The table of `prerope methods`: which methods a model takes, and what they come to."""

from __future__ import annotations

from typing import Any

from prerope.server.cli.client import Client
from rich.table import Table

EMBEDDED = "embedded"
"""What the model that comes with the server is called here."""


def from_server(client: Client) -> dict[str, Any]:
    """What a running server says of its model."""
    name = client.get("/v1/models")["data"][0]["id"]
    return {"model": name, **client.get("/rope/methods")}


def from_config(model: str, max_model_len: int | None) -> dict[str, Any]:
    """What a server would tell of a model (a folder, a hub id or a .gguf file), by its config: no weight is loaded."""
    from prerope.rope.model import default_max_model_len, main_group
    from prerope.rope.offers import offers
    from prerope.rope.show import rotaries_of_config
    from prerope.rope.spec import RopeSpec
    from prerope.server.cli.reply import aside
    from prerope.server.models.checkpoint import resolve_checkpoint

    checkpoint = resolve_checkpoint(
        None if model == EMBEDDED else model, None, lambda line: aside.print(line, style="dim")
    )
    rotaries = rotaries_of_config(checkpoint.config().get_text_config())
    rotary = rotaries[main_group(rotaries)]
    length = max_model_len or default_max_model_len(RopeSpec(), rotary)
    found = offers(rotaries, length)
    by_name = {offer.name: offer.positions for offer in found}
    auto = by_name["auto"]
    return {
        "model": checkpoint.name,
        "max_model_len": length,
        "train_length": rotary.train_length,
        "default": None if auto is None else auto.described,
        "methods": [
            {
                "name": offer.name,
                "summary": offer.summary,
                "takes": offer.takes,
                "parameters": offer.positions.described,
            }
            for offer in found
            if offer.positions is not None
        ],
        "refused": [{"name": offer.name, "reason": offer.refusal} for offer in found if offer.positions is None],
    }


def heading(listing: dict[str, Any]) -> str:
    default = listing["default"]["method"] if listing["default"] else "none"
    return (
        f"{listing['model']}: trained at {listing['train_length']:,} tokens, read to {listing['max_model_len']:,}; "
        f"where nothing is asked it is read by {default}"
    )


def table(listing: dict[str, Any]) -> Table:
    """A row for each method, those that the model does not take with the reason."""
    drawn = Table("method", "parameters, as they come out", "what it does", header_style="bold", expand=False)
    for method in listing["methods"]:
        drawn.add_row(method["name"], _parameters(method), method["summary"])
    for method in listing["refused"]:
        drawn.add_row(method["name"], "not for this model", method["reason"], style="dim")
    return drawn


def _parameters(method: dict[str, Any]) -> str:
    resolved = method["parameters"]
    alias = resolved["method"] if resolved["method"] != method["name"] else None
    shown = [
        f"{name} {_short(value)}" for name, value in resolved.items() if name in method["takes"] and value is not None
    ]
    parts = [f"{part['method']} in layers {layers}" for layers, part in resolved.get("layers", {}).items()]
    return ", ".join(filter(None, [alias and f"= {alias}", *shown, *parts]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
