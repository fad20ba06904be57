"""What else could read far keys: candidates beside dynamic_leaky, tuned on one document and held against others.

    python -m bench.search --text faq-1.txt --text faq-2.txt

The first document is a piece of Python's language reference; all of `bench.search_candidates` read it. The next piece,
and each text that is given, are held out: only dynamic_leaky and the `--finalists` best candidates read those. What
counts is the mean negative log-probability (nats a token) of the `--last` tokens of `--length`, and how far it is from
dynamic_leaky's on the same tokens; ± is the standard error of that difference, from the means of 16 stretches.

Every reading is kept in the output folder, so an interrupted search goes on, and `--report-only` prints what is there.
The prefix cache is on: most candidates are rope inside the trained length, so those rows of a document are read once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.sampling.params import SamplingParams
from prerope.server.engine.sequence import EngineRequest
from prerope.server.errors import PreRopeError
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint
from prerope.server.tokenizer import Tokenizer
from rich.console import Console
from tqdm import tqdm

from bench import OUTPUT_FOLDER, WIDTH
from bench.documents import Document, TextTooShort, context, cut_documents, default_texts, file_text
from bench.readings import Readings, reading_key
from bench.report import markdown, print_table
from bench.search_candidates import BASELINE, CANDIDATES, HIGH, LOW, Candidate, scaled_parts
from bench.search_report import HeldOut, Losses, Tuning

Read = Callable[[Sequence[int], Candidate], list[float]]
"""A context and a candidate → nats of each of its last tokens."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The documents, of which the first is searched on, and what readings of them are known by.

    beginning: what the model's tokenizer puts before any text. length: tokens of each context. last: tokens that count.
    """

    model: str
    documents: Sequence[Document]
    beginning: Sequence[int]
    length: int
    last: int


def in_halves(engine: Engine) -> None:
    """Put the lower and the upper half of the layers in a group each.

    Raises ValueError for a model whose layers already differ.
    """
    layers = engine.model.layers
    groups = {layer.group for layer in layers}
    if len(groups) > 1 or len(engine.model.rotaries) > 1:
        raise ValueError("the search splits the layers in two groups itself: take a model with one rotary embedding")
    engine.model.layers = [replace(layer, group=LOW if 2 * n < len(layers) else HIGH) for n, layer in enumerate(layers)]
    engine.model.stack = None  # single rows would go through it, in the model's own groups


def read(engine: Engine, token_ids: Sequence[int], candidate: Candidate, last: int) -> list[float]:
    """Nats of each of the `last` tokens, by an engine whose layers are in halves."""
    (rotary,) = engine.model.rotaries.values()
    start = len(token_ids) - last
    sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_start=start)
    request = EngineRequest(
        request_id=candidate.label,
        prompt_token_ids=token_ids,
        sampling=sampling,
        positions=candidate.positions(rotary),
    )
    engine.add(request)
    logprobs = None
    with scaled_parts():
        while engine.has_work():
            for _request_id, output in engine.step():
                logprobs = output.prompt_logprobs or logprobs
    if logprobs is None:
        raise RuntimeError("the engine finished a request without the prompt log-probabilities that it asked for")
    return [-entry.logprob for entry in logprobs[start:] if entry is not None]


class Reader:
    """Losses by candidate and document, kept between runs. read: None where only what is kept is wanted."""

    def __init__(self, subject: Subject, kept: Readings, read: Read | None = None) -> None:
        self.subject, self._kept, self._read = subject, kept, read

    def known(self, candidate: Candidate, number: int) -> list[float] | None:
        return self._kept.get(self._key(candidate, number))

    def losses(self, candidate: Candidate, number: int) -> list[float]:
        """Nats a token of document `number`."""
        found = self.known(candidate, number)
        if found is None:
            if self._read is None:
                raise RuntimeError(f"{candidate.label} has not read document {number + 1}, and nothing is to be read")
            subject = self.subject
            found = [round(nats, 5) for nats in self._read(self._token_ids(number), candidate)]
            about = {"label": candidate.label, "document": subject.documents[number].name, "last": subject.last}
            self._kept.add(self._key(candidate, number), found, about | {"candidate": candidate.describe()})
        return found

    def _token_ids(self, number: int) -> list[int]:
        return context(self.subject.documents[number], self.subject.length, self.subject.beginning)

    def _key(self, candidate: Candidate, number: int) -> str:
        about = {"model": self.subject.model, "candidate": candidate.describe(), "last": self.subject.last}
        return reading_key(about, self._token_ids(number))


def search(reader: Reader, candidates: Sequence[Candidate], num_finalists: int) -> None:
    """Read what is not known yet: all candidates on document 0, then dynamic_leaky and the best of them on the rest."""
    num_documents = len(reader.subject.documents)
    if BASELINE not in candidates:
        candidates = [BASELINE, *candidates]
    with tqdm(total=len(candidates) + (num_documents - 1) * (1 + num_finalists), unit=" readings") as bar:
        for candidate in candidates:
            bar.set_description(candidate.label)
            reader.losses(candidate, 0)
            bar.update()
        chosen = finalists(reader, candidates, num_finalists)
        for number in range(1, num_documents):
            for candidate in (BASELINE, *chosen):
                bar.set_description(f"{candidate.label}, document {number + 1}")
                reader.losses(candidate, number)
                bar.update()


def finalists(reader: Reader, candidates: Sequence[Candidate], num_finalists: int) -> list[Candidate]:
    """The best on document 0, dynamic_leaky apart."""
    means = {
        candidate.label: statistics.fmean(found)
        for candidate in candidates
        if candidate != BASELINE and (found := reader.known(candidate, 0)) is not None
    }
    by_label = {candidate.label: candidate for candidate in candidates}
    return [by_label[label] for label in sorted(means, key=lambda label: means[label])[:num_finalists]]


def tables(reader: Reader, candidates: Sequence[Candidate]) -> tuple[Tuning, HeldOut]:
    """Of what is known."""
    documents = reader.subject.documents
    losses: Losses = {
        (candidate.label, number): found
        for number in range(len(documents))
        for candidate in {BASELINE.label: BASELINE, **{c.label: c for c in candidates}}.values()
        if (found := reader.known(candidate, number)) is not None
    }
    names = [document.name for document in documents]
    return Tuning(losses, BASELINE.label, names[0]), HeldOut(losses, BASELINE.label, names[1:])


def parse_candidates(text: str) -> list[Candidate]:
    labels = [label.strip() for label in text.split(";")]
    if unknown := [label for label in labels if label not in CANDIDATES]:
        raise argparse.ArgumentTypeError(f"no candidate {unknown[0]!r}; there are {'; '.join(CANDIDATES)}")
    return [CANDIDATES[label] for label in labels]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--candidates", type=parse_candidates, default=list(CANDIDATES.values()), metavar="A;B", help="default: all")
    add("--finalists", type=int, default=3, help="candidates that read the held-out documents; default: 3")
    add("--text", type=Path, action="append", default=[], metavar="FILE", help="held out; may be repeated")
    add("--model", metavar="MODEL", help="local folder or hub id; default: the embedded model")
    add("--length", type=int, default=16384, help="tokens of each document; default: 16384")
    add("--last", type=int, default=2048, help="tokens whose loss counts; default: 2048")
    add("--report-only", action="store_true", help="print what has been read so far, and read nothing")
    add("--out", type=Path, default=OUTPUT_FOLDER / "search", help="default: bench/out/search")
    options = parser.parse_args(arguments)
    if not 16 <= options.last < options.length:
        parser.error(f"--last {options.last}: must be at least 16 and below --length, {options.length}")
    if missing := [path.name for path in options.text if not path.is_file()]:
        parser.error(f"--text: no such file: {', '.join(missing)}")
    return options


def load_subject(options: argparse.Namespace, checkpoint: Checkpoint) -> Subject:
    """Two pieces of the language reference, then the beginning of each text that is given."""
    tokenizer = Tokenizer.load(checkpoint)

    def encode(text: str) -> Sequence[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    documents = cut_documents(default_texts(), encode, 2, options.length)
    for path in options.text:
        documents += cut_documents(iter([file_text(path)]), encode, 1, options.length)
    return Subject(checkpoint.name, documents, tokenizer.encode(""), options.length, options.last)


def load_engine(options: argparse.Namespace, checkpoint: Checkpoint, report: Callable[[str], None]) -> Engine:
    """With its layers in halves, and room for a document beside the beginning of another."""
    config = EngineConfig(device="cpu", max_model_len=options.length, max_num_seqs=2, max_batched_tokens=2048)
    engine = Engine.load(checkpoint, config, report)
    in_halves(engine)
    return engine


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    kept = Readings(options.out)
    try:
        checkpoint = resolve_checkpoint(options.model, None, say)
        subject = load_subject(options, checkpoint)
        if options.report_only:
            reader = Reader(subject, kept)
        else:
            engine = load_engine(options, checkpoint, say)
            reader = Reader(
                subject, kept, lambda token_ids, candidate: read(engine, token_ids, candidate, options.last)
            )
            search(reader, options.candidates, options.finalists)
    except (PreRopeError, TextTooShort, ValueError) as error:
        print(f"bench.search: {error}", file=sys.stderr)
        return 1
    sections = [section for section in tables(reader, options.candidates) if section.rows()]
    for section in sections:
        print_table(section, console)
    (options.out / "search.md").write_text("\n".join(markdown(section) for section in sections), encoding="utf-8")
    say(f"wrote search.md in {options.out.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
