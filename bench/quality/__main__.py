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
from functools import cache
from pathlib import Path
from typing import Any, get_args

from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig, Quantization
from prerope.server.engine.engine import Engine
from prerope.server.engine.loading import load_engine
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.errors import PreRopeError
from prerope.server.models.checkpoint import resolve_checkpoint
from prerope.server.tokenizer import Tokenizer
from tqdm import tqdm

from bench import BenchError
from bench.quality.calibration import Calibration, calibrate, num_readings
from bench.quality.report import REFERENCE, Losses, Quality, report
from bench.shared import options
from bench.shared.effective import best_groups, common_group, variants
from bench.shared.kept import Kept, key_of
from bench.shared.machine import describe_machine
from bench.shared.options import environment, label, method_list
from bench.shared.text import Document, context, cut_documents, default_texts, ending_at, file_text

FILE = "quality-readings.jsonl"
DEFAULT_METHODS = "rope,linear,ntk,yarn,rerope,leaky_rerope,dynamic_leaky"


def mean_loss(prompt_logprobs: Sequence[TokenLogprobs | None], stop: int, last: int) -> float:
    """Mean negative log-probability of the `last` tokens before position `stop`; a prompt's first token has none."""
    known = [entry.logprob for entry in prompt_logprobs[max(0, stop - last) : stop] if entry is not None]
    if len(known) < last or not last:
        raise ValueError(f"log-probabilities of {last} tokens before {stop} are wanted, there are {len(known)}")
    return -statistics.fmean(known)


