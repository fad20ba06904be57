"""Tasks: what is asked can be answered from the text, by programs that know the text alone; scores; resuming."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prerope.rope.spec import RopeSpec
from rich.progress import Progress

from bench import BenchError
from bench.shared.kept import Kept
from bench.shared.options import method_list
from bench.shared.servers import Server
from bench.tasks.__main__ import Asker, found_groups, measure, parse_arguments, scored
from bench.tasks.families import FAMILIES, Prompt, prompts
from bench.tasks.scores import Mean, Scored, Scores, choose, mean, report
from bench.tasks.sheets import NoRoom, Question, planted

DEPTHS = (0.1, 0.5, 0.9)


def count(text: str) -> int:
    """About as many as a tokenizer finds; every character counts, so that no change of the text goes unseen."""
    return -(-len(text) // 4)


# --- a program for each family, which sees the prompt alone ---


def find_passkey(text: str) -> list[str]:
    return re.findall(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", text)


def find_secret(text: str) -> list[str]:
    assert text.endswith("Answer: The secret number of the vault is")
    return re.findall(r"The secret number of the vault is (\d+)\.", text)


def find_needles(text: str) -> list[str]:
    asked = text.rsplit("Question:", 1)[1].split("?")[0]
    facts = re.findall(r"The special magic number for ([a-z ]+) is (\d+)\.", text.rsplit("Question:", 1)[0])
    return [number for name, number in sorted(facts, key=lambda fact: asked.find(fact[0])) if name in asked]


def find_pair(text: str) -> list[str]:
    (asked,) = re.findall(r"beside ([a-z ]+)\?\nAnswer: \1:$", text)
    return re.findall(rf"^{asked}: (\d+)$", text, re.MULTILINE)


def follow_variables(text: str) -> list[str]:
    (value,) = re.findall(r"assigned the value (\d+)\.\nAnswer", text)
    held: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = ((?:VAR )?\w+)\.", text):
        held[name] = held[source[4:]] if source.startswith("VAR ") else source
    return [name for name, holds in held.items() if holds == value]


def count_listed(text: str) -> list[str]:
    listed = Counter(re.findall(r"\d+\. (\w+)", text.split("Question:")[0])).most_common()
    assert listed[4][1] >= 2 * listed[5][1], "the fifth is well ahead of the sixth"
    return [word for word, _ in listed[:5]]


def count_coded(text: str) -> list[str]:
    listed = Counter(re.findall(r"\b[a-z]{4}\b", text.split("\n\nQuestion:")[0])).most_common()
    assert listed[2][1] > listed[3][1]
    return [word for word, _ in listed[:3]]


def locate(text: str) -> list[str]:
    story, question = text.rsplit("Question:", 1)
    (asked,) = re.findall(r"Where is (?:the )?(\w+) now", question)
    places: dict[str, str] = {}
    holders: dict[str, str] = {}
    for person, _, place, thing in re.findall(
        r"\b([A-Z][a-z]+) (?:(moved|went|travelled|journeyed) to the (\w+)|took the (\w+))\.", story
    ):
        if thing:
            holders[thing] = person
        else:
            places[person] = place
    return [places[holders.get(asked, asked)]]


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    "passkey": find_passkey,
    "secret_number": find_secret,
    **dict.fromkeys(("single", "multikey", "multivalue", "multiquery"), find_needles),
    "key_value": find_pair,
    "variable_tracking": follow_variables,
    "common_words": count_listed,
    "frequent_words": count_coded,
    "where_is": locate,
    "where_is_thing": locate,
}


@pytest.mark.parametrize("length", [600, 4000])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_that_sees_the_prompt_alone_scores_full_marks(family: str, length: int) -> None:
    for seed in range(3):
        made = prompts(family, count, length, DEPTHS, seed, shots=0)
        assert made
        for prompt in made:
            solved = SOLVERS[family](prompt.text)
            assert sorted(solved) == sorted(prompt.question.answers)
            assert prompt.question.score(f" {' and '.join(solved)}.\n\nQuestion: what?") == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_fill_the_length_and_begin_with_the_same_examples(family: str) -> None:
    first, again = (prompts(family, count, 3000, DEPTHS, 7, shots=2) for _ in range(2))
    assert first == again
    assert first != prompts(family, count, 3000, DEPTHS, 8, shots=2)
    other = prompts(family, count, 2000, DEPTHS, 8, shots=2)[0].text
    shared = next(i for i, (a, b) in enumerate(zip(first[0].text, other, strict=False)) if a != b)
    assert count(first[0].text[:shared]) > 200, "the examples are the same before every prompt"
    for prompt in first:
        assert 2800 < count(prompt.text) < 3000
    with pytest.raises(NoRoom, match=f"{family} at 200 tokens with 2 examples"):
        prompts(family, count, 200, DEPTHS, 7, shots=2)


@pytest.mark.parametrize(
    "family", ["passkey", "secret_number", "single", "multikey", "key_value", "where_is", "where_is_thing"]
)
def test_facts_lie_at_their_depths(family: str) -> None:
    made = prompts(family, count, 8000, DEPTHS, 0, shots=0)
    assert sorted(prompt.question.depth or 0 for prompt in made) == list(DEPTHS)
    for prompt in made:
        (answer,), depth = prompt.question.answers, prompt.question.depth
        if family.startswith("where"):
            pattern = rf"(moved|went|travelled|journeyed) to the {answer}\."
        else:
            pattern = rf"\b{answer}\b"
        places = [match.start() / len(prompt.beginning) for match in re.finditer(pattern, prompt.beginning)]
        assert min(abs(place - (depth or 0)) for place in places) < 0.03


def test_a_sheet_is_the_same_before_all_of_its_questions() -> None:
    for family in ("multikey", "key_value", "where_is"):
        assert len({prompt.beginning for prompt in prompts(family, count, 3000, DEPTHS, 0, shots=1)}) == 1


def test_planted_facts_keep_their_order() -> None:
    assert planted(["a", "b", "c", "d"], [(1.0, "Z"), (0.5, "Y"), (0.0, "X")]) == "X a b Y c d Z"


@pytest.mark.parametrize(
    ("answers", "reply", "score"),
    [
        (("12345",), " 12345.", 1.0),
        (("12345",), "\n 12345", 1.0),
        (("12345",), " the 12345", 1.0),
        (("12345",), " x12345", 0.0),
        (("12345",), " 123456", 0.0),
        (("12345",), " 99999 or 12345", 0.0),
        (("12345",), "", 0.0),
        (("12345",), " 1234", 0.0),
        (("garden",), " garden now", 1.0),
        (("garden",), " gardens", 0.0),
        (("garden",), " park or garden", 0.0),
        (("1", "2"), " 2 and 1", 1.0),
        (("1", "2"), " 12, 21, 1", 0.5),
        (("1", "2"), " 1\n\nQuestion: 2", 0.5),
    ],
)
def test_scores_are_exact(answers: tuple[str, ...], reply: str, score: float) -> None:
    assert Question("?", answers).score(reply) == score


def reply(
    score: float, sheet: str = "a", family: str = "f", length: int = 10, method: str = "m", seed: int = 0
) -> Scored:
    return Scored(method, family, length, seed, 0.5, sheet, score)


def test_means_count_each_family_once_and_questions_of_a_sheet_together() -> None:
    found = mean([reply(1.0, "a"), reply(0.0, "a"), reply(1.0, "b"), reply(1.0, "b")])
    assert found is not None
    assert (found.value, found.error) == (0.75, pytest.approx(0.25))  # sheets at 0.5 and 1.0
    both = mean([reply(1.0, "a"), reply(1.0, "b"), *(reply(0.0, f"{i}", "g") for i in range(9))])
    assert both is not None
    assert both.value == 0.5
    assert mean([]) is None
    assert mean([reply(1.0)]) == Mean(1.0, None)


def test_the_effective_length_ends_at_the_first_length_that_falls_short() -> None:
    values = {4: 0.8, 8: 0.7, 16: 0.67, 32: 0.9}  # 85 % of 0.8 is 0.68
    replies = [reply(value, sheet, length=n) for n, value in values.items() for sheet in ("a", "b")]
    scores = Scores(["m"], ["f"], sorted(values), 16, replies)
    assert scores.effective_length("m") == 8
    assert Scores(["m"], ["f"], sorted(values), 64, replies).effective_length("m") == 32
    assert Scores(["m"], ["f"], [8], 16, replies[2:4]).effective_length("m") is None


@pytest.mark.parametrize(
    ("found", "recommended"),
    [((0.9, 0.5), "rerope"), ((0.9, 0.1), "auto"), ((0.1, 0.9), "auto"), ((0.4, 0.9), "auto")],
    ids=["ahead on both", "by chance", "behind where it is chosen", "a tie goes to auto"],
)
def test_a_method_is_chosen_on_some_seeds_and_recommended_by_others(
    found: tuple[float, float], recommended: str
) -> None:
    """found: of rerope on searched and held-out seeds; auto has 0.4 on all."""
    methods = method_list("auto,rerope")
    replies = [
        reply(score, f"{seed}", method=method, seed=seed)
        for method, scores in (("auto", (0.4, 0.4)), ("rerope", found))
        for seed, score in zip((0, 1, 2, 3), (scores[0], scores[0], scores[1], scores[1]), strict=True)
    ]
    choice = choose(Scores(["auto", "rerope"], ["f"], [10], 40, replies), methods, 4)
    assert choice.recommended.method == recommended
    assert len(choice.table("score").rows) == 3
    assert parse_arguments(["--calibrate", "--methods", "rerope"]).methods == methods


def test_the_report_has_every_cell_and_a_map(tmp_path: Path) -> None:
    replies = [reply(float(n == 10), sheet, length=n) for n in (10, 20) for sheet in ("a", "b")]
    about = {"model": "tiny", "seeds": 2, "depths": "0.5", "shots": 1, "date": "today", "cpu": "one"}
    files = report(Scores(["m"], ["f"], [10, 20], 40, replies), about).save(tmp_path)
    text = files[1].read_text()
    assert "| m | 100 ± 0 | 0 ± 0 | 10 |" in text
    assert "| m | 0.50 | 100 ± 0 | 0 ± 0 |" in text
    assert files[2].stat().st_size > 10_000


# --- through a server that knows the answers ---


def served(know: Callable[[str], list[str]], seen: list[dict[str, object]]) -> Server:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "tiny", "train_length": 4000}]})
        body = json.loads(request.content)
        if request.url.path.endswith("/tokenize"):
            return httpx.Response(200, json={"tokens": [0] * count(body["prompt"])})
        seen.append(body)
        text = " " + ", ".join(know(body["prompt"]))
        return httpx.Response(200, json={"choices": [{"text": text}], "usage": {"prompt_tokens": 7}})

    client = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    return Server("mock", "http://mock/v1", client, "tiny")


def asked(tmp_path: Path, *more: str) -> argparse.Namespace:
    few = ("--tasks", "passkey,multikey", "--lengths", "600,1000", "--depths", "0.2,0.8", "--seeds", "2")
    return parse_arguments([*few, "--out", str(tmp_path), *more])


def test_a_run_asks_each_question_once_by_each_method_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.tasks.__main__.server_counter", lambda _server: count)
    seen: list[dict[str, object]] = []
    arguments = asked(tmp_path, "--methods", "rope,rerope:window=100")

    def know(text: str) -> list[str]:
        return find_passkey(text) if "pass key" in text else find_needles(text)

    with Progress(disable=True) as progress:
        scores, model = asyncio.run(measure(arguments, served(know, seen), progress))
        assert model == "tiny"
        assert [str(scores.at(method, 1000)) for method in scores.methods] == ["100 ± 0"] * 2
        assert len(seen) == 2 * 2 * 2 * (2 + 2)  # lengths, methods, seeds, questions of each family
        assert [body.get("rope") for body in seen[:8:4]] == [
            {"method": "rope"},
            {"method": "rerope", "window": 100},
        ]
        again, _ = asyncio.run(measure(arguments, served(lambda _: pytest.fail("asked again"), []), progress))
        assert again.replies == scores.replies
        wrong, _ = asyncio.run(measure(asked(tmp_path), served(lambda _: ["none"], seen), progress))
        assert str(wrong.at("as served", 600)) == "0 ± 0"
        assert "rope" not in seen[-1]


def test_groups_are_found_by_what_each_share_does_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of the pairs is read best by groups of 4, the second by 16; a server that says so."""
    monkeypatch.setattr("bench.tasks.__main__.server_counter", lambda _server: count)
    asked_for: list[list[int]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked_for.append(body["rope"]["groups"])
        right = body["rope"]["groups"] in ([4, 1], [1, 16])
        text = " ".join(find_passkey(body["prompt"])) if right else "none"
        return httpx.Response(200, json={"choices": [{"text": text}]})

    server = Server("mock", "http://mock/v1", httpx.AsyncClient(transport=httpx.MockTransport(handle)), "tiny")
    few = ("--tasks", "passkey", "--train-length", "2000", "--calibrate", "--groups", "2")
    arguments = asked(tmp_path, *few)
    with Progress(disable=True) as progress:
        found = asyncio.run(found_groups(arguments, server, progress))
    assert found.spec == RopeSpec(method="dpe", groups=(4, 16))
    assert RopeSpec.parse(found.label) == found.spec
    assert {tuple(groups) for groups in asked_for} == {(1, 1), (2, 1), (4, 1), (16, 1), (1, 2), (1, 4), (1, 16)}
    assert len(asked_for) == 7 * 2, "of two seeds the first, at two depths, at the longest length alone"
    with pytest.raises(SystemExit):
        parse_arguments(["--groups", "8"])


def test_a_refusal_is_told_with_what_the_server_said(tmp_path: Path) -> None:
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(400, text="too long")))
    asker = Asker(Server("mock", "http://mock/v1", client), Kept(tmp_path / "kept"))
    prompt = Prompt("passkey", 10, 0, "text", Question("?", ("1",)))
    with pytest.raises(BenchError, match="mock: HTTP 400: too long"):
        asyncio.run(asker.ask(prompt, "rope", RopeSpec(method="rope")))
    assert scored("rope", prompt, " 1").score == 1.0


def test_depths_are_a_number_or_a_list(tmp_path: Path) -> None:
    assert asked(tmp_path).depths == [0.2, 0.8]
    assert parse_arguments(["--depths", "4"]).depths == [0.125, 0.375, 0.625, 0.875]
    for wrong in ("0", "1.5", "a"):
        with pytest.raises(SystemExit):
            parse_arguments(["--depths", wrong])
