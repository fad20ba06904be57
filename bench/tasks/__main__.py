"""Tasks over long prompts, against prompt length and depth, through a server's own API.

    python -m bench.tasks --url http://127.0.0.1:8000/v1 --methods auto,rerope,yarn --lengths 2048,8192,16384

Needles (one; among others; with several values; several at once), the passkey, key-value retrieval, variable tracking,
common and frequent words, and facts in filler: generated from a seed for any length and tokenizer, scored exactly. With
--methods each request chooses its position method, as this project's server lets it; without, any OpenAI-compatible
URL is asked as it is served. `--launch COMMAND` starts the server from here.

Prompts are of at most the asked number of tokens, the reply included. All but passkey and secret_number have few-shot
examples before them, which a small model needs. Several questions are asked over one text: a server with a prefix cache
reads it once. Every reply is kept in the output folder, so an interrupted run resumes, and a longer one adds to it;
a server that reads otherwise than before wants a folder or a --name of its own.

    python -m bench.tasks --calibrate --methods rerope,self_extend,dual_chunk --lengths 16384 --seeds 4

says which method does most, as `bench.quality --calibrate` says which has the lowest loss. With `--groups 8` it finds
DPE's groups for eighths of the pairs first, and asks that method, too.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from prerope.rope.spec import RopeSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import BenchError
from bench.shared import options
from bench.shared.choice import AUTO, best_groups, calibration_options, check_calibration, common_group, variants
from bench.shared.kept import Kept, key_of
from bench.shared.machine import describe_machine
from bench.shared.options import Method, method_list
from bench.shared.servers import READY_TIMEOUT_S, Counter, Server, http_client, launched, local_counter, server_counter
from bench.tasks.families import ENDS_WITHOUT_EXAMPLE, FAMILIES, Prompt, prompts
from bench.tasks.scores import Scored, Scores, choose, report
from bench.tasks.sheets import REPLY_ENDS, NoRoom

AS_SERVED = "as served"
FILE = "tasks-replies.jsonl"
REPLY_TOKENS, MOST_REPLY_TOKENS = 12, 60  # of one answer; of several


def all_prompts(asked: argparse.Namespace, count: Counter) -> Iterator[list[Prompt]]:
    """Short lengths first, so that an early stop leaves whole columns. In order of their text: neighbours share the
    longest beginnings, and all that prompts share is read once."""
    for length, family in itertools.product(asked.lengths, asked.tasks):
        shots = 0 if family in ENDS_WITHOUT_EXAMPLE else asked.shots
        made = [prompts(family, count, length, asked.depths, seed, shots) for seed in range(asked.seeds)]
        yield sorted(itertools.chain(*made), key=lambda prompt: prompt.text)


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one server with one model, one prompt at a time, and keeps every reply, so that an interrupted run resumes.
    Where a method is chosen, `rope` is sent, a field that this project's server has."""

    server: Server
    kept: Kept

    async def ask(self, prompt: Prompt, label: str, spec: RopeSpec | None) -> str:
        """Raises BenchError with what the server says, where it refuses."""
        server, body = self.server, self.body(prompt, spec)
        key = key_of(server.name, label, {**body, "model": server.model} if server.model else body)
        if (found := self.kept.get(key)) is None:
            about = {"server": server.name, "method": label, "family": prompt.family, "length": prompt.length}
            about |= {"seed": prompt.seed, "depth": prompt.question.depth, "answers": prompt.question.answers}
            found = self.kept.add(key, {"text": str((await server.choice(body))["text"]), **about})
        return str(found["text"])

    def body(self, prompt: Prompt, spec: RopeSpec | None) -> dict[str, Any]:
        wanted = REPLY_TOKENS if len(prompt.question.answers) == 1 else MOST_REPLY_TOKENS
        body: dict[str, Any] = {"prompt": prompt.text, "max_tokens": wanted, "temperature": 0, "stop": [*REPLY_ENDS]}
        if spec is not None:
            body["rope"] = {name: value for name, value in asdict(spec).items() if value not in (None, False)}
        return body


async def measure(asked: argparse.Namespace, server: Server, progress: Progress) -> tuple[Scores, str]:
    """Scores, and the model's name."""
    train_length = asked.train_length or await served_length(server)
    count = local_counter(asked.tokenizer) if asked.tokenizer else server_counter(server)
    ways: list[tuple[str, RopeSpec | None]] = [(method.label, method.spec) for method in asked.methods]
    ways = ways or [(AS_SERVED, None)]
    try:
        work = list(all_prompts(asked, count))
    except NoRoom as error:
        raise BenchError(str(error)) from None
    scores = Scores([label for label, _ in ways], asked.tasks, asked.lengths, train_length)
    task = progress.add_task("", total=len(ways) * sum(map(len, work)))
    asker = Asker(server, Kept(asked.out / FILE))
    for batch in work:
        for (label, spec), prompt in itertools.product(ways, batch):
            told = f"{label}: {prompt.family} at {prompt.length:,}, seed {prompt.seed}"
            progress.update(task, description=told)
            scores.replies.append(scored(label, prompt, await asker.ask(prompt, label, spec)))
            progress.advance(task)
    return scores, server.model or server.name


