"""Clients of the server that a module of tests starts as its `url`."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