class Reader:
    """Reads one context at a time through a real engine."""

    def __init__(self, subject: Subject, last: int, kept: Kept | None = None) -> None:
        self._subject = subject
        self._last = last
        self._kept = kept
        self._num_read = 0

    def losses(
        self, token_ids: Sequence[int], spec: RopeSpec, stops: Sequence[int], advance: Callable[[int], object]
    ) -> list[float]:
        """The loss of the last tokens before each of `stops`, ascending; `advance` hears of every token computed."""
        about = {name: self._subject.about[name] for name in ("model", "dtype")} | {"stops": list(stops)}
        about |= {"last": self._last, "positions": self._subject.engine.resolve_positions(spec).described}
        key = key_of(about, [*token_ids])
        if self._kept and (found := self._kept.get(key)):
            advance(len(token_ids))
            return list(found["losses"])
        logprobs = self._read(token_ids, spec, stops[0] - self._last, advance)
        losses = [mean_loss(logprobs, stop, self._last) for stop in stops]
        if self._kept:
            self._kept.add(key, {"losses": losses, **about})
        return losses

    def _read(
        self, token_ids: Sequence[int], spec: RopeSpec, start: int, advance: Callable[[int], object]
    ) -> Sequence[TokenLogprobs | None]:
        """Log-probabilities of the tokens from `start` on; None before."""
        engine = self._subject.engine
        self._num_read += 1
        request = EngineRequest(
            request_id=f"quality-{self._num_read}",
            prompt_token_ids=token_ids,
            sampling=SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=start),
            positions=engine.resolve_positions(spec),
            report_progress=True,
        )
        engine.add(request)
        processed, logprobs = 0, None
        while engine.has_work():
            for _request_id, output in engine.step():
                advance(max(0, output.num_processed_tokens - processed))
                processed = max(processed, output.num_processed_tokens)
                logprobs = output.prompt_logprobs or logprobs
        if logprobs is None:
            raise RuntimeError("the engine finished a request without the prompt log-probabilities that it asked for")
        return logprobs


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model and the documents that it is to read; `beginning` is what its tokenizer puts before any text."""

    engine: Engine
    documents: Sequence[Document]
    beginning: Sequence[int]
    about: dict[str, Any]


def measure(subject: Subject, asked: argparse.Namespace) -> Quality:
    """`{(method, length): [a loss a document]}`. Documents go outermost, so that an early stop compares equals."""
    reader = Reader(subject, asked.last, Kept(asked.out / FILE))
    lengths, trained = asked.lengths, subject.engine.info.train_length
    names = [REFERENCE, *(method.label for method in asked.methods)]
    losses: Losses = {(name, length): [] for name in names for length in lengths}
    tokens_each = len(asked.methods) * lengths[-1] + sum(min(length, trained) for length in lengths)
    with tqdm(total=len(subject.documents) * tokens_each, unit=" tokens", unit_scale=True, smoothing=0.05) as bar:
        for document in subject.documents:
            token_ids = context(document, lengths[-1], subject.beginning)
            for method in asked.methods:
                bar.set_description(method.label)
                found = reader.losses(token_ids, method.spec, lengths, bar.update)
                for length, loss in zip(lengths, found, strict=True):
                    losses[method.label, length].append(loss)
            for length in lengths:
                bar.set_description(f"{REFERENCE} at {length:,}")
                known = ending_at(token_ids, length, min(length, trained), subject.beginning)
                losses[REFERENCE, length] += reader.losses(known, RopeSpec(method="rope"), [len(known)], bar.update)
    resolved = {method.label: subject.engine.resolve_positions(method.spec).described for method in asked.methods}
    return Quality(names, lengths, losses, subject.about | {"methods": resolved})


def search(subject: Subject, asked: argparse.Namespace) -> Calibration:
    """`bench.calibration` at the longest length: on the first half of the documents, held against the second."""
    reader, length = Reader(subject, asked.last), asked.lengths[-1]
    numbers = range(len(subject.documents))
    searched, held_out = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    trained = subject.engine.info.train_length
    common = common_group(length, trained)
    tried = variants(asked.groups, common) if asked.groups else []
    total = (num_readings(len(searched), len(held_out)) + (len(tried) + 1) * len(searched)) * length
    with tqdm(total=total, unit=" tokens", unit_scale=True, smoothing=0.05) as bar:

        def loss(spec: RopeSpec, number: int) -> float:
            bar.set_description(f"{label(spec)}, document {number + 1}")
            token_ids = context(subject.documents[number], length, subject.beginning)
            return reader.losses(token_ids, spec, [length], bar.update)[0]

        def score(spec: RopeSpec) -> float:
            return -statistics.fmean(loss(spec, number) for number in searched)

        found = [best_groups(asked.groups, common, cache(score))] if asked.groups else []
        return calibrate(loss, searched, held_out, trained, found)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("quality", __doc__)
    add = parser.add_argument
    add("--methods", type=method_list, default=DEFAULT_METHODS, metavar="A,B")
    add("--lengths", type=options.counts, default="8192,16384", metavar="N,N", help="contexts in tokens")
    add("--model", metavar="MODEL", help="local folder, hub id or .gguf; without it the embedded model")
    add("--revision", help="of a hub id")
    add("--text", type=Path, action="append", metavar="FILE", help="may be repeated; without it Python's own prose")
    add("--documents", type=options.count, default=3, help="consecutive pieces of the text, of the longest length each")
    add("--last", type=options.count, default=1024, help="tokens before each length whose loss counts")
    add("--calibrate", action="store_true", help="search for the best method on half of the documents, at the longest "
        "length, and print its settings")  # fmt: skip
    add("--groups", type=options.count, default=0, metavar="N", help="with --calibrate: find dpe's groups "
        "first, for so many equal shares of the pairs of dims")  # fmt: skip
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--weight-quantization", choices=get_args(Quantization), default="none")
    add("--device", default="auto")
    asked = parser.parse_args(arguments)
    asked.lengths = sorted(set(asked.lengths))
    if asked.last >= asked.lengths[0]:
        parser.error(f"--last {asked.last}: must be below the shortest length, {asked.lengths[0]}")
    if asked.calibrate and asked.documents < 2:
        parser.error(f"--documents {asked.documents}: must be at least 2, some to search on and some to hold out")
    if asked.groups and not asked.calibrate:
        parser.error("--groups: goes with --calibrate")
    if missing := [path.name for path in asked.text or () if not path.is_file()]:
        parser.error(f"--text: no such file: {', '.join(missing)}")
    return asked


def load_subject(asked: argparse.Namespace, report: Callable[[str], None]) -> Subject:
    """The model and the documents, ready to be read."""
    checkpoint = resolve_checkpoint(asked.model, asked.revision, report)
    tokenizer = Tokenizer.load(checkpoint)
    texts = iter([file_text(path) for path in asked.text]) if asked.text else default_texts()
    documents = cut_documents(
        texts, lambda text: tokenizer.encode(text, add_special_tokens=False), asked.documents, asked.lengths[-1]
    )
    config = EngineConfig(
        dtype=asked.dtype,
        device=asked.device,
        weight_quantization=asked.weight_quantization,
        max_model_len=asked.lengths[-1],
        max_num_seqs=1,
        max_batched_tokens=2048,
        prefix_caching=False,
    )
    engine = load_engine(checkpoint, config, report)
    about = describe_machine() | {
        "model": checkpoint.name,
        "dtype": engine.info.dtype if asked.weight_quantization == "none" else f"{engine.info.dtype}, int8 weights",
        "train_length": engine.info.train_length,
        "last": asked.last,
        "documents": [document.name for document in documents],
    }
    return Subject(engine, documents, tokenizer.encode(""), about)


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    try:
        subject = load_subject(asked, console.print)
        for method in asked.methods:  # refused now, or hours later
            subject.engine.resolve_positions(method.spec)
    except PreRopeError as error:
        raise BenchError(str(error)) from None
    if asked.calibrate:
        calibration = search(subject, asked)
        calibration.table().show(console)
        console.print("\n".join(environment(calibration.recommended)))
    else:
        report(measure(subject, asked)).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("quality", main)
