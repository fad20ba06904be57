"""One OpenAI-compatible server as the load generator sees it: what it understands, and timed streams from it.

Servers differ in how they are asked for an exact number of tokens and for a usage at the end. `Server.connect`
tries the dialects once, and from then on every request is written in the one that was understood.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.streams import Completion, StreamFailed, read_completion

# Tried in this order; the first that a server takes, and ends with a usage, is its dialect.
DIALECTS: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "ignore_eos": {"ignore_eos": True, "stream_options": {"include_usage": True}},
    # transformers serve refuses unknown fields, takes a generation config as JSON, and always sends a usage.
    "transformers": {"generation_config": json.dumps({"eos_token_id": -1})},
    "openai": {"stream_options": {"include_usage": True}},
    "plain": {},
}
PROBE_PROMPT = "The first words of the book were"
PROBE_TOKENS = 4


class ServerUnusable(Exception):
    """The server is not there, or none of the dialects gets a countable stream from it."""


@dataclass(slots=True)
class Server:
    """A server under measurement. `name` is what tables call it."""

    name: str
    url: str  # up to and including /v1
    client: httpx.AsyncClient
    model: str | None = None
    api_key: str | None = None
    dialect: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    async def connect(self) -> None:
        """Find the model's name and the dialect.

        Raises:
            ServerUnusable: nothing worked; the message has the last answer.
        """
        if self.api_key:
            self.headers["Authorization"] = f"Bearer {self.api_key}"
        models = [self.model] if self.model else [*await self._served_models(), None]
        failure = "no answer"
        for model in models:
            for dialect in DIALECTS:
                self.model, self.dialect = model, dialect
                try:
                    await self.complete(PROBE_PROMPT, PROBE_TOKENS)
                    return
                except (StreamFailed, httpx.HTTPError) as error:
                    failure = f"{type(error).__name__}: {error}"
        raise ServerUnusable(f"{self.name} at {self.url}: {failure}")

    async def _served_models(self) -> list[str]:
        try:
            reply = await self.client.get(f"{self.url}/models", headers=self.headers)
            return [entry["id"] for entry in reply.json()["data"]] if reply.is_success else []
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []  # transformers serve answers 500 without a hub cache, and needs no name

    def body(self, prompt: str, num_tokens: int) -> dict[str, Any]:
        """The JSON of a greedy, streamed completion in this server's dialect."""
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True}
        if self.model is not None:
            body["model"] = self.model
        return {**body, **DIALECTS[self.dialect]}

    async def complete(self, prompt: str, num_tokens: int) -> Completion:
        """Stream `num_tokens` greedy tokens after `prompt`.

        Raises:
            StreamFailed: a refusal, an error event or an empty stream.
            httpx.HTTPError: no connection, or a time-out.
        """
        content = json.dumps(self.body(prompt, num_tokens)).encode()
        headers = {**self.headers, "Content-Type": "application/json"}
        chunks: list[tuple[float, bytes]] = []
        started = time.perf_counter()
        async with self.client.stream("POST", f"{self.url}/completions", content=content, headers=headers) as reply:
            if reply.is_error:
                raise StreamFailed(f"HTTP {reply.status_code}: {(await reply.aread())[:300].decode(errors='replace')}")
            async for chunk in reply.aiter_raw():
                chunks.append((time.perf_counter(), chunk))
        return read_completion(started, chunks)

    async def is_ready(self) -> bool:
        """Whether the server is up and its model loaded: by the first of its health routes that exists."""
        for path in ("/ready", "/health", "/v1/models"):
            try:
                reply = await self.client.get(f"{self.root}{path}", headers=self.headers)
            except httpx.HTTPError:
                return False
            if reply.status_code != httpx.codes.NOT_FOUND:
                return reply.is_success
        return False
