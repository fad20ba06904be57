"""Documents over HTTP: found in any order, equal to a cold run, and refused with numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

TEXTS = [f"The {name} of the house is painted {colour}. " * 6 for name, colour in (("door", "red"), ("roof", "blue"))]
QUESTION = "Which colour has the door?"


@pytest.fixture(scope="module")
def http(serve_module: Any, tiny_checkpoint: Path) -> Iterator[httpx.Client]:
    url = serve_module(model_id=str(tiny_checkpoint), max_model_len=1024)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, **fields: Any) -> Any:
    body = {"prompt": QUESTION, "documents": TEXTS, "max_tokens": 8, "temperature": 0, **fields}
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_another_order_finds_every_document(http: httpx.Client) -> None:
    cold = ask(http, documents=TEXTS[::-1], cache_salt="cold")
    assert [document["cached_tokens"] for document in cold["documents"]] == [0, 0]
    ask(http, cache_salt="warm")
    warm = ask(http, documents=TEXTS[::-1], cache_salt="warm")
    assert warm["token_ids"] == cold["token_ids"]
    first, second = warm["documents"]
    assert first["tokens"] - 32 < first["cached_tokens"] <= first["tokens"]
    assert second["tokens"] - 32 < second["cached_tokens"] <= second["tokens"] - 16
    assert warm["usage"]["cached_tokens"] >= sum(document["cached_tokens"] for document in warm["documents"])


def test_full_attention_is_the_plain_prompt(http: httpx.Client) -> None:
    full = ask(http, document_attention="full", document_prefix="")
    pieces = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in [*TEXTS, QUESTION]]
    plain = ask(http, documents=[], prompt=[token for piece in pieces for token in piece])
    assert full["token_ids"] == plain["token_ids"]
    assert "documents" not in full
    assert ask(http, document_prefix="")["usage"]["prompt_tokens"] == full["usage"]["prompt_tokens"]


def test_token_ids_and_streams(http: httpx.Client) -> None:
    documents = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    assert ask(http, documents=documents)["token_ids"] == ask(http)["token_ids"]
    body = {"prompt": QUESTION, "documents": TEXTS, "max_tokens": 4, "stream": True, "return_progress": True}
    with http.stream("POST", "/generate", json=body) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert '"documents"' in lines[-2]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"documents": "text"}, "must be a list"),
        ({"documents": ["a", ""]}, r"documents\[1\]' is empty"),
        ({"documents": ["a"] * 1025}, "has 1025 documents: at most 1024"),
        ({"documents": [[10**6]]}, "token ids go from 0"),
        ({"documents": [{"text": "a"}]}, "must be text or a list of token ids"),
        ({"documents": ["word " * 3000]}, "1024"),
        ({"document_attention": "none"}, "document_attention"),
        ({"document_reread": -1}, "document_reread"),
    ],
)
def test_refusals_name_what_is_wrong(http: httpx.Client, fields: dict[str, Any], words: str) -> None:
    reply = http.post("/generate", json={"prompt": QUESTION, "documents": TEXTS, "max_tokens": 4, **fields})
    assert reply.status_code == 400
    assert re.search(words, reply.json()["error"]["message"])


def test_a_stop_string_ends_with_the_documents_all_the_same(http: httpx.Client) -> None:
    text = ask(http)["text"]
    stopped = ask(http, stop=[text[1:3]])
    assert stopped["finish_reason"] == "stop"
    assert len(stopped["documents"]) == len(TEXTS)


def test_the_example_asks_over_a_folder_of_files(http: httpx.Client, tmp_path: Path) -> None:
    for name, text in zip(("door.md", "roof.md"), TEXTS, strict=True):
        (tmp_path / name).write_text(text)
    example = Path(__file__).parents[3] / "examples" / "documents.py"
    asked = [str(tmp_path), QUESTION, "And the roof?", "--url", str(http.base_url)]
    done = subprocess.run([sys.executable, example, *asked], capture_output=True, text=True, check=True, timeout=60)
    first, second = (
        re.findall(r"(\d+) of (\d+) tokens of 2 files were known", line) for line in done.stdout.split("\n\n")[:2]
    )
    assert first[0][0] == "0"
    assert int(second[0][0]) > int(second[0][1]) - 40
