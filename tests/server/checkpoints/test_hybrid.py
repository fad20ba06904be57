"""Models that are no Llama over HTTP: hybrids, scores that fall with the distance, latent keys; and what is refused.

Of a hybrid also choices, streams that are left, prefix hits, and what /metrics says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.engine.models.model_table import as_people_run_it
from tests.engine.models.model_types import tiny_of_type
from tests.servers import Servers
from tests.tiers import every

PROMPT = "The state of a sequence is kept where a block ends, and " * 4


@pytest.fixture(scope="module")
def url(byte_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Servers) -> str:
    from transformers import AutoTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("hybrid"), AutoTokenizer.from_pretrained(byte_checkpoint)
    tiny_of_type("lfm2", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return serve_module(model_id=str(folder), max_num_seqs=4)


def ask(url: str, **fields: Any) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True} | fields
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


def test_choices_hits_and_streams_that_are_left(url: str) -> None:
    once = ask(url).json()
    choices = ask(url, n=4).json()
    assert {choice["text"] for choice in choices["choices"]} == {once["choices"][0]["text"]}
    assert choices["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    with httpx.stream("POST", f"{url}/generate", json={"prompt": PROMPT, "max_tokens": 200, "stream": True}) as reply:
        assert json.loads(next(reply.iter_lines()).removeprefix("data: "))
    assert ask(url).json()["choices"] == once["choices"]
    assert metric(url, "prerope:num_states{") == 12
    assert metric(url, "prerope:num_states_cached") > 1
    assert metric(url, "prerope:state_bytes") == 12 * 2 * 64 * 3 * torch.float32.itemsize


def test_documents_are_refused_by_name(url: str) -> None:
    reply = httpx.post(f"{url}/generate", json={"prompt": "?", "documents": ["one " * 40, "two " * 40]})
    assert reply.status_code == 400
    assert "recurrent layers" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("model_type", "config"),
    every(3, [("jamba", {"max_position_embeddings": 512}), ("falcon", {"alibi": True}), ("deepseek_v2", {})]),
)
def test_greedy_equals_generate(
    model_type: str, config: dict[str, Any], byte_checkpoint: Path, tmp_path: Path, serve: Servers
) -> None:
    """Past the trained length (Jamba's config ends its positions there), in small chunks, then over a warm cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_checkpoint)
    model = tiny_of_type(model_type, vocab_size=len(tokenizer), **config)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert ids.shape[1] > 64 * 3 // 2
    with as_people_run_it(model, 512):
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None
        )[0, ids.shape[1] :].tolist()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    url = serve(model_id=str(tmp_path), max_num_seqs=4, max_batched_tokens=48, max_model_len=512, rope_method="model")
    for choices in (1, 2):
        body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "n": choices}
        reply = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60).json()
        assert [choice["token_ids"] for choice in reply["choices"]] == [expected] * choices
