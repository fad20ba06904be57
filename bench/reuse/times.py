"""Time to the first token of prompts with ten documents of 1,500 tokens: cold, reordered, one edited, cold again."""

from __future__ import annotations

import random
import time

from prerope.server.engine.engine import Engine
from prerope.server.engine.sampling.params import SamplingParams
from prerope.server.engine.sequence import EngineRequest
from prerope.server.tokenizer import Tokenizer

from bench.reuse.quality import PREFIX, Case, prompt_of
from bench.shared.text import default_texts

NUM_DOCUMENTS, LENGTH = 10, 1500


def time_to_first_token(engine: Engine, tokenizer: Tokenizer, reread: int = 16) -> dict[str, float]:
    """Seconds by kind of request. Replies of the reordered prompt, warm and cold, must be the same tokens."""
    ids = tokenizer.encode(next(default_texts())[1])
    documents = [ids[start : start + LENGTH] for start in range(0, (NUM_DOCUMENTS + 1) * LENGTH, LENGTH)]
    new, documents = documents[-1], documents[:-1]
    shuffled = random.Random(1).sample(documents, NUM_DOCUMENTS)
    edited = [*documents[:4], new, *documents[5:]]
    first, second = (tokenizer.encode(f"\n\nQuestion: What is {what}?\nAnswer:") for what in ("a class", "a tuple"))

    def ask(case: Case, salt: str, reread: int | None) -> tuple[float, list[int]]:
        prompt, spans = prompt_of(tokenizer.encode(PREFIX), case, reread)
        began, seconds, tokens = time.perf_counter(), 0.0, list[int]()
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        engine.add(EngineRequest("timed", prompt, sampling, documents=spans, cache_salt=salt))
        while engine.has_work():
            for _, output in engine.step():
                tokens += output.token_ids
                seconds = seconds or time.perf_counter() - began
        return seconds, tokens

    times, replies = {}, {}
    for name, case, salt, how in (
        ("cold", Case(documents, first), "a", reread),
        ("another order, another question", Case(shuffled, second), "a", reread),
        ("one document edited", Case(edited, first), "a", reread),
        ("cold, of that other order", Case(shuffled, second), "b", reread),
        ("cold, full attention", Case(documents, first), "c", None),
    ):
        times[name], replies[name] = ask(case, salt, how)
    if replies["another order, another question"] != replies["cold, of that other order"]:
        raise AssertionError("a warm reply differs from a cold one")
    return times
