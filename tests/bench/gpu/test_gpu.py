"""bench.gpu: from end to end at toy size; what fails or hangs keeps nothing else from running; runs are compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prerope.cache.cuda.plan import SCRATCH_BYTES
from prerope.server.config import STEP_LIMITS
from prerope.server.engine.memory.sizing import CONTEXT_BYTES, MARGIN_BYTES, MARGIN_SHARE
from prerope.server.models.checkpoint import resolve_checkpoint

from bench import BenchError
from bench.gpu import __main__ as gpu
from bench.gpu import model, tiny
from bench.gpu.figures import compared, results
from bench.gpu.model import tokenizer
from bench.gpu.running import run, run_all
from bench.gpu.stages import FAILED, LIMITS, PARTS, Stage, stages
from bench.gpu.targets import PAGE, targets
from bench.gpu.targets import main as main_of_targets
from bench.shared.shapes import MODELS
from tests.test_imports import PATHS, imports

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]

NEEDED = re.search(r"`bench.gpu A B` needs (.*?), with what", (ROOT / "docs" / "gpu.md").read_text())


def brought(names: Sequence[str]) -> set[str]:
    """Distributions that these need, themselves included, and none that pydantic comes with."""
    found, left = set[str](), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found or name.startswith("pydantic"):
            continue
        try:
            wanted = [Requirement(one) for one in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        left += [canonicalize_name(one.name) for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture
def bare(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A Python, and an environment, that have what docs/gpu.md says that A and B need and nothing else."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in brought(needed()):
        for top in {file.parts[0] for file in metadata.files(name) or []} - {".."}:
            link, target = packages / top, Path(str(metadata.distribution(name).locate_file(top)))
            if not link.exists() and target.exists():
                link.symlink_to(target.resolve())
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare" / "bin" / "python", {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)}


def needed() -> list[str]:
    """Distributions that docs/gpu.md names for A and B."""
    assert NEEDED is not None
    names = NEEDED[1].lower().replace("torch with cuda", "torch").replace(" and ", ", ").split(", ")
    assert {"torch", "triton", "transformers"} < set(names)
    return names


def test_parts_import_no_other_packages() -> None:
    """What the processes of A and B import as they begin; the toy run, which is slow, has all that they meet."""
    own = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "bench").rglob("*.py")}
    paths = PATHS | {name.removesuffix(".__init__"): path for name, path in own.items()}
    asked = [one for part in "AB" for group in stages(part, toy=False, out=ROOT) for one in group if not one.modules]
    started = {one.command[one.command.index("-m") + 1] for one in asked} | {"bench.gpu"}
    left = [f"{name}.__main__" if f"{name}.__main__" in paths else name for name in started]
    left += ["bench.step.floor"]  # imported as it is asked for
    seen, foreign = set[str](), dict[str, str]()
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        for name, at_import in imports(paths[module]):
            ours = next((one for one in (name, name.rpartition(".")[0]) if one in paths), None)
            if ours is not None:
                left += [ours] * at_import
            elif at_import:
                foreign.setdefault(name.partition(".")[0], module)
    assert "server.engine.loading" in seen
    there, packages = brought(needed()), metadata.packages_distributions()
    missing = {
        name: importer
        for name, importer in foreign.items()
        if name not in sys.stdlib_module_names and name != "bench"
        and not {canonicalize_name(one) for one in packages.get(name, [])} & there
    }  # fmt: skip
    assert missing == {}


@pytest.mark.slow
def test_a_toy_run_leaves_tables_and_figures(tmp_path: Path, bare: tuple[Path, dict[str, str]]) -> None:
    python, environment = bare
    command = [str(python), "-m", "bench.gpu", "A", "B", "--toy", "--out", str(tmp_path)]
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(Path.home())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert subprocess.run([str(python), "-c", "import pydantic"], env=environment, check=False).returncode == 1
    text, found = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert text.startswith("## GPU: the CPU\n\n```sh\npython -m bench.gpu A B --toy\n```\n")
    measured = ("check-rows", "check-chunks", "tiny", "judged", "step", "sweep", "methods")
    assert [found["endings"][name] for name in measured] == ["done"] * len(measured)
    for line in (
        "| decode | toy | rerope | 2 | 96 |",
        "| decode 2 x 96 | rope |",
        "| two engines in turn | as alone |",
    ):
        assert line in text
    assert str(tmp_path) not in text
    for figure in ("judged: decode toy 2 x 96 rope, ms", "check-rows: toy rows rerope peaked, error",
                   "sweep: prefill toy 1 x 96 rope: sdpa_prefill, ms", "sweep: GEMV 64 x 512: gemv, ms",
                   "step: decode 2 x 96 rope, ms", "sweep: prefill toy 1 x 96 rope: shipped, ms"):  # fmt: skip
        assert found["figures"][figure] > 0, figure
    assert gpu.main(["A", "--toy", "--only", "about", "--out", str(tmp_path / "again"),
                     "--beside", str(tmp_path / "results.json")]) == 0  # fmt: skip
    assert "### Beside an earlier run" in (tmp_path / "again" / "results.md").read_text()


@pytest.mark.slow
def test_a_server_over_a_drawn_model(tmp_path: Path) -> None:
    """What is served is a folder like any other; one that is there is not written again."""
    command = ["B", "--toy", "--only", "model", "serving", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["endings"] == {"model": "done", "serving": "done"}
    assert set(found["figures"]) == {
        f"serving: {case} {time}, ms" for case in ("64 x 1", "64 x 4", "300 x 1") for time in ("ttft", "time_per_token")
    }
    made = (tmp_path / "toy-model" / "config.json").stat().st_mtime_ns
    assert gpu.main(["B", "--toy", "--only", "model", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "toy-model" / "config.json").stat().st_mtime_ns == made


def test_what_tiny_found_is_told_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_toy: bool, _say: object, found: dict[str, str], _wrong: list[str]) -> None:
        found["rope: graphs"] = "4"
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "judge", cut)
    assert tiny.main(["--toy", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "tiny.md").read_text()
    assert "| rope: graphs | 4 |" in text
    assert "the time was up" in text


def test_ids_of_a_drawn_model_all_have_text() -> None:
    made = tokenizer(MODELS["tiny"].vocabulary)
    text = "As every word, and ünïcode."
    assert made.decode(made(text).input_ids) == text
    assert len(made(" a").input_ids) == 1, "what fills a prompt up is one token"
    assert all(made.decode([number]) for number in range(MODELS["tiny"].vocabulary))


def stage(name: str, program: str, limit_s: float = 60.0, **options: Any) -> Stage:
    return Stage(name, [sys.executable, "-c", program], limit_s, {"ASKED": "for"}, **options)


def test_how_a_stage_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.json").write_text("of an earlier run")
    done = run(stage("done", "import os; print('asked', os.environ['ASKED']); print()"), tmp_path)
    assert (done.told, done.last, done.failed) == ("done", "asked for", False)
    assert (tmp_path / "done.log").read_text() == "asked for\n\n"
    wrong = run(stage("wrong", "print('before', flush=True); raise ValueError('kept')"), tmp_path)
    assert (wrong.told, wrong.last, wrong.failed) == ("failed, status 1", "ValueError: kept", True)
    assert "Traceback" in (tmp_path / "wrong.log").read_text()
    assert not (tmp_path / "wrong.json").exists()
    missing = run(stage("missing", "", tool="no-such-tool"), tmp_path)
    assert (missing.told, missing.failed) == ("left out: there is no no-such-tool", False)
    missing = run(stage("missing", "", modules=("json", "no_such_module")), tmp_path)
    assert (missing.told, missing.failed) == ("left out: there is no no_such_module", False)
    began = time.monotonic()
    # A child of the stage that keeps its output open is ended too; the one beside it goes on.
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    kind = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('told what it had')"
    group = [stage("cut", hangs, limit_s=1.0), stage("kind", kind, limit_s=5.0), stage("beside", "print('ran')")]
    cut, told, beside = run_all(group, tmp_path)
    assert (cut.told, told.told, beside.last) == ("ended at its limit", "ended at its limit", "ran")
    assert told.last == "told what it had"
    assert time.monotonic() - began < 30
    # So is one that reads and writes nothing of it, where the stage ends before it.
    left = "import subprocess as s, sys; child = [sys.executable, '-c', 'import time; time.sleep(60)']; "
    left += "print(s.Popen(child, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    child = int(run(stage("left", left), tmp_path).last)
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a child of the stage goes on")
    text = results([done, wrong, cut], "python -m bench.gpu A", tmp_path, None)
    assert "## GPU: not measured" in text
    assert "Its last line: `ValueError: kept`" in text
    assert "done: asked for" in capfd.readouterr().out


def test_a_failed_stage_fails_the_run_and_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        [stage("check-1", ""), *(stage(f"check-{number}", "import sys; sys.exit(1)") for number in (2, 3))],
        [Stage("sanitizer", [sys.executable, "-c", "import sys; print('looked at', *sys.argv[1:])", FAILED], 60,
               after="check-")],
        [stage("other", "print('looked')", after="tiny")],
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "stages", lambda *_, **__: groups)
    assert gpu.main(["A", "--toy", "--out", str(tmp_path)]) == 1
    endings = json.loads((tmp_path / "results.json").read_text())["endings"]
    checks = {"check-1": "done", "check-2": "failed, status 1", "check-3": "failed, status 1"}
    assert endings == {**checks, "sanitizer": "done"}
    assert (tmp_path / "sanitizer.log").read_text() == "looked at 2\n"
    groups[0] = [stage("check-1", "")]
    assert gpu.main(["A", "--toy", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())["endings"]) == ["check-1"]


@pytest.mark.parametrize("part", PARTS)
def test_parts_end_in_their_time(part: str, tmp_path: Path) -> None:
    """And lengths of rows are checked by processes of their own, all at once."""
    groups = stages(part, toy=False, out=tmp_path)
    assert sum(max((one.limit_s for one in group if one.after is None), default=0) for group in groups) <= LIMITS[part]
    names = [[one.name for one in group] for group in groups]
    if part == "A":
        assert names[1] == ["check-131k", "check-9k", "check-700", "check-chunks", "tiny"]
    if part == "B":
        assert [*names[0], *names[1], *names[3]] == ["step", "sweep", "serving"], "alone on the card"
        assert names[-1] == ["methods", "graphs", "engine", "server"]
    tested = [one for group in groups for one in group if "pytest" in one.command]
    told = {"graphs", "engine", "server"}
    every = told | {"cache", "rest-of-engine", "rest-of-server"}
    assert {one.name for one in tested} == {"A": set(), "B": told, "tests": every}[part]
    for one in tested:
        assert one.variables["DEVICE"] == "cuda"
        assert "--continue-on-collection-errors" in one.command, (
            "a file that wants what is not there costs itself alone"
        )
        assert all((ROOT / word).exists() for word in one.command if word.startswith("tests/"))
        # In the interpreter alone are those of graphs slow: two engines in a process are among them.
        *_, asked = (marks for word, marks in pairwise(one.command[3:]) if word == "-m")
        assert asked == ("" if one.name == "graphs" else "not slow")


def test_what_stages_serve_fits_a_card_of_139_gib() -> None:
    """Keys and values beside the weights and the largest step; what does not fit is left out by name, or not asked."""
    shape, half = MODELS["llama-3-8b"], torch.bfloat16
    rows = STEP_LIMITS["cuda"][1]
    weights = shape.read_bytes(half) + half.itemsize * shape.hidden * shape.vocabulary
    assert weights == 16_060_522_496
    between = 4 * shape.hidden + 2 * shape.attention.query_heads * shape.attention.head_dim + 3 * shape.intermediate
    step = rows * (4 * shape.vocabulary + half.itemsize * between) + SCRATCH_BYTES + 2**30  # tables, sampled rows
    card = 139 * 2**30
    room = int(0.9 * card) - CONTEXT_BYTES - MARGIN_BYTES - int(MARGIN_SHARE * card) - weights - step
    tokens = room // shape.token_bytes(half)
    assert 800_000 < tokens < 10**6, "a prompt of a million tokens is for a cache of half the bytes, or the layers"
    command = stage_of("serving").command
    served = [point.split("x") for point in command[command.index("--points") + 1].split(",")]
    assert max(int(count) * (int(prompt) + 64) for prompt, count in served) < tokens
    assert 131072 in [int(prompt) for prompt, _ in served]
    assert tokens > 8 * 32768
    assert tokens < 8 * 131072, "bench.step says that the cache does not hold them"


def stage_of(name: str) -> Stage:
    groups = stages("B", toy=False, out=Path("out"))
    return next(one for group in groups for one in group if one.name == name)


def test_the_page_of_targets_is_filled_from_what_runs_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    monkeypatch.setattr("bench.gpu.targets.PAGE", page)
    assert main_of_targets(["--docs"]) == 0
    assert page.read_text().count("not yet measured |") == len(targets())
    for folder, error, share in (("a", 1.5, 0.7), ("b", 1.25, 0.9)):
        (tmp_path / folder).mkdir()
        machine = {"device": "A card", "torch": "2", "date": "today"}
        rotated = {"name": "llama-3-8b: decode, share of copy bandwidth, rotated", "found": {"8 x 32,768 rope": share}}
        found = [{"name": targets()[0].name, "found": {f"{folder} rows": error}}, rotated]
        (tmp_path / folder / "judged.json").write_text(json.dumps({"machine": machine, "targets": found}))
        (tmp_path / folder / "results.json").write_text(json.dumps({"figures": {}}))
    assert main_of_targets([str(tmp_path / "a"), str(tmp_path / "b"), "--docs"]) == 0
    text = page.read_text()
    assert "| A card, torch 2, today | worst case |" in text
    assert "plain torch run's | ≤ 2.00 | 1.50, reached | a rows |" in text
    assert "rotated | ≥ 0.75 | 0.90, reached | 8 x 32,768 rope |" in text
    assert text.count("not yet measured |") == len(targets()) - 2
    assert text.partition("<!-- targets: end -->")[2] == PAGE.read_text().partition("<!-- targets: end -->")[2]


def test_a_model_like_another_has_its_tokenizer_and_drawn_weights(tmp_path: Path, tiny_checkpoint: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    assert model.main([str(tmp_path / "made"), "--like", str(other)]) == 0
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert resolve_checkpoint(str(tmp_path / "made"), None, print).name == "made"
    assert (tmp_path / "made" / "model.safetensors").stat().st_size > 10**6


def test_runs_are_laid_beside_one_another(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"card": "A card", "figures": {"a, ms": 2.0, "gone, ms": 1.0}}))
    text = compared({"a, ms": 1.0, "new, ms": 3.0}, before).markdown()
    assert "| a, ms | 2 | 1 | 0.500 |" in text
    assert "| new, ms | – | 3 | – |" in text
    assert "| gone, ms | 1 | – | – |" in text


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="--toy needs none"):
        gpu.main(["A"])
