"""A running server, over HTTP: requests as dicts, replies as dicts, streams as events. Knows nothing of terminals."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

LEAD = "Documents:"
"""What stands before documents in the first question."""

Message = dict[str, str]


class CallFailed(Exception):
    """A server that is not there, or a refusal, in words for whoever typed the command. `code` is the server's."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Document:
    """A text and what it is called."""

    name: str
    text: str

    @property
    def headed(self) -> str:
        return f"\n\n# {self.name}\n\n{self.text}"


@dataclass(frozen=True, slots=True)
class Client:
    """The server at a URL. Every method raises CallFailed."""

    url: str
    key: str | None = None

    @classmethod
    def at(cls, url: str, key: str | None = None) -> Client:
        """By the server's address, or that with /v1 behind it, which OpenAI's clients are given."""
        url = url if "://" in url else f"http://{url}"
        return cls(url.rstrip("/").removesuffix("/v1").rstrip("/"), key)

    def get(self, path: str) -> dict[str, Any]:
        with self._open(path, None) as response:
            return dict(json.load(response))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._open(path, body) as response:
            return dict(json.load(response))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A stream's events. Leaving off closes the connection, which ends the request on the server."""
        with self._open(path, body) as response:
            try:
                for line in response:
                    data = line.decode().removeprefix("data:").strip() if line.startswith(b"data:") else ""
                    if data == "[DONE]":
                        return
                    if data:
                        yield _checked(json.loads(data))
            except (OSError, HTTPException) as error:
                raise CallFailed(f"the server at {self.url} went away: {error}") from error

    def chat_prompt(self, messages: Sequence[Message], documents: Sequence[Document]) -> dict[str, Any]:
        """The fields of /generate for a chat; where the model has no chat template, its words alone."""
        given = {"documents": [document.headed for document in documents]} if documents else {}
        try:
            return {**self._templated(list(messages), bool(documents)), **given}
        except CallFailed as failure:
            if failure.code != "no_chat_template":
                raise
            return {"prompt": "\n\n".join(message["content"] for message in messages), **given}

    def _templated(self, messages: list[Message], with_documents: bool) -> dict[str, Any]:
        """Token ids of a chat; with documents, those before them in the first question apart."""
        if not with_documents:
            return {"prompt": self._ids(messages)}
        first = next(index for index, message in enumerate(messages) if message["role"] == "user")
        asked = f"{LEAD}\n\n{messages[first]['content']}"
        whole = self._ids([*messages[:first], {"role": "user", "content": asked}, *messages[first + 1 :]])
        opened = [*messages[:first], {"role": "user", "content": LEAD}]
        head = self._ids(opened, continue_final_message=True)
        shared = next((at for at, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1]), len(head))
        return {"document_prefix": whole[:shared], "prompt": whole[shared:]}

    def _ids(self, messages: list[Message], **fields: Any) -> list[int]:
        return list(self.post("/tokenize", {"messages": messages, **fields})["tokens"])

    def _open(self, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            response: HTTPResponse = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            raise _refusal(error) from error
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise CallFailed(
                f"no server answers at {self.url} ({reason}). Start one: `prerope serve`; or name another: --url."
            ) from error
        return response


def _refusal(error: urllib.error.HTTPError) -> CallFailed:
    try:
        told = json.load(error)["error"]
    except (ValueError, KeyError, TypeError):
        return CallFailed(f"the server answered {error.code} {error.reason}")
    hint = " Give it with --key or PREROPE_API_KEY." if error.code == 401 else ""
    return CallFailed(f"{told['message']}{hint}", told.get("code"))


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise CallFailed(event["error"]["message"])
    return event
