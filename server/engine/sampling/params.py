"""What one request asks of the sampler. Plain values, already validated by the API.

Stop *strings* are not here: the engine knows no text. The API finds them and aborts the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prerope.server.engine.sampling.mask import Grammar


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token, and when to end.

    Attributes:
        max_tokens: tokens to generate at most; 0 only together with `prompt_logprobs`.
        min_tokens: end-of-sequence and stop ids are not sampled before this many tokens.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        repetition_penalty: over prompt and output (CTRL, Keskar 2019); 1 is off.
        presence_penalty, frequency_penalty: over the output (OpenAI); 0 is off.
        logit_bias: token id → added to its logit before anything else.
        allowed_token_ids: no other token is drawn, as far as a grammar leaves a choice.
        bad_token_ids: sequences of tokens that are not drawn one after another, likewise.
        seed: makes this request's draws reproducible, whatever else is in the batch.
        logprobs: None, or how many alternatives to return beside each sampled token (0 is the token alone).
        prompt_logprobs: the same for every prompt token but the first, from token `prompt_logprobs_start` on; rows
            that are scored are computed, not taken from the prefix cache.
        grammar: what the output has to match; see `server.engine.sampling.mask` for how it meets the rest.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_bans(self) -> bool:
        return self.allowed_token_ids is not None or bool(self.bad_token_ids)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
