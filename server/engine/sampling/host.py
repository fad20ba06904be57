"""From logits to tokens: one row a sequence, each with its own parameters and its own random stream.

Order, as in transformers: logit bias, penalties, bans, forbidden ends, the grammar's mask; then temperature, top-k,
top-p, min-p; then the draw.
A draw takes one uniform number from the sequence's own generator and inverts the distribution, so a seeded request
gives the same tokens whatever else is in the batch. Log-probabilities are of the raw logits, before any of this.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sampling.mask import constrain
from prerope.server.engine.sampling.standing import Standing
from prerope.server.engine.sequence import SamplingParams, Sequence
from torch import Tensor

NUCLEUS_CANDIDATES = 512
"""Top-p looks at this many tokens first and sorts the whole vocabulary only where they hold too little mass."""

BANNED = -1e30
"""Added to a logit, as good as minus infinity."""

PROMPT_LOGPROB_ROWS = 256
"""Rows of logits turned into prompt log-probabilities at once: memory is this times the vocabulary."""


def sample(logits: Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int]) -> list[int]:
    """logits [N, V] fp32, one row a sequence; rows may be changed in place. Returns N token ids."""
    for row, sequence in zip(logits, sequences, strict=True):
        adjust(row, sequence, eos_token_ids)
    constrain(logits, sequences, eos_token_ids)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for index, sequence in enumerate(sequences):
        if not sequence.sampling.greedy:
            tokens[index] = draw(logits[index], sequence.sampling, sequence.generator)
    return tokens


def adjust(row: Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
    """Bias, penalties and forbidden ends, in place on one row [V]; under a grammar, ends are the grammar's matter."""
    sampling = sequence.sampling
    if sequence.standing is None:
        sequence.standing = Standing(sampling, row, eos_token_ids)
    standing = sequence.standing
    if standing.bias is not None:
        ids, bias = standing.bias
        row[ids] += bias
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised = torch.where(row < 0, row * penalty, row / penalty)
        row.copy_(torch.where(standing.seen(sequence.token_ids), penalised, row))
    if sampling.presence_penalty or sampling.frequency_penalty:
        written, counts = standing.counted(sequence.token_ids, sequence.num_prompt_tokens)
        row[written] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.allowed_token_ids is not None or sampling.bad_token_ids:
        ban(row, sequence, standing)
    if sequence.matcher is None and sequence.num_output_tokens < sampling.min_tokens:
        row[standing.ends] = float("-inf")


def ban(row: Tensor, sequence: Sequence, standing: Standing) -> None:
    """Lower what is not allowed by more than any logit, in place on one row [V]: where a grammar or `min_tokens` leaves
    nothing else, it is drawn after all."""
    row[standing.banned(sequence.token_ids, sequence.num_prompt_tokens)] += BANNED
    if standing.forbidden is not None:
        row.copy_(torch.where(standing.forbidden, row + BANNED, row))


def draw(row: Tensor, sampling: SamplingParams, generator: torch.Generator | None) -> int:
    """One token id from logits [V]."""
    scaled = row / sampling.temperature
    candidates, scores = _candidates(scaled, sampling)
    probabilities = scores.double().softmax(-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)  # the best one always stays
    if sampling.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
    cumulative = probabilities.cumsum(-1)
    point = uniform(generator) * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, point, right=True))
    place = min(place, int(probabilities.nonzero()[-1]))  # rounding at the very end of the distribution
    return place if candidates is None else int(candidates[place])


def uniform(generator: torch.Generator | None) -> float:
    """The one number in [0, 1) that a draw takes, fp64, from the sequence's own stream; None: the process's."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _candidates(scaled: Tensor, sampling: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """(ids, scores) best first where top-k or top-p needs an order; (None, scores by id) where neither does."""
    size = scaled.shape[0]
    if 0 < sampling.top_k < size:
        scores, ids = scaled.topk(sampling.top_k)
        return ids, scores
    if sampling.top_p >= 1.0:
        return None, scaled
    scores, ids = scaled.topk(min(NUCLEUS_CANDIDATES, size))
    mass = torch.exp(scores.double().logsumexp(-1) - scaled.double().logsumexp(-1))
    if mass < sampling.top_p:
        scores, ids = scaled.sort(descending=True)
    else:
        # Top-p is of the whole distribution: what lies below the candidates counts as one more, which top-p cuts.
        rest = torch.log1p(-mass.clamp(max=1 - 1e-12)) + scaled.double().logsumexp(-1)
        scores = torch.cat([scores, rest.to(scores.dtype).clamp(min=-1e30)[None]])
        ids = torch.cat([ids, ids[-1:]])
    return ids, scores


def logprobs(rows: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
    """The log-probability of one token a row under logits [N, V] fp32, with the `num_top` best alternatives."""
    # torch's threads share out one row's sum, and of several rows each has its own: so one is summed as two are.
    log_normaliser = rows.expand(max(2, len(rows)), -1).logsumexp(-1, keepdim=True)[: len(rows)]
    chosen = rows.gather(-1, torch.tensor(token_ids, device=rows.device)[:, None]) - log_normaliser
    if num_top == 0:
        return [TokenLogprobs(t, lp) for t, lp in zip(token_ids, chosen[:, 0].tolist(), strict=True)]
    top, ids = rows.topk(min(num_top, rows.shape[-1]), dim=-1)
    packed = torch.stack([ids.int(), (top - log_normaliser).view(torch.int32)], dim=-1).cpu().numpy()
    return [
        TokenLogprobs(t, lp, alternatives.tobytes())
        for t, lp, alternatives in zip(token_ids, chosen[:, 0].tolist(), packed, strict=True)
    ]


def score_prompt(sequence: Sequence, first_row: int, rows: Tensor) -> None:
    """Score prompt tokens by logits [R, V] of the rows from `first_row` on: row i is of token i + 1."""
    num_top = sequence.sampling.prompt_logprobs
    assert num_top is not None
    scored = sequence.prompt_logprobs
    stop = min(first_row + rows.shape[0] + 1, sequence.num_prompt_tokens)
    for begin in range(first_row + 1, stop, PROMPT_LOGPROB_ROWS):
        scored += [None] * (begin - len(scored))  # the first token, and those that nobody asked for
        end = min(begin + PROMPT_LOGPROB_ROWS, stop)
        piece = rows[begin - 1 - first_row : end - 1 - first_row]
        scored += logprobs(piece, sequence.token_ids[begin:end], num_top)
    if sequence.num_prompt_tokens == 1 and not scored:
        scored.append(None)
