"""What the engine hands back, step by step, and the stream in which one request gets it. The API makes text of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

from prerope.server.errors import RequestError

ALTERNATIVE = struct.Struct("=if")


class FinishReason(StrEnum):
    """Why a sequence ended. `stop`: end-of-sequence or a stop id; `length`: max_tokens or the model's length."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability (natural, of the unpenalised, untempered distribution) of one token and its alternatives.

    packed: the alternatives, each an id and a log-probability in four bytes. (As objects they would take more memory
    than the token's keys and values.)
    """

    token_id: int
    logprob: float
    packed: bytes = b""

    @property
    def top(self) -> list[tuple[int, float]]:
        """(token id, logprob), best first."""
        return list(ALTERNATIVE.iter_unpack(self.packed))


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request: in the queue, then to the first token, then to the end, or until now."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One event of one request.

    Attributes:
        token_ids: the new tokens; empty in a prefill-progress event.
        logprobs: one per new token when asked for.
        prompt_logprobs: once, with the first event after the prefill: one per prompt token, the first is None.
        num_prompt_tokens, num_cached_tokens, num_processed_tokens: the prompt, how much of it came from the
            prefix cache, and how much is computed so far (cached included).
        finish_reason: set on the last event.
        document_cached_tokens: of each document that is read on its own, how many of its tokens were in the cache; with
            every event that has tokens or ends the request.
        num_drafted_tokens, num_accepted_tokens: of the output until now; see `server.engine.speculation`.
        timings: until now, with every event that has tokens or ends the request: its reader may end it there.
        failure: on the last event of a request that failed alone; its caller gets the error.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_processed_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    document_cached_tokens: tuple[int, ...] = ()
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    failure: RequestError | None = None