def scored(method: str, prompt: Prompt, reply: str) -> Scored:
    sheet = hashlib.sha256(prompt.beginning.encode()).hexdigest()[:16]
    question = prompt.question
    return Scored(method, prompt.family, prompt.length, prompt.seed, question.depth, sheet, question.score(reply))


async def found_groups(asked: argparse.Namespace, server: Server, progress: Progress) -> Method:
    """dpe with the groups that do most on the seeds that are searched, at the longest length."""
    train_length = asked.train_length or await served_length(server)
    common = common_group(asked.lengths[-1], train_length)
    tried = [Method(options.label(spec), spec) for spec in variants(asked.groups, common)]
    own = {"methods": tried, "seeds": asked.seeds // 2, "lengths": asked.lengths[-1:]}
    scores, _ = await measure(argparse.Namespace(**vars(asked) | own), server, progress)

    def score(spec: RopeSpec) -> float:
        found = scores.at(options.label(spec), asked.lengths[-1])
        assert found is not None, "every method was asked"
        return found.value

    spec = best_groups(asked.groups, common, score)
    return Method(options.label(spec), spec)


async def served_length(server: Server) -> int:
    """The trained length, as this project's /v1/models has it."""
    for entry in await server.models():
        if entry["id"] == server.model and entry.get("train_length"):
            return int(entry["train_length"])
    raise BenchError(f"{server.name} does not say how long a text its model was trained on: give --train-length")


async def run(asked: argparse.Namespace, progress: Progress) -> tuple[Scores, str]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http_client(timeout=asked.timeout))
        server = Server(asked.name, asked.url.rstrip("/"), client, asked.model, asked.api_key)
        if asked.launch:
            await stack.enter_async_context(launched(server, asked.launch, asked.out / "server.log"))
        await server.ready(READY_TIMEOUT_S)
        await server.connect()
        if asked.groups:
            asked.methods = [*asked.methods, await found_groups(asked, server, progress)]
        return await measure(asked, server, progress)


def family_list(text: str) -> list[str]:
    found = list(FAMILIES) if text == "all" else text.split(",")
    if unknown := [name for name in found if name not in FAMILIES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(FAMILIES)}")
    return found


def depth_list(text: str) -> list[float]:
    """A number of depths, evenly spread, or the depths themselves."""
    try:
        if text.isdecimal():
            return [(2 * i + 1) / (2 * int(text)) for i in range(options.count(text))]
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        depths = []
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of depths, like 10, nor a list, like 0.1,0.5")
    return sorted(set(depths))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("tasks", __doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="the server, up to and including /v1")
    add("--name", default="server", help="what the server is called in what is kept")
    add("--launch", metavar="COMMAND", help="start the server from here")
    add("--model", help="without it as /v1/models says")
    add("--api-key")
    add("--methods", type=method_list, metavar="A,B", default=[], help="without, as the server is set")
    add("--tasks", type=family_list, default="all", metavar="A,B", help=f"all, or some of {', '.join(FAMILIES)}")
    add("--lengths", type=options.counts, default="2048,4096,8192,16384", metavar="N,N", help="tokens with the reply")
    add("--depths", type=depth_list, default="5", metavar="N or A,B", help="of facts: evenly spread, or which")
    add("--seeds", type=options.count, default=3)
    add("--shots", type=int, default=1, help="few-shot examples before each prompt")
    calibration_options(parser, "seeds")
    add("--train-length", type=options.count, help="of the model; without it as this project's server says")
    add("--tokenizer", metavar="FOLDER", help="a model folder to count with; without it the server's /tokenize")
    add("--timeout", type=float, default=3600.0, help="seconds that a reply may take")
    asked = parser.parse_args(arguments)
    asked.lengths = sorted(set(asked.lengths))
    check_calibration(parser, asked, "seeds")
    if asked.calibrate and all(method.spec != AUTO for method in asked.methods):
        asked.methods = [Method("auto", AUTO), *asked.methods]
    return asked


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        scores, model = asyncio.run(run(asked, progress))
    if asked.calibrate:
        choose(scores, asked.methods, asked.seeds).show("score", console)
    depths = ", ".join(f"{depth:.2f}" for depth in asked.depths)
    about = describe_machine() | {"model": model, "seeds": asked.seeds, "depths": depths, "shots": asked.shots}
    report(scores, about).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("tasks", main)
