"""Loss against context length, for each position method, through the engine that serves.

    python -m bench.quality --methods rope,linear,ntk,yarn,rerope,leaky_rerope,dynamic_leaky --lengths 8192,16384

The loss is the mean negative log-probability (nats a token) of the `--last` tokens that end at each length. A method
reads a document once, at the longest length: no row depends on what follows it, so the first 8192 rows are what a
prompt of 8192 tokens would give. Each length has its own tokens, and text differs far more than methods do; the figure
to compare by is Δ, the distance from plain rope on the same tokens with no more context than the model was trained on.
A method that can use the longer context is below zero, one that breaks past the trained length far above.

Methods are what a deployment with MAX_MODEL_LEN at the longest length would serve: methods with a factor keep that
factor at the shorter lengths too. A method may bring its parameters: `rerope:window=2048`, `yarn:factor=2`,
`rerope:window=4096:logn`. Every reading is kept in the output folder, so an interrupted run resumes.

    python -m bench.quality --calibrate --text mine.txt --lengths 16384 --documents 4

searches for the method and window that read a text best, and prints the settings. With `--groups 8` it finds DPE's
groups for eighths of the pairs first, and asks that method, too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from prerope.rope.spec import RopeSpec
from prerope.server.config import Quantization
from prerope.server.engine.engine import Engine
from prerope.server.tokenizer import Tokenizer
from tqdm import tqdm

from bench.quality.calibration import calibrate, num_readings
from bench.quality.report import REFERENCE, Losses, Quality, report
from bench.shared import options
from bench.shared.choice import Choice, best_groups, calibration_options, check_calibration, common_group, variants
from bench.shared.engines import mean_loss, model_options, opened, prompt_logprobs
from bench.shared.kept import Kept, key_of
from bench.shared.machine import describe_machine
from bench.shared.options import label, method_list
from bench.shared.text import Document, context, cut_documents, default_texts, ending_at, file_text

FILE = "quality-readings.jsonl"
DEFAULT_METHODS = "rope,linear,ntk,yarn,rerope,leaky_rerope,dynamic_leaky"


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model and the documents that it is to read, one context at a time.

    Attributes:
        beginning: what its tokenizer puts before any text.
        last: tokens before a length whose loss counts.
    """

    engine: Engine
    documents: Sequence[Document]
    beginning: Sequence[int]
    last: int
    about: dict[str, Any]
    kept: Kept

    @property
    def trained(self) -> int:
        return self.engine.info.train_length

    def losses(
        self, token_ids: Sequence[int], spec: RopeSpec, stops: Sequence[int], advance: Callable[[int], object]
    ) -> list[float]:
        """The loss of the last tokens before each of `stops`, ascending; `advance` hears of every token computed."""
        positions = self.engine.resolve_positions(spec)
        about = {name: self.about[name] for name in ("model", "dtype")}
        about |= {"stops": list(stops), "last": self.last, "positions": positions.described}
        key = key_of(about, [*token_ids])
        if (found := self.kept.get(key)) is None:
            start = stops[0] - self.last
            logprobs = prompt_logprobs(self.engine, token_ids, start, advance, positions=positions)
            losses = [mean_loss(logprobs, stop, self.last) for stop in stops]
            found = self.kept.add(key, {"losses": losses, **about})
        else:
            advance(len(token_ids))
        return list(found["losses"])


def measure(subject: Subject, asked: argparse.Namespace) -> Quality:
    """`{(method, length): [a loss a document]}`. Documents go outermost, so that an early stop compares equals."""
    lengths, trained = asked.lengths, subject.trained
    names = [REFERENCE, *(method.label for method in asked.methods)]
    losses: Losses = {(name, length): [] for name in names for length in lengths}
    tokens_each = len(asked.methods) * lengths[-1] + sum(min(length, trained) for length in lengths)
    with tqdm(total=len(subject.documents) * tokens_each, unit=" tokens", unit_scale=True, smoothing=0.05) as bar:
        for document in subject.documents:
            token_ids = context(document, lengths[-1], subject.beginning)
            for method in asked.methods:
                bar.set_description(method.label)
                found = subject.losses(token_ids, method.spec, lengths, bar.update)
                for length, loss in zip(lengths, found, strict=True):
                    losses[method.label, length].append(loss)
            for length in lengths:
                bar.set_description(f"{REFERENCE} at {length:,}")
                known = ending_at(token_ids, length, min(length, trained), subject.beginning)
                losses[REFERENCE, length] += subject.losses(known, RopeSpec(method="rope"), [len(known)], bar.update)
    resolved = {method.label: subject.engine.resolve_positions(method.spec).described for method in asked.methods}
    return Quality(names, lengths, losses, subject.about | {"methods": resolved})


