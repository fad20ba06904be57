"""Where the tests run: what DEVICE says, the same in workers, and a card that nobody asked for stays hidden."""

from __future__ import annotations

import pytest
import torch

from tests.device import CHOSEN, DEVICE, VISIBLE, choose


@pytest.mark.parametrize(
    ("asked", "device", "rest"),
    [
        ({}, "cpu", {VISIBLE: "", "TRITON_INTERPRET": "1"}),
        ({"DEVICE": "cpu", VISIBLE: "3"}, "cpu", {VISIBLE: "", "TRITON_INTERPRET": "1"}),
        ({"DEVICE": "cuda"}, "cuda", {"TRITON_INTERPRET": "0"}),
        ({"DEVICE": "CUDA:1"}, "cuda", {VISIBLE: "1", "TRITON_INTERPRET": "0"}),
        ({"DEVICE": "cuda", "TRITON_INTERPRET": "1"}, "cuda", {"TRITON_INTERPRET": "1"}),
    ],
)
def test_the_choice_is_made_once(asked: dict[str, str], device: str, rest: dict[str, str]) -> None:
    environment = dict(asked)
    assert choose(environment) == device
    chosen = dict(environment)
    assert chosen.pop(CHOSEN) == asked.get("DEVICE", "cpu").lower()
    assert chosen == rest
    assert choose(environment) == device  # a worker's, which inherits it
    assert environment == chosen | {CHOSEN: environment[CHOSEN]}


def test_torch_sees_a_card_only_where_one_was_asked_for() -> None:
    assert torch.cuda.is_available() == (DEVICE == "cuda")
