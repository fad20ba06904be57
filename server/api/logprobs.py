"""Log-probabilities in the three shapes that clients know: OpenAI's completions, OpenAI's chat, and /generate's own.

A token whose bytes are no text by themselves is written `bytes:\\xe2\\x80`, as OpenAI does; so two such tokens stay
two keys of `top_logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prerope.server.api.stream.generation import Token
from prerope.server.api.stream.printing import Many
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.tokenizer import TextStream, Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot carry (OpenAI's value for it)."""


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[Token], num_alternatives: int, offset: int = 0
) -> dict[str, Many]:
    """The `logprobs` of a completions choice. `text_offset` counts from the beginning of the reply's text.

    offset: characters of the reply before the text that these tokens' own starts count from.
    """
    scores = [(token.token_id, token.logprobs) for token in tokens]
    return _columns(tokenizer, scores, (offset + token.start for token in tokens), num_alternatives)


def echoed_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    num_alternatives: int,
) -> dict[str, Many]:
    """The log-probabilities of an echoed prompt. Its first token has none: nulls, as OpenAI sends them."""
    scores = list(zip(token_ids, logprobs, strict=True))
    return _columns(tokenizer, scores, _starts(tokenizer, token_ids), num_alternatives)


def _columns(
    tokenizer: Tokenizer,
    scores: Sequence[tuple[int, TokenLogprobs | None]],
    starts: Iterable[int],
    num_alternatives: int,
) -> dict[str, Many]:
    length = len(scores)
    return {
        "tokens": Many((tokenizer.token_string(token_id) for token_id, _ in scores), length),
        "token_logprobs": Many((scored and finite(scored.logprob) for _, scored in scores), length),
        "top_logprobs": Many((_top_by_text(tokenizer, scored, num_alternatives) for _, scored in scores), length),
        "text_offset": Many(starts, length),
    }


def _starts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> Iterator[int]:
    """Where each token's text begins, in characters."""
    stream, start = TextStream(tokenizer), 0
    for token_id in token_ids:
        yield start
        start += len(stream.push([token_id]))


def _top_by_text(
    tokenizer: Tokenizer, logprobs: TokenLogprobs | None, num_alternatives: int
) -> dict[str, float] | None:
    """Alternatives by their text; the token itself is always among them, so there may be one more than asked for."""
    if logprobs is None:
        return None
    top = {tokenizer.token_string(i): finite(p) for i, p in logprobs.top[:num_alternatives]}
    top.setdefault(tokenizer.token_string(logprobs.token_id), finite(logprobs.logprob))
    return top


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], num_alternatives: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    printed = (_chat_entry(tokenizer, token.logprobs, num_alternatives) for token in tokens)
    return {"content": Many(printed, len(tokens)), "refusal": None}


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprobs | None, num_alternatives: int) -> dict[str, Any]:
    assert entry is not None  # asked for, so the engine gave one for each token
    top = [_chat_token(tokenizer, i, p) for i, p in entry.top[:num_alternatives]]
    return {**_chat_token(tokenizer, entry.token_id, entry.logprob), "top_logprobs": top}


def vllm_prompt_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs | None]) -> Many:
    """`prompt_logprobs` as vLLM has them: a token of the prompt's, and the likeliest in its place, by id.

    The rank of a token that is not among the likeliest is not known: null.
    """
    return Many((None if entry is None else _by_id(tokenizer, entry) for entry in logprobs), len(logprobs))


def _by_id(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, dict[str, Any]]:
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)}
    scored = {entry.token_id: (entry.logprob, None)} | ranked
    return {
        str(token_id): {
            "logprob": finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_string(token_id),
        }
        for token_id, (logprob, rank) in scored.items()
    }


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_string(token_id),
        "bytes": list(tokenizer.token_bytes(token_id)),
        "logprob": finite(logprob),
    }


def generate_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> Many:
    """The `logprobs` of /generate: one entry a token, with its id."""
    entries = [token.logprobs for token in tokens if token.logprobs is not None]
    return Many((_id_entry(tokenizer, entry) for entry in entries), len(entries))


def _id_entry(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, Any]:
    top = [_id_token(tokenizer, token_id, logprob) for token_id, logprob in entry.top]
    return {**_id_token(tokenizer, entry.token_id, entry.logprob), "top": top}


def _id_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token_id, "token": tokenizer.token_string(token_id), "logprob": finite(logprob)}
