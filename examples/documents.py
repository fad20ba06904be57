"""Ask questions over a folder of text files. Each file is read once: later questions, other orders and edits find it.

python examples/documents.py notes/ "What did we decide about the database?" "Who is to write the tests?"
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--pattern", default="*.md", help="which files")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    given = parser.parse_args()
    files = sorted(path for path in given.folder.rglob(given.pattern) if path.is_file())
    documents = [f"{path.name}\n\n{path.read_text(errors='replace')}\n\n" for path in files]
    if not documents:
        sys.exit(f"no {given.pattern} in {given.folder}")
    for question in given.questions:
        began = time.perf_counter()
        reply = ask(given.url, documents, question)
        found = sum(document["cached_tokens"] for document in reply["documents"])
        total = sum(document["tokens"] for document in reply["documents"])
        print(f"{question}\n  {reply['text'].strip()}")
        print(
            f"  {found} of {total} tokens of {len(documents)} files were known; {time.perf_counter() - began:.1f} s\n"
        )


def ask(url: str, documents: list[str], question: str) -> dict:
    body = {
        "documents": documents,
        "prompt": f"Question: {question}\nAnswer:",
        "max_tokens": 64,
        "temperature": 0,
        "stop": ["\n"],
    }
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
