"""The search keeps the best of each step, never chooses by a held-out document, and recommends only what wins there."""

from __future__ import annotations

from prerope.rope.spec import RopeSpec

from bench.quality.calibration import FAMILIES, calibrate, num_readings
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


def test_what_is_worse_on_held_out_documents_is_not_recommended() -> None:
    found = calibrate(Reader(held_out_penalty=3.0), [0, 1], [2, 3], LENGTH)
    assert min(found.trials, key=lambda trial: trial.mean).spec == RopeSpec(method="rerope", window=3072)
    assert found.gain < 0
    assert found.recommended == RopeSpec(method="auto")
    assert environment(found.recommended) == ["ROPE_METHOD=auto"]
    assert "not recommended" in found.table().notes[0]
