"""A GGUF file that transformers or the gguf package fails on, in a newcomer's words: what is wrong, and what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from prerope.server.errors import ConfigurationError, of_memory, of_system
from prerope.server.models.config.faults import own_words
from prerope.server.models.gguf.header import Header
from prerope.server.models.json_files import unreadable

log = logging.getLogger(__name__)

AGAIN = "download it again, or take the model's checkpoint in safetensors"
OF_MODEL = "what it states of its model fits none of that architecture that transformers knows"
OF_TOKENIZER = "its tokens do not fit each other (tokenizer.ggml.*), so no tokenizer can be made of them"


def refused(header: Header, reason: str) -> ConfigurationError:
    """reason: a clause with the remedy."""
    return ConfigurationError(f"{header.file.name} cannot be served: {reason}")


@contextmanager
def read_as(header: Header, fault: str, *, writes: bool = False) -> Iterator[None]:
    """Inside, whatever code of others raises is a refusal, and so is what the system says of reading the file.

    fault: what is wrong with the file where something is refused, a clause. writes: something is written inside, too:
    what the system raises there is an OSError.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # readers of a format that grows raise whatever they meet
        if of_memory(error):
            raise
        if system := of_system(error):
            if writes:
                raise system from error
            raise refused(header, unreadable(header.file.name, system)) from error
        log.debug("a GGUF file could not be read", exc_info=error)
        raise refused(header, f"{_reason(header, error, fault)}: {AGAIN}") from error


def _reason(header: Header, error: Exception, fault: str) -> str:
    said = str(error)
    if field := re.search(r"Validation error for field '(\w+)'", said):
        return f"its {field[1]} is of another kind than a model of this architecture has, such as one a layer"
    if isinstance(error, KeyError) and error.args and str(error.args[0]).startswith(f"{header.architecture}."):
        return f"it does not state {error.args[0]}, so it is damaged or incomplete"
    if token := re.search(r"Token `(.{1,40})` out of vocabulary", said):
        return f"its merges make the token '{token[1]}', which is not among its tokens"
    words = own_words(error)
    return f"{fault}{f' ({words})' if words else ''}"
