"""GET /rope/methods and POST /rope/map: what the model takes is what requests take, and the map is the formula's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prerope.rope.spec import METHOD_NAMES


@pytest.fixture(scope="module")
def http(serve_module: Any, tiny_checkpoint: Path) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serve_module(model_id=str(tiny_checkpoint), max_model_len=2048), timeout=60) as client:
        yield client


def test_the_methods_offered_are_those_that_requests_may_name(http: httpx.Client) -> None:
    told = http.get("/rope/methods").json()
    names = {method["name"]: method for method in told["methods"]}
    refused = {method["name"] for method in told["refused"]}
    assert names.keys() | refused == set(METHOD_NAMES)
    assert list(names) == http.get("/v1/models").json()["data"][0]["rope_methods"]
    for name in names.keys() | refused:
        reply = http.post("/generate", json={"prompt": "Hello", "max_tokens": 1, "rope": {"method": name}})
        assert reply.status_code == (200 if name in names else 400), name
        if name in names:
            assert reply.json()["rope"] == names[name]["parameters"]
    assert names["jagged_rerope"]["takes"] == ["window", "group"]


@pytest.mark.parametrize("length", [2, 50, 1000, 2**31 - 1])
def test_the_map_is_the_formula(http: httpx.Client, length: int) -> None:
    for rope, formula in (
        (None, None),
        ({"method": "rope"}, lambda distance: distance),
        ({"method": "rerope", "window": 40}, lambda distance: min(distance, 40)),
        ({"method": "streaming", "window": 40, "sinks": 0}, lambda distance: distance if distance < 40 else -1),
    ):
        drawn = http.post("/rope/map", json={"length": length, **({"rope": rope} if rope else {})}).json()
        places = drawn["positions"]
        assert (places[0], places[-1], len(places)) == (0, length - 1, min(96, length))
        assert [len(row) for row in drawn["rows"]] == [*range(1, len(places) + 1)]
        if formula:
            for i, row in zip(places, drawn["rows"], strict=True):
                assert row == pytest.approx([formula(i - j) for j in places[: len(row)]], abs=0.06)
        elif length > 256:
            assert drawn["farthest"] <= 256, "auto sees nothing farther than training did"


def test_layers_with_a_method_of_their_own(serve: Any, tiny_checkpoint: Path) -> None:
    """They are told wherever positions are, and a request that names a method has it in all layers."""
    own = {"0": {"method": "dynamic_rerope", "window": 32}}
    url = serve(model_id=str(tiny_checkpoint), max_model_len=2048, rope_layers="0=dynamic_rerope:window=32")
    with httpx.Client(base_url=url, timeout=60) as client:
        told = client.get("/rope/methods").json()
        assert told["default"]["layers"] == own
        assert {method["name"] for method in told["methods"] if "layers" in method["parameters"]} == {"auto"}
        for rope, layers in ((None, own), ({"method": "auto"}, own), ({"method": "rope"}, None)):
            body = {"prompt": "Hello", "max_tokens": 1, **({"rope": rope} if rope else {})}
            assert client.post("/generate", json=body).json()["rope"].get("layers") == layers


def test_groups_of_a_request(http: httpx.Client) -> None:
    """The slowest pair's is the last; what the model's pairs cannot have is refused, and what no model's can."""
    rope = {"method": "dpe", "window": 40, "groups": [1, 2, 64]}
    drawn = http.post("/rope/map", json={"length": 1000, "rope": rope}).json()
    assert drawn["rope"]["groups"] == [1, 2, 64]
    for i, row in zip(drawn["positions"], drawn["rows"], strict=True):
        keys = drawn["positions"][: len(row)]
        assert row == pytest.approx([i - j if i - j < 40 else i // 64 - j // 64 + 40 for j in keys], abs=0.06)
    reply = http.post("/generate", json={"prompt": "Hello " * 90, "max_tokens": 2, "rope": rope})
    assert reply.json()["rope"] == drawn["rope"]
    for wrong, said in (
        ([3], "ROPE_GROUPS) have 3"),
        ([2] * 129, "ROPE_GROUPS) are 129"),
        ([], "groups"),
        ([0], "groups"),
        ([2] * 257, "groups"),
        ([2.5], "groups"),
        ("2-4", "groups"),
        ([[2]], "groups"),
        ([2**40], "groups"),
        ([True], "groups"),
    ):
        refused = http.post("/generate", json={"prompt": "Hello", "max_tokens": 1, "rope": rope | {"groups": wrong}})
        assert refused.status_code == 400, wrong
        assert said in refused.json()["error"]["message"]


def test_a_method_that_the_model_does_not_take_has_no_map(http: httpx.Client) -> None:
    refused = http.post("/rope/map", json={"length": 100, "rope": {"method": "longrope"}})
    assert refused.status_code == 400
    assert "needs long_factor" in refused.json()["error"]["message"]
    assert http.post("/rope/map", json={"length": 1}).status_code == 400


def test_a_large_body_is_read_like_a_small_one(http: httpx.Client) -> None:
    """A worker reads it, in a process that has no torch."""
    bodies = ['{"length":100}', '{"length":100}' + " " * 5000]
    small, large = (
        http.post("/rope/map", content=body, headers={"content-type": "application/json"}) for body in bodies
    )
    assert small.status_code == large.status_code == 200
    assert small.json() == large.json()