def search(subject: Subject, asked: argparse.Namespace) -> Choice:
    """At the longest length: on the first half of the documents, held against the second."""
    length, numbers = asked.lengths[-1], range(len(subject.documents))
    searched, held_out = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    common = common_group(length, subject.trained)
    tried = variants(asked.groups, common) if asked.groups else []
    total = (num_readings(len(searched), len(held_out)) + (len(tried) + 1) * len(searched)) * length
    with tqdm(total=total, unit=" tokens", unit_scale=True, smoothing=0.05) as bar:

        def loss(spec: RopeSpec, number: int) -> float:
            bar.set_description(f"{label(spec)}, document {number + 1}")
            token_ids = context(subject.documents[number], length, subject.beginning)
            return subject.losses(token_ids, spec, [length], bar.update)[0]

        def score(spec: RopeSpec) -> float:
            return -statistics.fmean(loss(spec, number) for number in searched)

        found = [best_groups(asked.groups, common, score)] if asked.groups else []
        return calibrate(loss, searched, held_out, subject.trained, found)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("quality", __doc__)
    add = parser.add_argument
    add("--methods", type=method_list, default=DEFAULT_METHODS, metavar="A,B")
    add("--lengths", type=options.counts, default="8192,16384", metavar="N,N", help="contexts in tokens")
    add("--text", type=Path, action="append", metavar="FILE", help="may be repeated; without it Python's own prose")
    add("--documents", type=options.count, default=3, help="consecutive pieces of the text, of the longest length each")
    add("--last", type=options.count, default=1024, help="tokens before each length whose loss counts")
    calibration_options(parser, "documents")
    add("--weight-quantization", choices=get_args(Quantization), default="none")
    model_options(parser)
    asked = parser.parse_args(arguments)
    asked.lengths = sorted(set(asked.lengths))
    if asked.last >= asked.lengths[0]:
        parser.error(f"--last {asked.last}: must be below the shortest length, {asked.lengths[0]}")
    check_calibration(parser, asked, "documents")
    if missing := [path.name for path in asked.text or () if not path.is_file()]:
        parser.error(f"--text: no such file: {', '.join(missing)}")
    return asked


def load_subject(asked: argparse.Namespace, say: Callable[[str], None]) -> Subject:
    """The model and the documents, ready to be read."""
    longest = asked.lengths[-1]
    engine, checkpoint = opened(
        asked,
        say,
        weight_quantization=asked.weight_quantization,
        max_model_len=longest,
        max_num_seqs=1,
        max_batched_tokens=2048,
    )
    for method in asked.methods:  # refused now, or hours later
        engine.resolve_positions(method.spec)
    tokenizer = Tokenizer.load(checkpoint)
    texts = iter([file_text(path) for path in asked.text]) if asked.text else default_texts()
    encode = partial(tokenizer.encode, add_special_tokens=False)
    documents = cut_documents(texts, encode, asked.documents, longest)
    weights = "" if asked.weight_quantization == "none" else f", {asked.weight_quantization} weights"
    about = {"model": checkpoint.name, "dtype": engine.info.dtype + weights, "train_length": engine.info.train_length}
    about |= {"last": asked.last, "documents": [document.name for document in documents]}
    kept = Kept(None if asked.calibrate else asked.out / FILE)
    return Subject(engine, documents, tokenizer.encode(""), asked.last, describe_machine() | about, kept)


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    subject = load_subject(asked, console.print)
    if asked.calibrate:
        search(subject, asked).show("loss", console)
    else:
        report(measure(subject, asked)).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("quality", main)
