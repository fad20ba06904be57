"""Two ranks, each with its share of the weights and of the KV heads, give one rank's tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
from prerope.cache.kernels.build import library_path
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.errors import ConfigurationError
from prerope.server.models.model import Chunk, Model
from prerope.server.ranks.orders import follow, pack_step, unpack_step

from tests.engine.ranks.ranked import shared_engine
from tests.engine.tiny_models import assert_idle, generate, greedy, prompt_of, request, tiny, tiny_engine
from tests.tiers import every

ROOT = Path(__file__).parents[3]
SHARED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "cohere",
    "smollm3",
    "mixtral",
)
LENGTHS = (5, 33, 60, 100)


class Pair:
    """This process as rank 0, and another as rank 1, for one model after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        command = [sys.executable, "-m", "tests.engine.ranks.ranked"]
        self._other = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
        )

    def engine(self, family: str, config: dict[str, Any] | None = None, **engine: Any) -> Engine:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        library = library_path()
        kernels = None if library is None else str(library.parent)
        order = {
            "kernels": kernels,
            "folder": str(folder),
            "family": family,
            "config": config or {},
            "engine": engine,
        }
        assert self._other.stdin is not None
        print(json.dumps(order), file=self._other.stdin, flush=True)
        return shared_engine(order, 0)

    def said(self) -> str:
        """What came of rank 1."""
        assert self._other.stdout is not None
        return self._other.stdout.readline().strip()

    def close(self) -> None:
        self._other.kill()
        self._other.communicate()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()


@pytest.mark.parametrize("family", every(4, SHARED, quick=1))
def test_greedy_equals_one_rank(pair: Pair, family: str) -> None:
    """Whose prompts are read in one piece; the ranks' in chunks, beside decodes, then again (prefix hits)."""
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    alone = tiny_engine(Model(tiny(family)), max_batched_tokens=256, max_num_seqs=8)
    expected = generate(alone, prompts, greedy(8))
    shared = pair.engine(family, max_batched_tokens=37, max_num_seqs=8)
    assert shared.storage.keys[0].shape[2] * 2 == alone.storage.keys[0].shape[2]
    assert generate(shared, prompts, greedy(8)) == expected
    hits = shared.scheduler.cache.hit_tokens
    assert generate(shared, prompts, greedy(8)) == expected
    assert shared.scheduler.cache.hit_tokens > hits
    assert_idle(shared)
    shared.close()
    assert pair.said() == "done"


def test_methods_reach_the_other_ranks_as_they_were_asked_for() -> None:
    """Of one step, with any numbers of groups."""
    texts = ["auto", "dpe:groups=2-1-64", "dpe:window=9", "rerope:window=7:logn", "leaky:leak=2.5", "dpe:groups=8"]
    specs = [RopeSpec.parse(text) for text in texts]
    model = Model(tiny("llama"))
    chunks = [Chunk.of([n, n + 1], n, [n], resolve_model(spec, model.rotaries, 512), 1) for n, spec in enumerate(specs)]
    told = unpack_step(pack_step(chunks), lambda spec: resolve_model(spec, model.rotaries, 512))
    assert [chunk.positions.spec for chunk in told] == specs
    assert [chunk.positions.digest for chunk in told] == [chunk.positions.digest for chunk in chunks]
    assert [(list(chunk.token_ids), chunk.start) for chunk in told] == [([n, n + 1], n) for n in range(len(specs))]


def test_a_followers_memory_is_asked_for_ahead_of_its_blocks() -> None:
    """Rank 0 alone did so, and the others waited for the system at each page that they came to."""
    model = Model(tiny("llama"))
    positions = resolve_model(RopeSpec(method="rope"), model.rotaries, 512)
    tables = [[3, 1], [0], [40, 7], [90]]
    steps = [[Chunk.of([5], 17 * (len(table) - 1), table, positions, 1)] for table in tables]
    heard = iter(
        [*map(pack_step, steps), pack_step([one for step in steps for one in step]), np.empty(0, dtype=np.int64)]
    )
    engine = create_autospec(Engine, instance=True)
    engine.model, engine.storage = Mock(), Mock()
    engine.model.raw.ranks.hear = lambda: next(heard)
    engine.storage.expect.side_effect = lambda num_blocks: num_blocks + 20
    follow(engine)
    assert [call.args for call in engine.storage.expect.mock_calls] == [(4,), (41,), (91,)]
    assert engine.compute.call_count == 5


class Counted:
    """A process group whose collectives are counted."""

    def __init__(self, group: Any) -> None:
        self._group, self.calls = group, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._group, name)


def test_a_step_has_one_collective_a_sublayer(pair: Pair) -> None:
    """And one for the logits, whether it reads a chunk or decodes; the batch goes to the other rank in one message."""
    shared = pair.engine("llama", max_batched_tokens=32)
    counted = Counted(shared.ranks._device)
    shared.ranks._device = shared.ranks._host = counted
    shared.add(request("a", prompt_of(40), greedy(3)))
    while shared.has_work():
        shared.step()
    steps = 4  # two chunks, of which the second gives the first token, and two decodes
    layers = len(shared.model.layers)
    assert counted.calls == {"allreduce": 2 * layers * steps, "allgather": steps, "broadcast": steps}
    shared.close()
    assert pair.said() == "done"


def test_three_heads_over_two_ranks_are_one_and_two(pair: Pair) -> None:
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    config = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    expected = generate(tiny_engine(Model(tiny("llama", **config)), max_batched_tokens=37), prompts, greedy(8))
    shared = pair.engine("llama", config, max_batched_tokens=37)
    assert shared.storage.keys[0].shape[2] == 1
    assert generate(shared, prompts, greedy(8)) == expected
    shared.close()
    assert pair.said() == "done"


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("llama", {"num_key_value_heads": 1}, "its attention has 1 heads of keys and values"),
        ("phi3", {}, "'rowwise_split_input', which needs more than one collective"),
        ("glm", {}, "which needs more than one collective"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "has no plan to share"),
        ("olmo2", {}, "'colwise_gather_output', which needs more than one collective"),
        ("gpt_oss", {}, "has no plan to share"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(pair: Pair, family: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as refusal:
        pair.engine(family, config)
    assert repr(family) in str(refusal.value)
    assert pair.said().startswith("refused: ")


@pytest.mark.slow
def test_a_follower_ignores_signals_and_has_its_environment_before_it_imports_torch() -> None:
    code = "import sys, prerope.server.ranks.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
