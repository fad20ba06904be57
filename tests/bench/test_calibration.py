"""The search keeps the best of each step, never chooses by a held-out document, and recommends only what wins there."""

from __future__ import annotations

from prerope.rope.spec import RopeSpec

from bench.quality.calibration import FAMILIES, calibrate, num_readings
from bench.shared.choice import best_groups, common_group, tried_groups, variants
from bench.shared.options import environment, label

LENGTH = 8192
WINDOW_COSTS = {1024: 0.3, None: 0.2, 3072: 0.1, 4096: 0.4}


class Reader:
    """Losses by a formula: rerope is best, best at a window of 3072; log-n adds what it is given."""

    def __init__(self, held_out_penalty: float = 0.0, logn: float = 0.05) -> None:
        self.read: list[tuple[str, int]] = []
        self.held_out_penalty, self.logn = held_out_penalty, logn

    def __call__(self, spec: RopeSpec, document: int) -> float:
        self.read.append((label(spec), document))
        own = 2.0 if spec.method == "rerope" else 2.5
        penalty = self.held_out_penalty if document >= 2 and spec.method == "rerope" else 0.0
        return own + WINDOW_COSTS[spec.window] + self.logn * spec.logn + penalty + document / 100


def test_the_best_method_then_its_best_window_then_log_n() -> None:
    reader = Reader(logn=-0.05)
    found = calibrate(reader, [0, 1], [2, 3], LENGTH)
    assert found.recommended == RopeSpec(method="rerope", window=3072, logn=True)
    assert environment(found.recommended) == ["ROPE_METHOD=rerope", "ROPE_WINDOW=3072", "ROPE_LOGN=true"]
    assert RopeSpec.parse(label(found.recommended)) == found.recommended
    assert len(reader.read) == len(set(reader.read)) <= num_readings(2, 2)
    assert {name for name, document in reader.read if document >= 2} == {"auto", "rerope:window=3072:logn"}
    assert {name for name, document in reader.read if document < 2} > set(FAMILIES)


def test_each_share_has_the_group_that_is_best_by_itself() -> None:
    """By a formula: a share loses by how far its group is from its own best; what makes no difference stays common."""
    best, common = (2, 64, 8, 1), common_group(131_072, 8192)
    assert (common, tried_groups(common)) == (32, [2, 8, 16, 32, 64, 128, 512])
    asked: list[RopeSpec] = []

    def score(spec: RopeSpec) -> float:
        asked.append(spec)
        assert spec.groups is not None
        return -float(sum(abs(group - own) for group, own in zip(spec.groups, best, strict=True)))

    found = best_groups(4, common, score)
    assert found.groups == (2, 64, 8, 2)
    assert set(asked) == set(variants(4, common))
    assert len(variants(4, common)) == 4 * 6 + 1
    assert environment(found) == ["ROPE_METHOD=dpe", "ROPE_GROUPS=2-64-8-2"]
    assert best_groups(4, common, lambda _: 1.0).groups == (common,) * 4
    assert [common_group(n, 8192) for n in (100, 4096, 4097, 8192, 12_000, 16_384)] == [1, 1, 2, 2, 4, 4]


def test_methods_that_are_tried_beside_the_search_may_win_it() -> None:
    found = calibrate(lambda spec, _: 1.0 if spec.method == "dpe" else 2.0, [0], [1], LENGTH, [RopeSpec(method="dpe")])
    assert found.recommended == RopeSpec(method="dpe")


def test_what_is_worse_on_held_out_documents_is_not_recommended() -> None:
    found = calibrate(Reader(held_out_penalty=3.0), [0, 1], [2, 3], LENGTH)
    assert found.tried[0][0] == RopeSpec(method="rerope", window=3072)
    assert found.gain < 0
    assert found.recommended == RopeSpec(method="auto")
    assert environment(found.recommended) == ["ROPE_METHOD=auto"]
    assert "not recommended" in found.table("loss").notes[0]
