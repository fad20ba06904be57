"""Agent libraries on their default paths, unmodified, against the embedded model, whose chat template knows no tools.

`pip install '.[clients]'` brings them; without them this module is skipped. openai's own client is in tests/server.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

langchain = pytest.importorskip("langchain_openai")
litellm = pytest.importorskip("litellm")
instructor = pytest.importorskip("instructor")
pytest.importorskip("pydantic_ai")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

MODEL = "SmolLM2-135M-Instruct"


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def base(serve_module: Any) -> str:
    return f"{serve_module(max_model_len=4096, kv_cache_memory='256MiB')}/v1"


def test_langchain_binds_tools_and_structures_output(base: str) -> None:
    model = langchain.ChatOpenAI(base_url=base, api_key="-", model=MODEL, max_tokens=80)
    assert model.invoke("Say hi.").content
    assert "".join(chunk.content for chunk in model.stream("Say hi."))
    assert model.with_structured_output(Person).invoke("Ann is 30.")
    called = model.bind_tools([Person], tool_choice="any").invoke("Ann is 30.")
    assert [call["name"] for call in called.tool_calls] == ["Person"] * len(called.tool_calls)
    assert called.tool_calls


def test_instructor(base: str) -> None:
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=base, api_key="-"))
    messages = [{"role": "user", "content": "Jason is 25 years old."}]
    person = client.chat.completions.create(model=MODEL, response_model=Person, messages=messages, max_tokens=120)
    assert isinstance(person, Person)


def test_pydantic_ai_with_its_default_output(base: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=base, api_key="-"))
    agent = Agent(model, output_type=Person, model_settings={"max_tokens": 150})
    assert isinstance(agent.run_sync("Ann is 30.").output, Person)


def test_litellm_takes_its_own_message_back(base: str) -> None:
    tools = [{"type": "function", "function": {"name": "person", "parameters": Person.model_json_schema()}}]
    options: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": base, "api_key": "-", "tools": tools}
    messages: list[Any] = [{"role": "user", "content": "Ann is 30."}]
    message = litellm.completion(messages=messages, tool_choice="required", max_tokens=80, **options).choices[0].message
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls]
    assert litellm.completion(messages=[*messages, message, *answers], max_tokens=8, **options).choices
