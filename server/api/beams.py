"""Beam search: replies that are likely as a whole, found by going on with the `width` likeliest beginnings.

    prompt ─┬─ a ─┬─ a b ── a b .        each step asks the engine for one token more of every beam, with the
            │     └─ a c                 likeliest alternatives; of all of them the likeliest are the next beams
            └─ d ──── d e

What beams have in common is in the prefix cache, so that a step reads little more than its last block. A beam that
ends counts when it is among the `width` likeliest of its step, and the search goes on with others; beams are compared
by their log-probability over length ** length_penalty. As transformers searches with early_stopping "never": the
sampler's filters, penalties and seed have no part in it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prerope.server.api.fairness import current_hold
from prerope.server.api.requests.documents import TokenizedPrompt
from prerope.server.api.requests.internal import GenerationRequest
from prerope.server.api.stream.generation import Generation
from prerope.server.engine.async_engine import OutputStream
from prerope.server.engine.outputs import ALTERNATIVE, FinishReason, TokenLogprobs, TokenOutput
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.errors import InvalidRequest, QueueFull
from prerope.server.service import Service

MOST_TOKENS = 2**18
"""The most tokens of all beams and their prompt: each step submits every beam anew, which costs other requests time."""
ROOM_PAUSE_S = 0.05
"""Until a search that has begun looks again whether the queue has room for its next step."""


@dataclass(frozen=True, slots=True)
class Beam:
    """A beginning of a reply; `total` is its log-probability."""

    ids: tuple[int, ...] = ()
    scored: tuple[TokenLogprobs, ...] = ()
    total: float = 0.0

    def score(self, length_penalty: float) -> float:
        return float(self.total / len(self.ids) ** length_penalty)


class Step(NamedTuple):
    """A beam and one of its likeliest next tokens. Most are not taken, so that they are no beams of their own yet."""

    total: float
    beam: Beam
    token_id: int
    logprob: float
    packed: bytes

    def taken(self) -> Beam:
        scored = TokenLogprobs(self.token_id, self.logprob, self.packed)
        return Beam((*self.beam.ids, self.token_id), (*self.beam.scored, scored), self.total)


@dataclass(slots=True)
class BeamSearch:
    """The search for one request's replies.

    Attributes:
        arrived: `time.perf_counter()` when the HTTP request came.
        shown_special_ids: see `TextStream`.
        engine_requests: that of `server.api.running`, which begins searches.
    """

    service: Service
    request: GenerationRequest
    request_id: str
    arrived: float
    shown_special_ids: frozenset[int]
    engine_requests: Callable[..., list[EngineRequest]]

    async def replies(self, prompt: TokenizedPrompt, params: SamplingParams, index: int) -> list[Generation]:
        """The best replies to a prompt, the likeliest first, as generations that have ended. params: as they would be
        drawn by, and `check_search` has seen them. index: of the first of these replies."""
        beams, max_tokens = self.request.beams, params.max_tokens
        assert beams is not None
        current_hold().count(beams.width)
        self._limit_time()
        ends = self._ends()
        live, ended, usage = [Beam()], list[Beam](), _Usage()
        for number in range(max_tokens):
            name = f"{self.request_id}-{index}-{number}"
            steps = await self._steps(name, prompt, live, beams.width + len(ends), usage)
            steps.sort(key=lambda step: -step.total)
            ended = self._best([*ended, *(step.taken() for step in steps[: beams.width] if step.token_id in ends)])
            live = [step.taken() for step in [step for step in steps if step.token_id not in ends][: beams.width]]
            if not live or self._is_over(live[0], ended, max_tokens):
                break
        found = enumerate(self._best([*ended, *live]))
        return [self._ended(prompt, beam, ends, usage, f"{name}-{place}") for place, beam in found]

    def _limit_time(self) -> None:
        """REQUEST_TIMEOUT_S is the engine's, from when it gets a request: of a search, which asks it again and again,
        it holds from the beginning, as the request's own does."""
        given = (self.request.timeout_s, self.service.settings.request_timeout_s)
        self.request = replace(self.request, timeout_s=min((one for one in given if one is not None), default=None))

    def _best(self, beams: Iterable[Beam]) -> list[Beam]:
        """The best beams, as many as replies are asked for, best first: no other beam can become a reply."""
        asked = self.request.beams
        assert asked is not None
        return sorted(beams, key=lambda beam: -beam.score(asked.length_penalty))[: self.request.n]

    def _is_over(self, best: Beam, ended: Sequence[Beam], max_tokens: int) -> bool:
        """Whether no beam that goes on can become one of the replies: its log-probability only falls. ended: the best
        first."""
        beams, num_replies = self.request.beams, self.request.n
        assert beams is not None
        if len(ended) < num_replies:
            return False
        length = max_tokens if beams.length_penalty > 0 else len(best.ids)
        worst = ended[num_replies - 1].score(beams.length_penalty)
        return bool(worst >= best.total / length**beams.length_penalty)

    def _ends(self) -> frozenset[int]:
        asked = self.request.sampling
        own = () if asked.ignore_eos else self.service.tokenizer.eos_token_ids
        return frozenset((*own, *asked.stop_token_ids))

    async def _steps(
        self, name: str, prompt: TokenizedPrompt, beams: Sequence[Beam], num_alternatives: int, usage: _Usage
    ) -> list[Step]:
        """Each beam with each of its likeliest next tokens."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=num_alternatives, ignore_eos=True)
        prompts = [(TokenizedPrompt([*prompt.ids, *beam.ids], prompt.documents), params) for beam in beams]
        asked = self.engine_requests(self.service, name, prompts, self.request, arrived=self.arrived)
        streams = await self._submitted(asked, begun=usage.known)
        try:
            outputs = await asyncio.gather(*map(_last, streams))
        finally:
            for stream in streams:
                await stream.aclose()
        usage.count(outputs[0])
        size, steps = (self.request.output.logprobs or 0) * ALTERNATIVE.size, list[Step]()
        for beam, output in zip(beams, outputs, strict=True):
            assert output.logprobs is not None
            told = output.logprobs[0].packed[:size]
            steps += [Step(beam.total + logprob, beam, i, logprob, told) for i, logprob in output.logprobs[0].top]
        return steps

    async def _submitted(self, asked: list[EngineRequest], *, begun: bool) -> list[OutputStream]:
        """In the queue. A search that has begun is one request, which was let in: it waits until others leave room."""
        late = self.arrived + (self.request.timeout_s or math.inf)
        while True:
            try:
                return self.service.engine.submit(asked)
            except QueueFull:
                if not begun or time.perf_counter() >= late:
                    raise
            await asyncio.sleep(ROOM_PAUSE_S)

    def _ended(self, prompt: TokenizedPrompt, beam: Beam, ends: frozenset[int], usage: _Usage, name: str) -> Generation:
        """A reply whose tokens have all come."""
        asked = self.request.output.logprobs
        outputs = OutputStream(lambda: None)
        outputs.put(
            TokenOutput(
                token_ids=beam.ids,
                num_prompt_tokens=len(prompt.ids),
                num_cached_tokens=usage.cached,
                num_processed_tokens=len(prompt.ids),
                logprobs=None if asked is None else beam.scored,
                finish_reason=FinishReason.STOP if beam.ids[-1] in ends else FinishReason.LENGTH,
                document_cached_tokens=usage.cached_of_documents,
            )
        )
        whole = [(prompt, SamplingParams(max_tokens=len(beam.ids), logprobs=asked))]
        (sequence,) = self.engine_requests(self.service, name, whole, self.request, arrived=self.arrived)
        return Generation(self.service, sequence, outputs, self.request, self.arrived, self.shown_special_ids)


@dataclass(slots=True)
class _Usage:
    """How much of the prompt was cached when its first token was asked for."""

    cached: int = 0
    cached_of_documents: tuple[int, ...] = ()
    known: bool = False

    def count(self, output: TokenOutput) -> None:
        if not self.known:
            self.cached, self.cached_of_documents = output.num_cached_tokens, output.document_cached_tokens
            self.known = True


def check_search(width: int, prompt: TokenizedPrompt, params: SamplingParams) -> None:
    """Raise InvalidRequest for what cannot be searched. params: as a reply would be drawn by."""
    if params.grammar is not None:
        raise InvalidRequest(
            "'use_beam_search' goes with text that nothing constrains: leave out the one or the other",
            param="use_beam_search",
        )
    length = len(prompt.ids) + params.max_tokens
    if width * length > MOST_TOKENS:
        raise InvalidRequest(
            f"'use_beam_search' with {width} beams of up to {length} tokens, prompt and reply, is {width * length} "
            f"tokens, and at most {MOST_TOKENS} are searched: ask for fewer beams, or shorten the prompt or max_tokens",
            param="use_beam_search",
        )


async def _last(stream: OutputStream) -> TokenOutput:
    """The output that has the token."""
    async for output in stream:
        if output.token_ids:
            return output
    raise AssertionError("a request of one token has an output with it")
