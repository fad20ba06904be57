"""The official OpenAI client, sync and async, streamed and whole, against the real server and transformers' figures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from prerope.server.api.chat.template import render_chat
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

MODEL = "tiny-llama"
PROMPT = "The quick brown fox jumps over the lazy dog, and then"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), rope_method="rope", max_model_len=512))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(Checkpoint(str(tiny_checkpoint), MODEL))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


def log_softmax(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Row i: the log-probabilities of the token after token i."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


# --- models ---


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.id == MODEL
    assert client.models.retrieve(MODEL) == listed
    assert listed.model_extra is not None
    assert listed.model_extra["max_model_len"] == 512
    assert listed.model_extra["rope"]["method"] == "rope"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


# --- completions ---


def test_completion(client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    reply = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
    ids = tokenizer.encode(PROMPT)
    expected = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=16, do_sample=False
    )
    assert reply.object == "text_completion"
    assert reply.choices[0].text == tokenizer.decode(expected[0, len(ids) :].tolist())
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is None
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 16)
    assert reply.usage.total_tokens == len(ids) + 16


def test_completion_logprobs(client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, logprobs=4, seed=11)
    logprobs, text = reply.choices[0].logprobs, reply.choices[0].text
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(10)]
    prompt_ids = tokenizer.encode(PROMPT)
    row = log_softmax(model, prompt_ids)[-1]
    best = row.topk(4)
    first = logprobs.top_logprobs[0]
    assert first[logprobs.tokens[0]] == pytest.approx(logprobs.token_logprobs[0])
    for token_id, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        assert first[tokenizer.token_text(token_id)] == pytest.approx(value, abs=1e-3)
    assert all(len(top) in (4, 5) for top in logprobs.top_logprobs), "the token itself may be one more"


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_scoring_by_echo(client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer, as_ids: bool) -> None:
    """What evaluation harnesses do: no new tokens, log-probabilities of the prompt."""
    ids = tokenizer.encode(PROMPT)
    prompt: Any = ids if as_ids else PROMPT
    reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    choice = reply.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [tokenizer.token_text(token_id) for token_id in ids]
    token_logprobs: list[Any] = choice.logprobs.token_logprobs or []
    assert token_logprobs[0] is None
    rows = log_softmax(model, ids)
    expected = [rows[i, token_id].item() for i, token_id in enumerate(ids[1:])]
    assert token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    tops: list[Any] = choice.logprobs.top_logprobs or []
    assert tops[0] is None
    assert [max(top.values()) for top in tops[1:]] == pytest.approx(rows[:-1].max(-1).values.tolist(), abs=1e-3)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0


def test_echo_goes_before_new_text(client: OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, logprobs=0)
    echoed = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, logprobs=0, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    before, after = plain.choices[0].logprobs, echoed.choices[0].logprobs
    assert before is not None
    assert after is not None
    assert (after.tokens or [])[-5:] == before.tokens
    assert (after.text_offset or [])[-5:] == [len(PROMPT) + start for start in before.text_offset or []]
    bare = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True)
    assert bare.choices[0].text == PROMPT
    assert bare.choices[0].logprobs is None


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0])
def test_beams_are_those_of_transformers(
    client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer, length_penalty: float
) -> None:
    """With two tokens as ends that greedy replies hold, so that beams end early and late."""
    ids = tokenizer.encode(PROMPT)
    width, length = 4, 10
    body: dict[str, Any] = {"use_beam_search": True, "length_penalty": length_penalty, "return_token_ids": True}
    plain = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=length, n=width, extra_body={**body, "ignore_eos": True}
    )
    first: list[Any] = [choice.model_extra["token_ids"] for choice in plain.choices if choice.model_extra]
    ends = [first[0][4], first[1][7]]
    found = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=length, n=width, logprobs=1,
        extra_body={**body, "ignore_eos": True, "stop_token_ids": ends},
    )  # fmt: skip
    expected = model.generate(
        torch.tensor([ids]), num_beams=width, num_return_sequences=width, max_new_tokens=length, do_sample=False,
        length_penalty=length_penalty, early_stopping="never", eos_token_id=ends, pad_token_id=-1,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    wanted = [[one for one in row[len(ids) :].tolist() if one != -1] for row in expected.sequences]
    replies: list[Any] = [choice.model_extra["token_ids"] for choice in found.choices if choice.model_extra]
    assert replies == wanted
    for choice, score in zip(found.choices, expected.sequences_scores.tolist(), strict=True):
        assert choice.logprobs is not None
        scored = choice.logprobs.token_logprobs or []
        assert sum(map(float, scored)) / len(scored) ** length_penalty == pytest.approx(score, rel=1e-5)
    reasons = ["stop" if reply[-1] in ends else "length" for reply in replies]
    assert [choice.finish_reason for choice in found.choices] == reasons
    assert len({*reasons}) == 2 or length_penalty != 1.0


def test_beams_of_a_chat_and_a_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "extra_body": {"use_beam_search": True}}
    one = client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message.content
    greedy = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0)
    assert one == greedy.choices[0].message.content, "a single beam is greedy"
    best = client.chat.completions.create(messages=MESSAGES, n=3, **asked).choices
    chunks = list(client.chat.completions.create(messages=MESSAGES, n=3, stream=True, **asked))
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in best]
    asked["extra_body"]["bad_words"] = ["a"]
    with pytest.raises(openai.BadRequestError, match="bad_words"):
        client.chat.completions.create(messages=MESSAGES, **asked)


def test_several_prompts_and_choices(client: OpenAI, tokenizer: Tokenizer) -> None:
    prompts: Any = [tokenizer.encode("One two"), tokenizer.encode("Three four five")]
    reply = client.completions.create(model=MODEL, prompt=prompts, n=3, max_tokens=8, seed=3)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, prompts)), "a prompt counts once"
    texts = [choice.text for choice in reply.choices]
    assert len(set(texts[:3])) == 3, "choices draw from seeds of their own"
    again = client.completions.create(model=MODEL, prompt=prompts, n=3, max_tokens=8, seed=3)
    assert [choice.text for choice in again.choices] == texts
    alone = client.completions.create(model=MODEL, prompt=prompts[1], max_tokens=8, seed=5)
    assert alone.choices[0].text == texts[5], "choice i of a seeded request is seed + i"
    words = client.completions.create(model=MODEL, prompt=["One two", "Three four five"], n=3, max_tokens=8, seed=3)
    assert [choice.text for choice in words.choices] == texts


def test_vllm_extras(client: OpenAI) -> None:
    extra = {
        "top_k": 1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [5],
        "cache_salt": "mine",
        "priority": 1,
        "rope": {"method": "rerope", "window": 16},
    }
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, extra_body=extra)
    again = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, extra_body=extra)
    assert reply.choices[0].text == again.choices[0].text, "top_k 1 is greedy"


# --- chat ---


def test_chat(client: OpenAI, tokenizer: Tokenizer) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0)
    prompt_ids = tokenizer.encode(render_chat(tokenizer, MESSAGES), add_special_tokens=False)
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt_ids)
    plain = client.completions.create(model=MODEL, prompt=prompt_ids, max_tokens=12, temperature=0)
    assert reply.choices[0].message.content == plain.choices[0].text
    assert reply.choices[0].finish_reason == plain.choices[0].finish_reason


def test_chat_without_a_limit_fills_the_context(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 400}]
    reply = client.chat.completions.create(model=MODEL, messages=long, temperature=0, extra_body={"ignore_eos": True})
    assert reply.usage is not None
    assert reply.usage.total_tokens == 512
    assert reply.choices[0].finish_reason == "length"


def test_chat_logprobs(client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3, seed=2, n=2
    )
    prompt_ids = tokenizer.encode(render_chat(tokenizer, MESSAGES), add_special_tokens=False)
    best = log_softmax(model, prompt_ids)[-1].topk(3)
    for choice in reply.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        written = b"".join(bytes(entry.bytes or []) for entry in content)
        assert written.decode(errors="replace") == choice.message.content
        assert [bytes(top.bytes or []) for top in content[0].top_logprobs] == [
            tokenizer.token_bytes(token_id) for token_id in best.indices.tolist()
        ]
        assert [top.logprob for top in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_content_parts_and_what_clients_send_along(client: OpenAI) -> None:
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]}
    ]
    joined: list[Any] = [{"role": "user", "content": "Hello\nyou"}]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    replies = [
        client.chat.completions.create(
            messages=messages,
            user="someone",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            response_format={"type": "text"},
            parallel_tool_calls=True,
            modalities=["text"],
            tool_choice="none",
            **options,
        )
        for messages in (parts, joined)
    ]
    assert replies[0].choices[0].message.content == replies[1].choices[0].message.content


def test_a_reply_can_be_sent_back(client: OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    history: list[Any] = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(model=MODEL, messages=history, max_tokens=4).choices


def test_developer_messages(client: OpenAI) -> None:
    """This template knows no developer, so it is told as the system."""
    rest: list[Any] = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    told = [
        client.chat.completions.create(messages=[{"role": role, "content": "Rhyme."}, *rest], **options)
        for role in ("developer", "system")
    ]
    assert told[0].choices[0].message.content == told[1].choices[0].message.content
    as_developer, as_system = (reply.usage and reply.usage.prompt_tokens for reply in told)
    assert as_developer == as_system


# --- streams ---


def test_completion_stream(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 4, "n": 2, "logprobs": 1}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "text_completion" for chunk in chunks)
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in choices) == whole.choices[index].text
        assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason == whole.choices[index].finish_reason
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [value for choice in choices for value in getattr(choice.logprobs, name)]
            expected = getattr(whole.choices[index].logprobs, name)
            assert joined == (pytest.approx(expected, abs=1e-4) if name == "token_logprobs" else expected)
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_echo_stream(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 4,
        "seed": 4,
        "logprobs": 1,
        "echo": True,
    }
    whole = client.completions.create(**options)
    choices = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    tokens = [token for choice in choices for token in (choice.logprobs and choice.logprobs.tokens) or []]
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.tokens


def test_chat_stream(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": 4, "logprobs": True}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    first, *middle, finish, usage = list(stream)
    assert first.object == "chat.completion.chunk"
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == whole.choices[0].message.content
    entries = [
        entry for chunk in middle for entry in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert whole.choices[0].logprobs is not None
    assert [entry.token for entry in entries] == [entry.token for entry in whole.choices[0].logprobs.content or []]
    assert finish.choices[0].finish_reason == whole.choices[0].finish_reason
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


def test_chat_stream_without_usage(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_stop_strings_stream_the_same_text(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    text = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = [text[len(text) // 2 :][:4], "never written"]
    cut = client.chat.completions.create(**options, stop=stop)
    assert cut.choices[0].message.content == text[: text.index(stop[0])]
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


# --- async, and refusals as the client sees them ---


def test_async_client(url: str, client: OpenAI) -> None:
    async def main() -> tuple[str, str, str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:
            completion = many.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=9)
            chat = many.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=9)
            one, two = await asyncio.gather(completion, chat)
            stream = await many.chat.completions.create(
                model=MODEL, messages=MESSAGES, temperature=0, max_tokens=9, stream=True
            )
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return one.choices[0].text, two.choices[0].message.content or "", streamed

    text, content, streamed = asyncio.run(main())
    assert text == client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=9).choices[0].text
    assert streamed == content


def test_refusals_are_the_clients_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=50)
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tool_choice="required", stream=True)
    assert refused.value.param == "tool_choice"
