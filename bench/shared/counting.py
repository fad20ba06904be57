"""How many tokens a text has: asked of a local tokenizer, or of a server's /tokenize."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from bench import BenchError
from bench.shared.servers import Server

Counter = Callable[[str], int]


def local_counter(folder: str) -> Counter:
    """Counts with the tokenizer of a local model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return lambda text: len(tokenizer(text).input_ids)


def server_counter(server: Server) -> Counter:
    """Counts with a server's /tokenize, by vLLM's and this server's name of the field, or llama.cpp's."""
    for names in (("prompt", "add_special_tokens"), ("content", "add_special")):

        def count(text: str, names: tuple[str, str] = names) -> int:
            body = dict(zip(names, (text, True), strict=True))
            reply = httpx.post(f"{server.root}/tokenize", json=body, headers=server.headers, timeout=60.0)
            return len(reply.raise_for_status().json()["tokens"])

        try:
            if count("One two three"):
                return count
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            continue
    raise BenchError(f"{server.name} has no /tokenize: put a server first that has, or give --tokenizer FOLDER")
