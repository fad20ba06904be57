"""The extrapolation tables at toy size: what is trained, how it resumes, what is read, and that no row is missing."""

from __future__ import annotations

import collections
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from prerope.rope.methods import resolve
from prerope.rope.spec import RopeSpec
from torch import Tensor

import bench.extrapolation.__main__ as extrapolation
from bench import BenchError
from bench.extrapolation import training as extrapolation_training
from bench.extrapolation.__main__ import SIZES, Size, main
from bench.extrapolation.model import MethodAttention, Model, Shape, TrainedAttention
from bench.extrapolation.report import Extrapolated
from bench.extrapolation.rows import accuracies, distinct_rows, tables, trained_accuracy
from bench.extrapolation.text import Text, baselines, held_out_rows, library_documents, prepare, split
from bench.extrapolation.training import OtherTraining, Recipe, train
from bench.shared.text import TextTooShort


def shape_of(variant: str, **parameters: int) -> Shape:
    return Shape(variant, **({"vocabulary": 32, "layers": 3, "width": 32, "heads": 2, "train_length": 16} | parameters))


@pytest.fixture
def stream() -> Tensor:
    """A walk of mostly +1: half of it can be learned in a few steps."""
    generator = torch.Generator().manual_seed(5)
    strides = torch.where(torch.rand(4000, generator=generator) < 0.8, 1, 7)
    return strides.cumsum(0) % 32


# --- attention against the formula ------------------------------------------------------------------------------------


def turned(x: Tensor, angle: float, base: float) -> Tensor:
    """One head's vector [D], fp64, rotated by a position, pair (m, m + D/2) as a complex number."""
    half = len(x) // 2
    theta = torch.tensor([base ** (-2 * m / len(x)) for m in range(half)], dtype=torch.float64)
    by = torch.complex(torch.cos(angle * theta), torch.sin(angle * theta)) * torch.complex(x[:half], x[half:])
    return torch.cat([by.real, by.imag])


def naive(shape: Shape, layer: int, query: Tensor, key: Tensor, value: Tensor, *, floor: float | None = None) -> Tensor:
    """[T, H, D] fp64, a score at a time; `floor` is the smallest log-n factor, where there is one."""
    out = torch.zeros_like(value)
    full = shape.variant == "hfwa" and layer == shape.layers - 1
    logn = full or shape.variant == "logn" or floor is not None
    for i, h in itertools.product(range(len(query)), range(shape.heads)):
        c = (
            max(floor if floor is not None else -math.inf, math.log(i + 1) / math.log(shape.train_length))
            if logn
            else 1
        )
        scores, seen = [], []
        for j in range(i + 1):
            if shape.variant == "hfwa" and not full and i - j >= shape.hfwa_window:
                continue
            q = query[i, h] if full else turned(query[i, h], i - j, shape.base)
            scores.append(c * q @ key[j, h] / math.sqrt(shape.head_dim))
            seen.append(value[j, h])
        out[i, h] = torch.stack(scores).softmax(0) @ torch.stack(seen)
    return out


def raw(shape: Shape, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(length, shape.heads, shape.head_dim, dtype=torch.float64, generator=generator) for _ in range(3)
    ]


@pytest.mark.parametrize("variant", ["plain", "logn", "hfwa"])
@pytest.mark.parametrize("layer", [0, 2])
def test_trained_attention_is_the_formula_beyond_the_trained_length_too(variant: str, layer: int) -> None:
    shape = shape_of(variant)
    vectors = raw(shape, 24)
    found = TrainedAttention(shape, 24)(layer, *(part.float()[None] for part in vectors))[0]
    torch.testing.assert_close(found.double(), naive(shape, layer, *vectors), atol=1e-5, rtol=1e-5)


def test_trained_log_n_differs_inside_the_trained_length_where_the_clamped_factor_is_1() -> None:
    vectors = [part.float()[None] for part in raw(shape_of("plain"), 16)]
    without, trained = (TrainedAttention(shape_of(variant), 16)(0, *vectors) for variant in ("plain", "logn"))
    method = resolve(RopeSpec(method="rope", logn=True), shape_of("plain").rotary)
    torch.testing.assert_close(MethodAttention(method, 16)(0, *vectors), without)
    assert (trained - without).abs().max() > 0.01


