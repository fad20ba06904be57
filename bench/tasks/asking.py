"""Asks an OpenAI-compatible server, one prompt at a time, and keeps every reply, so that an interrupted run resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prerope.rope.spec import RopeSpec

from bench import BenchError
from bench.shared.kept import Kept, key_of
from bench.shared.servers import Server
from bench.tasks.families import Prompt
from bench.tasks.sheets import REPLY_ENDS

FILE = "tasks-replies.jsonl"
REPLY_TOKENS = {1: 12}
MOST_REPLY_TOKENS = 60


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server said, and how many tokens it counted in the prompt."""

    text: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Asker:
    """One server with one model. Where a method is chosen, `rope` is sent, a field that this project's server has."""

    server: Server
    kept: Kept

    async def ask(self, prompt: Prompt, label: str, spec: RopeSpec | None) -> Reply:
        """Raises BenchError with what the server says, where it refuses."""
        body = self.body(prompt, spec)
        key = key_of(self.server.name, label, body)
        if (found := self.kept.get(key)) is not None:
            return Reply(found["text"], found["prompt_tokens"])
        reply = await self._post(body)
        about = {"server": self.server.name, "method": label, "family": prompt.family, "length": prompt.length}
        about |= {"seed": prompt.seed, "depth": prompt.question.depth, "answers": prompt.question.answers}
        self.kept.add(key, {**asdict(reply), **about})
        return reply

    def body(self, prompt: Prompt, spec: RopeSpec | None) -> dict[str, Any]:
        wanted = REPLY_TOKENS.get(len(prompt.question.answers), MOST_REPLY_TOKENS)
        body: dict[str, Any] = {"prompt": prompt.text, "max_tokens": wanted, "temperature": 0, "stop": [*REPLY_ENDS]}
        if self.server.model:
            body["model"] = self.server.model
        if spec is not None:
            given = {name: value for name, value in asdict(spec).items() if value is not None and value is not False}
            body["rope"] = given
        return body

    async def _post(self, body: dict[str, Any]) -> Reply:
        server = self.server
        try:
            answer = await server.client.post(f"{server.url}/completions", json=body, headers=server.headers)
        except httpx.HTTPError as error:
            raise BenchError(f"{server.name} at {server.url}: {type(error).__name__}: {error}") from None
        if answer.is_error:
            raise BenchError(f"{server.name}: HTTP {answer.status_code}: {answer.text[:300]}")
        said = answer.json()
        return Reply(said["choices"][0]["text"], int((said.get("usage") or {}).get("prompt_tokens") or 0))
