"""The embedded model, in fp32 through HTTP: greedy output is transformers' `generate`, token for token."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch
from prerope.server.models.checkpoint import Checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.server.fleet.test_tensor_parallel import started
from tests.servers import Servers

PROMPTS = {
    "sentence": "The capital of France is",
    "code": "def fibonacci(n):\n    ",
    "several chunks": "A list of planets and what is known of each. " * 15,
}
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(smollm2: Checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2.source, dtype=torch.float32)


@pytest.fixture(scope="module")
def http(serve_module: Servers) -> Iterator[httpx.Client]:
    url = serve_module(dtype="float32", kv_cache_memory="256MiB", max_batched_tokens=128)
    with httpx.Client(base_url=url, timeout=300) as client:
        yield client


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_equals_transformers(name: str, http: httpx.Client, model: PreTrainedModel) -> None:
    prompt_ids = http.post("/tokenize", json={"prompt": PROMPTS[name]}).json()["tokens"]
    ids = torch.tensor([prompt_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    body = {"prompt": PROMPTS[name], "temperature": 0, "max_tokens": NUM_TOKENS}
    reply = http.post("/generate", json=body).json()
    assert reply["token_ids"] == output[0, len(prompt_ids) :].tolist()


@pytest.mark.slow
def test_two_ranks_say_what_one_says(http: httpx.Client) -> None:
    """Whose prompts are read in one piece, where the other's are read in several."""
    process, url = started(None, DTYPE="float32", KV_CACHE_MEMORY="256MiB")
    try:
        for prompt in PROMPTS.values():
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 32, "ignore_eos": True}
            ours, theirs = (
                httpx.post(f"{base}/generate", json=body, timeout=300).json() for base in (url, http.base_url)
            )
            assert ours["token_ids"] == theirs["token_ids"]
    finally:
        process.kill()
        process.communicate()