def test_a_method_reads_what_was_trained() -> None:
    """Two rows at once, past the trained length; log-n trained, at test time, and not at all."""
    vectors = [torch.stack([part, part.flip(0)]).float() for part in raw(shape_of("plain"), 40)]
    for variant in ("plain", "logn"):
        shape = shape_of(variant)
        method = resolve(RopeSpec(method="rope"), shape.rotary)
        read = MethodAttention(method, 16, logn_trained=variant == "logn", chunk=12)(1, *vectors)
        torch.testing.assert_close(read, TrainedAttention(shape, 40)(1, *vectors), atol=1e-5, rtol=1e-5)
    tested = resolve(RopeSpec(method="rope", logn=True), shape_of("plain").rotary)
    read = MethodAttention(tested, 16)(1, *vectors)[0].double()
    formula = naive(shape_of("plain"), 1, *raw(shape_of("plain"), 40), floor=1.0)
    torch.testing.assert_close(read, formula, atol=1e-5, rtol=1e-5)


def test_a_key_is_mixed_with_the_one_before_it_and_with_none_after() -> None:
    shape, seen = shape_of("plain", layers=1), {}
    model = Model(shape, 0)
    block = model.get_submodule("blocks.0")
    block.load_state_dict(block.state_dict() | {"smear": torch.tensor([0.0, 2.0])})

    def attention(_layer: int, _query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen["key"] = key[0]
        return value

    token_ids = torch.arange(6)
    model(token_ids[None], attention)
    rows = torch.nn.functional.normalize(model.embedding.weight[token_ids].double(), dim=-1)
    keys = (rows * shape.width**0.5 @ block.key.weight.T.double()).view(6, 2, 16)
    for head, own in ((0, 0.5), (1, 1 / (1 + math.exp(-2.0)))):
        expected = own * keys[:, head] + (1 - own) * torch.cat([torch.zeros(1, 16), keys[:-1, head]])
        torch.testing.assert_close(seen["key"][:, head].double(), expected, atol=1e-5, rtol=1e-4)


def test_hfwa_windows_see_at_most_three_quarters_of_the_trained_length() -> None:
    for layers, length in itertools.product((2, 3, 4, 6), (16, 128, 512)):
        window = shape_of("hfwa", layers=layers, train_length=length).hfwa_window
        assert (window - 1) * (layers - 1) + 1 <= 0.75 * length < window * (layers - 1) + 1


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "logn", "hfwa"])
def test_training_learns(variant: str, stream: Tensor, tmp_path: Path) -> None:
    shape, recipe = shape_of(variant), Recipe(steps=60, batch=8, seed=0, warmup=5, vector_rate=0.03)
    model = train(shape, recipe, stream, tmp_path, "cpu")
    losses = list(json.loads((tmp_path / "model.json").read_text())["losses"].values())
    assert losses[0] < math.log(32)
    assert losses[-1] < 1.0  # nats; the walk's own entropy is 0.5, a uniform guess 3.5
    assert trained_accuracy(model, stream[: 4 * 128 + 4].unfold(0, 129, 128), 4) > 0.6


