"""POST /generate against the model itself: greedy text, log-probabilities, seeds, stop strings, the position method."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prerope.server.api.chat.template import render_chat
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), rope_method="rope", max_model_len=512))


@pytest.fixture(scope="module")
def max_model_len(http: httpx.Client) -> int:
    return int(http.get("/v1/models").json()["data"][0]["max_model_len"])


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(Checkpoint(str(tiny_checkpoint), "tiny"))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


PROMPT = "The quick brown fox jumps over the lazy dog, and then"


def generate(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/generate", json={"prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def greedy(model: PreTrainedModel, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """What transformers continues the prompt with."""
    ids = torch.tensor([prompt_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return list(output[0, len(prompt_ids) :].tolist())


def log_softmax(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Row i: the log-probabilities of the token after token i."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_greedy_equals_transformers(
    http: httpx.Client, model: PreTrainedModel, tokenizer: Tokenizer, as_ids: bool
) -> None:
    prompt_ids = tokenizer.encode(PROMPT)
    reply = generate(http, prompt=prompt_ids if as_ids else PROMPT, temperature=0, max_tokens=40)
    assert reply["token_ids"] == greedy(model, prompt_ids, 40)
    assert reply["text"] == tokenizer.decode(reply["token_ids"])
    assert reply["usage"]["prompt_tokens"] == len(prompt_ids)
    assert reply["usage"]["completion_tokens"] == len(reply["token_ids"])
    assert reply["finish_reason"] in ("length", "stop")


def test_a_batch_of_greedy_requests_equals_transformers(url: str, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(PROMPT)[: 3 + length] * (1 + length % 3) for length in range(8)]

    async def all_at_once() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            bodies = [{"prompt": ids, "temperature": 0, "max_tokens": 16} for ids in prompts]
            replies = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
            return [reply.json() for reply in replies]

    for prompt_ids, reply in zip(prompts, asyncio.run(all_at_once()), strict=True):
        assert reply["token_ids"] == greedy(model, prompt_ids, 16)


def test_logprobs_are_the_models(http: httpx.Client, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    prompt_ids = tokenizer.encode(PROMPT)
    reply = generate(http, max_tokens=12, logprobs=3, seed=5)
    rows = log_softmax(model, prompt_ids + reply["token_ids"])[len(prompt_ids) - 1 :]
    assert len(reply["logprobs"]) == len(reply["token_ids"])
    for token_id, entry, row in zip(reply["token_ids"], reply["logprobs"], rows, strict=False):
        assert entry["token_id"] == token_id
        assert entry["logprob"] == pytest.approx(row[token_id].item(), abs=1e-3)
        best = row.topk(3)
        assert [one["token_id"] for one in entry["top"]] == best.indices.tolist()
        assert [one["logprob"] for one in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_reply_has_what_the_wire_promises(http: httpx.Client) -> None:
    reply = generate(http, max_tokens=3)
    assert set(reply) == {"id", "text", "token_ids", "finish_reason", "usage", "rope", "timings"}
    counts = {"prompt_tokens", "completion_tokens", "cached_tokens", "drafted_tokens", "accepted_tokens"}
    assert set(reply["usage"]) == counts
    assert "method" in reply["rope"]
    assert set(reply["timings"]) == {"queue_s", "prefill_s", "decode_s"}
    assert all(seconds >= 0 for seconds in reply["timings"].values())


def test_max_tokens_defaults_to_256_capped_by_what_fits(http: httpx.Client, max_model_len: int) -> None:
    assert generate(http, ignore_eos=True)["usage"]["completion_tokens"] == 256
    reply = generate(http, prompt=[1] * (max_model_len - 5), ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 5
    assert reply["finish_reason"] == "length"


def test_a_repeated_prompt_comes_from_the_cache(http: httpx.Client) -> None:
    prompt = list(range(10, 110))
    cold = generate(http, prompt=prompt, max_tokens=4, temperature=0, cache_salt="a")
    warm = generate(http, prompt=prompt, max_tokens=4, temperature=0, cache_salt="a")
    other = generate(http, prompt=prompt, max_tokens=4, temperature=0, cache_salt="b")
    assert cold["usage"]["cached_tokens"] == 0
    assert warm["usage"]["cached_tokens"] >= 80
    assert other["usage"]["cached_tokens"] == 0, "another salt sees nothing of it"
    assert warm["token_ids"] == cold["token_ids"] == other["token_ids"]


def test_stop_string_across_tokens(http: httpx.Client, tokenizer: Tokenizer) -> None:
    whole = generate(http, temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    texts = [tokenizer.token_text(token_id) for token_id in whole["token_ids"]]
    assert "".join(texts) == whole["text"]
    # A stop string from the end of one token into the next, where it occurs first.
    middle = next(i for i in range(6, 20) if texts[i] and texts[i + 1])
    stop = texts[middle][-1:] + texts[middle + 1][:1]
    cut = whole["text"].index(stop)
    reply = generate(http, temperature=0, max_tokens=24, ignore_eos=True, logprobs=0, stop=[stop])
    assert reply["finish_reason"] == "stop"
    assert reply["text"] == whole["text"][:cut]
    starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    kept = [i for i in range(len(texts)) if starts[i] < cut]
    assert reply["token_ids"] == [whole["token_ids"][i] for i in kept]
    assert [entry["token_id"] for entry in reply["logprobs"]] == reply["token_ids"]
    assert len(kept) <= reply["usage"]["completion_tokens"] <= len(kept) + 2, "the engine stopped at the stop string"


def test_stop_token_ids(http: httpx.Client) -> None:
    whole = generate(http, temperature=0, max_tokens=8, ignore_eos=True)
    stop = whole["token_ids"][3]
    reply = generate(http, temperature=0, max_tokens=8, stop_token_ids=[stop])
    assert reply["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == whole["token_ids"].index(stop) + 1


def test_logit_bias_and_min_tokens(http: httpx.Client) -> None:
    assert set(generate(http, temperature=0, max_tokens=5, logit_bias={"77": 100})["token_ids"]) == {77}
    reply = generate(http, temperature=0, max_tokens=6, min_tokens=3, logit_bias={"77": 100}, stop_token_ids=[77])
    assert reply["usage"]["completion_tokens"] == 4, "the stop token is not sampled before min_tokens"
    newline = {"logit_bias": {"198": 100}, "stop": ["\n"], "temperature": 0, "max_tokens": 6}
    assert [generate(http, min_tokens=count, **newline)["text"] for count in (0, 1, 3)] == ["", "\n", "\n\n\n"]


def test_seeds_reproduce_under_load(url: str) -> None:
    """The same seed draws the same tokens, alone or among others in the batch."""

    async def draw(client: httpx.AsyncClient, seed: int | None) -> list[int]:
        body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        reply = await client.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        return list(reply.json()["token_ids"])

    async def alone_and_together() -> tuple[list[list[int]], list[list[int]]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            alone = [await draw(client, seed) for seed in range(4)]
            together = await asyncio.gather(*(draw(client, seed) for seed in (0, None, 1, None, 2, 7, 3, 8)))
            return alone, [together[index] for index in (0, 2, 4, 6)]

    alone, together = asyncio.run(alone_and_together())
    assert alone == together
    assert len({tuple(tokens) for tokens in alone}) == 4, "different seeds draw differently"


def test_without_a_seed_draws_differ(http: httpx.Client) -> None:
    draws = {tuple(generate(http, max_tokens=16, ignore_eos=True)["token_ids"]) for _ in range(4)}
    assert len(draws) > 1


def test_a_request_chooses_its_position_method(http: httpx.Client) -> None:
    plain = generate(http, max_tokens=2, rope={"method": "rope"})
    assert plain["rope"]["method"] == "rope"
    windowed = generate(http, max_tokens=2, rope={"method": "rerope", "window": 16})
    assert windowed["rope"]["method"] == "rerope"
    assert windowed["rope"]["window"] == 16


def test_a_deployment_may_forbid_the_choice(serve: Any, tiny_checkpoint: Path) -> None:
    serve_fixed = serve(model_id=str(tiny_checkpoint), rope_per_request=False)
    response = httpx.post(f"{serve_fixed}/generate", json={"prompt": "a", "rope": {"method": "rope"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "rope"
    assert "ROPE_PER_REQUEST" in response.json()["error"]["message"]
    assert httpx.get(f"{serve_fixed}/v1/models").json()["data"][0]["rope_per_request"] is False


def test_tokenize_and_back(http: httpx.Client, tokenizer: Tokenizer, max_model_len: int) -> None:
    reply = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert reply["tokens"] == tokenizer.encode(PROMPT)
    assert reply["count"] == len(reply["tokens"])
    assert reply["max_model_len"] == max_model_len
    assert "".join(reply["token_strs"]) == PROMPT
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": PROMPT}
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == tokenizer.encode("")


def test_a_chat_can_be_tokenized(http: httpx.Client, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    reply = http.post("/tokenize", json={"messages": messages}).json()
    assert reply["tokens"] == tokenizer.encode(render_chat(tokenizer, messages), add_special_tokens=False)
    text = http.post("/detokenize", json={"tokens": reply["tokens"]}).json()["prompt"]
    assert "hi" in text
    assert (
        http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"] == reply["tokens"]
    )


@pytest.mark.parametrize("stop", ["<|im_start|>", "<|im_start|><|im_start|>"])
def test_a_special_token_as_a_stop_string_ends_the_reply(http: httpx.Client, stop: str) -> None:
    reply = generate(http, max_tokens=6, stop=[stop], logit_bias={"1": 100})
    assert reply["finish_reason"] == "stop"
    assert reply["text"] == ""


SCHEMA = {"type": "array", "items": {"enum": ["abc", "abd"]}, "minItems": 12, "maxItems": 12}


def test_speculation_changes_no_token(http: httpx.Client) -> None:
    """The same replies, as a stream too, where few words are to choose from, so that what was said comes again."""
    accepted, told = 0, ("text", "token_ids", "finish_reason", "logprobs")
    few: dict[str, Any] = {"allowed_token_ids": [260, 351]}
    for more in (
        {"temperature": 0},
        {"temperature": 0, "logprobs": 3, **few},
        {"temperature": 0.7, "seed": 5, **few},
        {"temperature": 0, "frequency_penalty": 0.05, "logprobs": 0, **few},
        {"temperature": 0.5, "seed": 1, "json_schema": SCHEMA},
    ):
        body: dict[str, Any] = {"prompt": (PROMPT + " ") * 4, "max_tokens": 60, "ignore_eos": True, **more}
        off, auto = (generate(http, speculation=choice, **body) for choice in ("off", "auto"))
        assert off["usage"]["drafted_tokens"] == off["usage"]["accepted_tokens"] == 0
        assert [off.get(name) for name in told] == [auto.get(name) for name in told]
        assert auto["usage"]["accepted_tokens"] <= auto["usage"]["drafted_tokens"]
        accepted += auto["usage"]["accepted_tokens"]
    assert accepted > 20
    with http.stream("POST", "/generate", json={**body, "stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert [token for event in events for token in event.get("token_ids", ())] == off["token_ids"]
    assert http.post("/generate", json={"prompt": PROMPT, "speculation": "on"}).status_code == 400
