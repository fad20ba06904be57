"""Every error a user can meet, with its HTTP status. A leaf: imports nothing of ours.

    PreRopeError
    ├── ConfigurationError      a setting or a model that cannot be served: the start stops
    ├── OutOfMemory             the engine's, while loading or in a step: the process ends
    ├── RankLost                a process that computes a share of the model has ended: so does this one
    └── RequestError            one request is refused or fails; the server goes on
        ├── InvalidRequest      400
        ├── Unauthorized        401
        ├── ModelNotFound       404
        ├── NotKept             404
        ├── BodyTimeout         408: the rest of the body did not come
        ├── BodyTooLarge        413
        ├── HeaderTooLarge      431
        ├── QueueFull           429, with Retry-After
        │   └── KeyBusy         429: one key has as many sequences as it may
        ├── ClientGone          499: nobody is left to read the reply
        ├── EngineUnavailable   503: loading, draining or dead
        ├── DeadlineExceeded    504: the request's time was over
        ├── EngineFailure       500: the step that served this request failed
        └── VersionNotSupported 505: of HTTP

A message names the thing, the limit, the value given and the remedy, and never a path or a prompt.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar

NO_MEMORY = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory", re.IGNORECASE)
"""In what torch, safetensors and the system say where there is none."""

OF_SYSTEM = re.compile(r"\(os error (\d+)\)")
"""How packages written in Rust name the system's error within their own."""

OF_PYTHON = re.compile("invalid literal|dictionary update|not enough|too many|list index")
"""How messages begin that are about code and not about what it was given."""

TO_PEOPLE = (OSError, ValueError, RuntimeError, ImportError, AssertionError)
TO_PROGRAMMERS = (UnicodeError, RecursionError, NotImplementedError)
"""Kinds of errors, by those whom the messages speak to."""


class PreRopeError(Exception):
    """Root of the tree."""


class ConfigurationError(PreRopeError):
    """The deployment cannot work as configured; the message says which setting or model, and what is allowed.

    It is one line of what can be printed, whatever a model's files put into it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class OutOfMemory(PreRopeError):
    """The engine could not allocate what it needed; the message says which settings need less."""


class RankLost(PreRopeError):
    """One of the processes that compute the model together has ended; the message says which, and how."""


class RequestError(PreRopeError):
    """One request is refused. `param` names the request's field, `code` is a machine-readable reason."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A bad value, or a prompt that does not fit."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(RequestError):
    """A missing or wrong API key."""

    status = 401
    type = "authentication_error"


class ModelNotFound(RequestError):
    """The `model` field names a model that this server does not serve."""

    status = 404
    type = "not_found_error"


class NotKept(RequestError):
    """A response that is asked for by its id is not in memory."""

    status = 404
    type = "not_found_error"


class WrongHost(RequestError):
    """The Host header names another server: a page elsewhere may have had its name resolve to this address."""

    status = 421
    type = "invalid_request_error"


class BodyTimeout(RequestError):
    """The client began a body and sent no more of it, or too slowly."""

    status = 408
    type = "timeout_error"


class BodyTooLarge(RequestError):
    """The request body exceeds the limit in bytes."""

    status = 413
    type = "invalid_request_error"


class HeaderTooLarge(RequestError):
    """The request line and headers exceed the limit in bytes."""

    status = 431
    type = "invalid_request_error"


class UnsupportedEncoding(RequestError):
    """The body is compressed."""

    status = 415
    type = "invalid_request_error"


class QueueFull(RequestError):
    """Too many waiting requests or waiting tokens; try again after `retry_after_s` seconds."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int, code: str = "queue_full") -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class KeyBusy(QueueFull):
    """One API key has as many sequences at once as it may."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s=retry_after_s, code="key_busy")


class ClientGone(RequestError):
    """The client closed the connection before its reply was complete, or stopped reading it."""

    status = 499
    type = "client_closed_request"


class EngineUnavailable(RequestError):
    """The engine is loading, draining or dead."""

    status = 503
    type = "service_unavailable_error"


class ServerFull(RequestError):
    """All connections that the server takes are in use."""

    status = 503
    type = "service_unavailable_error"


class BodiesFull(RequestError):
    """The bodies that are being read take all the memory that there is for them."""

    status = 503
    type = "service_unavailable_error"


class DeadlineExceeded(RequestError):
    """`timeout_s` or REQUEST_TIMEOUT_S was over before the first token. Later a reply ends with `abort`, or with
    this error where its dialect has no such word."""

    status = 504
    type = "timeout_error"


class VersionNotSupported(RequestError):
    """The request line names a version of HTTP that is not spoken here."""

    status = 505
    type = "invalid_request_error"


TOO_LONG = "context_length_exceeded"
"""The code of a refusal for want of room in the model's length."""


class EngineFailure(RequestError):
    """The engine failed while it served this request."""


def of_memory(error: BaseException) -> bool:
    """Whether it tells of memory that ran out. torch's allocator for the CPU raises a RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, for the GPU
    return named or bool(NO_MEMORY.search(str(error)))


def explained(failure: BaseException) -> BaseException:
    """Want of memory by its name and with its remedy; anything else as it is."""
    if not of_memory(failure):
        return failure
    explained = OutOfMemory(
        "the engine ran out of memory: lower KV_CACHE_MEMORY (on a GPU GPU_MEMORY_UTILIZATION), MAX_BATCHED_TOKENS or "
        "MAX_NUM_SEQS, "
        "or serve a smaller model"
    )
    explained.__cause__ = failure
    return explained


def engine_failure(failure: BaseException) -> EngineFailure:
    """What open requests are told of what has ended the engine."""
    reason, code = "stopped after an error", "engine_dead"
    if isinstance(failure, OutOfMemory):
        reason, code = "ran out of memory and stopped", "out_of_memory"
    if isinstance(failure, RankLost):
        reason, code = "lost one of the processes that compute the model, and stopped", "rank_lost"
    return EngineFailure(f"the engine {reason}; the server needs a restart", code=code)


def of_system(error: BaseException) -> OSError | None:
    """The system's error that it tells of, such as that of a full disk; None where it tells of something else."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    named = OF_SYSTEM.search(str(error))
    return None if named is None else OSError(int(named[1]), os.strerror(int(named[1])))


def one_line(text: str) -> str:
    """With control characters, line breaks of any kind and what else does not print written as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def first_line(error: BaseException, limit: int = 300) -> str:
    """What a library says of an error, in one line: its first, or its first two where that one ends in a colon."""
    lines = str(error).strip().splitlines()
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return " ".join(said.split()).rstrip(".:")[:limit]


def words_of(error: BaseException, limit: int = 300) -> str:
    """`first_line` where it is written for people; empty where it is about the library's code, like a KeyError's."""
    text = first_line(error, limit)
    to_people = isinstance(error, TO_PEOPLE) or type(error) is Exception
    return text if to_people and not isinstance(error, TO_PROGRAMMERS) and not OF_PYTHON.match(text) else ""