def test_an_interrupted_training_ends_with_the_same_weights(
    stream: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extrapolation_training, "SAVE_EVERY", 5)
    shape, recipe = shape_of("logn"), Recipe(steps=14, batch=4, seed=1, warmup=3)
    whole = train(shape, recipe, stream, tmp_path / "whole", "cpu").state_dict()
    train(shape, recipe, stream, tmp_path / "cut", "cpu", stop_after=7)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["model.json", "training.pt"]
    resumed = train(shape, recipe, stream, tmp_path / "cut", "cpu").state_dict()
    loaded = train(shape, recipe, stream, tmp_path / "cut", "cpu").state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
        assert torch.equal(tensor, loaded[name]), name
    logs = [json.loads((tmp_path / folder / "model.json").read_text()) for folder in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["model.json", "weights.safetensors"]


def test_another_recipe_does_not_continue_a_training(stream: Tensor, tmp_path: Path) -> None:
    train(shape_of("plain"), Recipe(steps=3, batch=2, seed=0), stream, tmp_path, "cpu")
    with pytest.raises(OtherTraining, match="delete the folder"):
        train(shape_of("plain"), Recipe(steps=3, batch=2, seed=1), stream, tmp_path, "cpu")


# --- text -------------------------------------------------------------------------------------------------------------


def prose(seed: int, num_words: int) -> str:
    chosen = random.Random(seed)
    words = ["".join(chosen.choices("abcdefghij", k=chosen.randint(2, 6))) for _ in range(40)]
    return " ".join(chosen.choices(words, k=num_words))


DOCUMENTS = [(f"document {i}", prose(i, 900)) for i in range(20)]


def test_the_text_is_kept_and_whole_documents_are_held_out(tmp_path: Path) -> None:
    text = prepare(tmp_path, 300, DOCUMENTS)
    again = prepare(tmp_path, 300, [("nothing", "")])
    assert torch.equal(text.train, again.train)
    assert list(text.held_out) == ["document 5", "document 15"]
    assert all(torch.equal(text.held_out[name], again.held_out[name]) for name in text.held_out)
    assert int((text.train == 0).sum()) == 18  # ends of documents
    with pytest.raises(BenchError, match="choose another --out"):
        prepare(tmp_path, 301)


def test_nothing_of_the_library_is_in_both_parts(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name in ("a.py", "b.py", "test/c.py"):
        (tmp_path / name).write_text(f"# {name}")
    documents = library_documents(tmp_path)
    assert [name for name, _ in documents][:2] == ["a.py", "b.py"]
    assert not any("c.py" in name for name, _ in documents)
    training, held_out = split(documents)
    assert sorted(training + held_out) == sorted(documents)
    paragraphs = [{p for _, text in part for p in text.split("\n\n")} for part in (training, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    assert min(map(len, paragraphs)) > 50


def counting_text() -> Text:
    held_out = {"one": torch.arange(100), "short": torch.arange(5), "two": torch.arange(200, 270)}
    return Text(torch.arange(300), held_out, 300)


def test_rows_are_pieces_of_held_out_documents_and_their_repeated_beginnings() -> None:
    rows = held_out_rows(counting_text(), 3, 32, 4)
    assert rows["plain"].shape == rows["repeated"].shape == (3, 33)
    assert sorted(rows["plain"][:, 0].tolist()) == [0, 32, 200]
    assert (rows["plain"].diff() == 1).all()
    assert torch.equal(rows["repeated"], rows["plain"][:, :1] + torch.arange(33) % 4)
    with pytest.raises(TextTooShort, match="have 5"):
        held_out_rows(counting_text(), 6, 32, 4)


def test_counting_baselines(stream: Tensor) -> None:
    rows = stream[:100].view(4, 25)
    found = baselines(Text(stream, {}, 32), rows)
    pairs = collections.Counter(itertools.pairwise(stream.tolist()))
    right = [
        target == max(range(32), key=lambda after: (pairs[before, after], -after))
        for row in rows.tolist()
        for before, target in itertools.pairwise(row)
    ]
    assert found["bigram"] == pytest.approx(sum(right) / len(right))
    token = collections.Counter(stream.tolist()).most_common(1)[0][1]
    assert int(stream.bincount().max()) == token
    assert found["unigram"] < found["bigram"]


# --- rows and report --------------------------------------------------------------------------------------------------

SU_ROWS = """
Baseline 24.17 23.16 | Baseline-log n 24.60 24.02 | PI-RoPE 15.04 13.54 | PI-RoPE-log n 14.99 16.51
NTK-RoPE-old 51.28 39.27 | NTK-RoPE-old-log n 61.71 43.75 | NTK-RoPE-fixed 51.86 39.61
NTK-RoPE-fixed-log n† 55.94 41.11 | NTK-RoPE-fixed-log n 62.85 44.14 | NTK-RoPE-mixed 53.09 40.12
NTK-RoPE-mixed-log n† 59.11 42.38 | NTK-RoPE-mixed-log n 68.91 45.41 | HFWA 80.84 48.15
ReRoPE-w64 69.39 45.19 | ReRoPE-w64-log n† 78.58 47.42 | ReRoPE-w64-log n 84.38 48.14
ReRoPE-w128 76.11 47.82 | ReRoPE-w128-log n† 82.28 48.78 | ReRoPE-w128-log n 85.47 48.87
ReRoPE-w256 77.90 48.48 | ReRoPE-w256-log n† 82.40 48.85 | ReRoPE-w256-log n 85.12 49.07
ReRoPE-w384 70.72 48.15 | ReRoPE-w384-log n† 76.42 48.31 | ReRoPE-w384-log n 83.24 48.62
ReRoPE-w512 7.09 8.25 | ReRoPE-w512-log n† 7.08 8.25 | ReRoPE-w512-log n 15.84 10.83
Leaky ReRoPE-w128-k64-log n 85.29 48.96 | Leaky ReRoPE-w128-k32-log n 85.31 49.03
Leaky ReRoPE-w128-k16-log n 85.15 49.10 | Leaky ReRoPE-w128-k8-log n 80.00 48.11
Leaky ReRoPE-w256-k64-log n 84.60 49.03 | Leaky ReRoPE-w256-k32-log n 84.30 48.97
Leaky ReRoPE-w256-k16-log n 83.59 48.87 | Leaky ReRoPE-w256-k8-log n 69.80 45.72
"""


def test_every_row_of_su_s_tables_is_there_with_his_figures() -> None:
    expected = {}
    for entry in SU_ROWS.strip().replace("\n", " | ").split(" | "):
        label, repeated, plain = entry.rsplit(" ", 2)
        expected[label] = (float(repeated), float(plain))
    rows = {row.label: row for row in distinct_rows(512)}
    assert {label: row.su for label, row in rows.items() if row.su is not None} == expected
    own = {row.label.split("-")[0] for row in tables(512)["Methods that Su did not have"]}
    assert own == {"YaRN", "Self", "dynamic_leaky"}


def test_a_label_means_one_thing_and_every_row_resolves() -> None:
    for length in (32, 128, 512):
        shape = shape_of("plain", train_length=length)
        for title, rows in tables(length).items():
            for row in rows:
                assert row in distinct_rows(length), title
                assert ("†" in row.label) == (row.spec is not None and row.spec.logn)
                assert row.label.endswith("-log n") == (row.variant == "logn")
                if row.spec is not None:
                    assert resolve(row.spec, shape.rotary).parameters.get("factor", 8) == 8


def test_accuracy_is_counted_by_stretches_of_the_trained_length() -> None:
    shape = shape_of("plain", vocabulary=8, width=8, heads=1, train_length=4)
    model = Model(shape, 0)  # what writes to the residual stream is zero: the model is embedding and head
    model.load_state_dict(
        model.state_dict() | {"embedding.weight": torch.eye(8), "head.weight": torch.eye(8).roll(1, dims=0)}
    )
    counting, constant = torch.arange(9) % 8, torch.zeros(9, dtype=torch.long)
    rows = torch.stack([counting, torch.cat([counting[:5], constant[:4]])])
    attention = TrainedAttention(shape, 8)
    assert accuracies(model, attention, rows, 1) == accuracies(model, attention, rows, 2) == [1.0, 0.5]


TINY = Size(300, 2, 16, 2, 16, steps=4, batch=2, rows=3, at_once=2)


def test_a_whole_run_fills_every_row_and_a_second_one_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SIZES, "tiny", TINY)
    prepare(tmp_path / "tiny" / "text", 300, DOCUMENTS)
    arguments = ["--size", "tiny", "--seeds", "0,1", "--out", str(tmp_path)]
    assert main([*arguments, "--report-only"]) == 0
    assert "Baseline-log n†" in capsys.readouterr().out
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "tiny" / "extrapolation.json").read_text())
    assert [entry["row"] for entry in kept["results"]] == [row.label for rows in tables(16).values() for row in rows]
    assert all(len(entry["plain %"]) == 2 and len(entry["repeated % by position"]) == 8 for entry in kept["results"])
    assert (tmp_path / "tiny" / "extrapolation.md").read_text().count("±") > 3 * 50
    monkeypatch.setattr(extrapolation, "measure", lambda *_: pytest.fail("measured again"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed


def test_a_report_shows_means_spreads_and_what_is_missing() -> None:
    seeds = [
        {"trained": {"plain": 0.5}, "rows": {"Baseline": {"repeated": [0.5, 0.1], "plain": [0.4, 0.2]}}},
        {"trained": {"plain": 0.52}, "rows": {"Baseline": {"repeated": [0.5, 0.3], "plain": [0.4, 0.2]}}},
    ]
    found = Extrapolated(128, seeds, {})
    table = found.table("Methods", tables(128)["Methods"])
    assert table.rows[0] == ["Baseline", "51.00 ± 1.41", "35.00 ± 7.07", "30.00 ± 0.00", "49.41", "24.17", "23.16"]
    assert table.rows[3][:4] == ["PI-RoPE", "51.00 ± 1.41", "–", "–"]
    assert found.by_position("Baseline", "repeated") == pytest.approx([50, 20])
    more = {"rows": {"YaRN": {"repeated": [0.5], "plain": [0.4]}}}
    assert Extrapolated(128, [*seeds, more], {}).of_fewer_seeds() == ["Baseline", "YaRN"]
    assert Extrapolated(128, [], {}).of_fewer_seeds() == []
