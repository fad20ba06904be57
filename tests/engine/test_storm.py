"""120 requests at random, over a tiny cache: every one ends, nothing is left behind, and no output is disturbed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from prerope.rope.spec import RopeSpec
from prerope.server.engine.outputs import FinishReason, TokenOutput
from prerope.server.models.model import Model

from tests.engine.tiny_models import assert_idle, greedy, prompt_of, request, run, tiny_engine, tokens_of
from tests.tiers import every

NUM_REQUESTS = 120
METHODS = ("model", "rerope", "leaky_rerope", "dynamic_ntk", "dynamic_leaky", "dynamic_yarn")


class Storm:
    """120 requests with shared prefixes and methods of their own, added, aborted and preempted at random."""

    def __init__(self, model: Model, seed: int, **config: Any) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.engine = tiny_engine(
            model, max_model_len=160, num_blocks=44, block_size=4, max_num_seqs=12, max_batched_tokens=48, **config
        )
        self.requests = {str(i): self._request(str(i)) for i in range(NUM_REQUESTS)}
        self.outputs: dict[str, list[TokenOutput]] = {name: [] for name in self.requests}
        self.aborted: set[str] = set()

    def _request(self, name: str) -> Any:
        draw = self.random
        prefix = prompt_of(60, seed=draw.randrange(3))[: draw.choice([0, 8, 30, 60])]
        prompt = prefix + prompt_of(draw.randint(1, 40), seed=draw.randrange(6))
        spec = RopeSpec(method=draw.choice(METHODS))
        return request(
            name,
            prompt,
            greedy(draw.randint(1, 12)),
            self.engine.resolve_positions(spec),
            priority=draw.randint(-1, 1),
            cache_salt=draw.choice(["", "", "tenant"]),
        )

    def run(self) -> None:
        waiting = list(self.requests.values())
        while waiting or self.engine.has_work():
            for _ in range(self.random.randint(0, 4)):
                if waiting:
                    self.engine.add(waiting.pop())
            self._disturb()
            for name, output in self.engine.step():
                self.outputs[name].append(output)
            self.engine.check_integrity()

    def _disturb(self) -> None:
        scheduler = self.engine.scheduler
        if self.random.random() < 0.15 and scheduler.has_work():
            name = self.random.choice([one.request_id for one in scheduler.sequences])
            assert self.engine.abort(name) is not None
            self.aborted.add(name)
        if self.random.random() < 0.1 and scheduler.running:
            scheduler.preempt(self.random.choice(list(scheduler.running.values())))


@pytest.mark.parametrize("seed", every(2, [0, 1]))
def test_a_storm_leaves_nothing_and_disturbs_no_output(model: Model, seed: int) -> None:
    check_storm(Storm(model, seed))


def check_storm(storm: Storm) -> None:
    storm.run()
    assert_idle(storm.engine)
    stats = storm.engine.stats()
    assert stats.num_preemptions > 20
    assert stats.prefix_hit_tokens > 500
    survivors = [name for name in storm.requests if name not in storm.aborted]
    assert 20 < len(survivors) < NUM_REQUESTS
    solo = tiny_engine(storm.model, max_model_len=160, prefix_caching=False, max_batched_tokens=160)
    for name in survivors:
        outputs, one = storm.outputs[name], storm.requests[name]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert tokens_of(outputs) == tokens_of(run(solo, [one])[name]), name
