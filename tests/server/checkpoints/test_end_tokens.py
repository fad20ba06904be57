"""Which tokens end a reply: the union of what a checkpoint's files name and of the family's end of turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.models.end_tokens import describe, end_tokens
from prerope.server.tokenizer import Tokenizer

from tests.servers import Servers

END_OF_TEXT, START, END_OF_TURN = 0, 1, 2


def rewrite(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def folder(byte_checkpoint: Path, tmp_path: Path) -> Path:
    """A ChatML fine-tune whose configs still name a base model's end, which is no token of its chat format."""
    folder = Path(shutil.copytree(byte_checkpoint, tmp_path / "chatml"))
    rewrite(folder, "config.json", eos_token_id=7)
    rewrite(folder, "generation_config.json", eos_token_id=[8, 9])
    rewrite(folder, "tokenizer_config.json", eos_token="<|endoftext|>")
    return folder


def test_it_is_the_union_and_says_who_names_each(folder: Path) -> None:
    tokenizer = Tokenizer.load(Checkpoint(str(folder), "chatml"))
    named = {8: "generation config", 9: "generation config", 7: "config", END_OF_TEXT: "tokenizer"}
    assert tokenizer.end_tokens == named | {END_OF_TURN: "chat format"}
    assert f"<|im_end|> ({END_OF_TURN}, chat format)" in describe(tokenizer.end_tokens, tokenizer.hf)


def test_a_reply_ends_at_its_chat_format_s_end_of_turn(folder: Path, serve: Servers) -> None:
    url = serve(model_id=str(folder), max_model_len=128)
    body = {"prompt": "Hello", "max_tokens": 5, "logit_bias": {str(END_OF_TURN): 100}}
    reply = httpx.post(f"{url}/generate", json=body, timeout=60).json()
    assert (reply["finish_reason"], reply["token_ids"]) == ("stop", [END_OF_TURN])


def test_the_end_of_a_gpt_oss_message_is_no_end_of_the_reply(byte_checkpoint: Path) -> None:
    checkpoint = Checkpoint(str(byte_checkpoint), "tiny")
    hf = Tokenizer.load(checkpoint).hf
    hf.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    phi = end_tokens(checkpoint, hf)
    hf.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|return|>"]})
    gpt_oss = end_tokens(checkpoint, hf)
    assert hf.convert_tokens_to_ids("<|end|>") in phi
    assert hf.convert_tokens_to_ids("<|end|>") not in gpt_oss
    assert hf.convert_tokens_to_ids("<|return|>") in gpt_oss
