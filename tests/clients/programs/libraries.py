"""Agent libraries and clients on their default paths, as their documentation has them: python libraries.py NAME."""

import json
import os
import sys

from pydantic import BaseModel

URL = os.environ["URL"]
BASE, MODEL = f"{URL}/v1", "SmolLM2-135M-Instruct"
ASKED = [{"role": "user", "content": "Say hi."}]


class Person(BaseModel):
    name: str
    age: int


def openai():
    from openai import OpenAI

    client = OpenAI(base_url=BASE, api_key="-")
    reply = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=12)
    stream = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Ann is 30."}], response_format=Person, max_tokens=80
    )
    assert reply.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens
    assert isinstance(parsed.choices[0].message.parsed, Person)
    assert client.responses.create(model=MODEL, input="Say hi.", max_output_tokens=16).output_text


def langchain():
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=BASE, api_key="-", model=MODEL, max_tokens=80)
    assert model.invoke("Say hi.").content
    assert "".join(chunk.content for chunk in model.stream("Say hi."))
    assert isinstance(model.with_structured_output(Person).invoke("Ann is 30."), Person)
    called = model.bind_tools([Person], tool_choice="any").invoke("Ann is 30.")
    assert called.tool_calls
    assert {call["name"] for call in called.tool_calls} == {"Person"}
    assert model.bind_tools([Person]).invoke("Say hi.")


def pydantic_ai():
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key="-"))
    agent = Agent(model, output_type=Person, model_settings={"max_tokens": 150})
    assert isinstance(agent.run_sync("Ann is 30.").output, Person)
    assert Agent(model, model_settings={"max_tokens": 20}).run_sync("Say hi.").output


def openai_agents():
    """On Responses, its default: a required tool, a pydantic model, a stream."""
    import asyncio

    from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
    from openai import AsyncOpenAI

    @function_tool
    def weather(city: str) -> str:
        """Weather of a city."""
        return f"It is sunny in {city}."

    async def run():
        set_tracing_disabled(True)
        set_default_openai_client(AsyncOpenAI(base_url=BASE, api_key="-"), use_for_tracing=False)
        few = ModelSettings(max_tokens=150)
        must = ModelSettings(max_tokens=150, tool_choice="required")
        asked = Agent(
            name="A", model=MODEL, tools=[weather], model_settings=must, tool_use_behavior="stop_on_first_tool"
        )
        assert (await Runner.run(asked, "The weather in Rome?")).final_output.startswith("It is sunny")
        typed = Agent(name="B", model=MODEL, output_type=Person, model_settings=few)
        assert isinstance((await Runner.run(typed, "Ann is 30.")).final_output, Person)
        streamed = Runner.run_streamed(typed, "Ann is 30.")
        assert [event async for event in streamed.stream_events()]

    asyncio.run(run())


def smolagents():
    from smolagents import OpenAIModel, ToolCallingAgent, tool

    @tool
    def double(x: int) -> int:
        """Doubles a number.

        Args:
            x: the number
        """
        return 2 * x

    model = OpenAIModel(model_id=MODEL, api_base=BASE, api_key="-", max_tokens=150)
    agent = ToolCallingAgent(tools=[double], model=model, max_steps=2)
    assert agent.run("Double 4.") is not None
    calls = [call.name for step in agent.memory.steps for call in getattr(step, "tool_calls", None) or []]
    assert calls
    assert set(calls) <= {"double", "final_answer"}


def huggingface_hub():
    os.environ.pop("HF_HUB_OFFLINE")
    from huggingface_hub import InferenceClient

    chat = InferenceClient(base_url=BASE, api_key="-")
    assert chat.chat_completion(messages=ASKED, max_tokens=10).choices[0].message.content
    stream = chat.chat_completion(messages=ASKED, max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    text = InferenceClient(URL)
    assert text.text_generation("A colour is", max_new_tokens=8)
    assert "".join(text.text_generation("A colour is", max_new_tokens=8, stream=True))


def anthropic():
    from anthropic import Anthropic

    client = Anthropic(base_url=URL, api_key="-")
    assert client.messages.create(model=MODEL, max_tokens=12, messages=ASKED).content[0].text
    with client.messages.stream(model=MODEL, max_tokens=12, messages=ASKED) as stream:
        assert "".join(stream.text_stream)
    assert client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens
    tool = {"name": "person", "input_schema": Person.model_json_schema()}
    called = client.messages.create(
        model=MODEL, max_tokens=100, messages=ASKED, tools=[tool], tool_choice={"type": "any"}
    )
    assert any(block.type == "tool_use" for block in called.content)
    parsed = client.messages.parse(model=MODEL, max_tokens=100, messages=ASKED, output_format=Person)
    assert isinstance(parsed.parsed_output, Person)


def ollama():
    from ollama import Client

    client, few = Client(URL), {"num_predict": 12}
    assert client.list().models
    assert client.chat(MODEL, ASKED, options=few).message.content
    assert "".join(part.message.content for part in client.chat(MODEL, ASKED, options=few, stream=True))
    assert client.generate(MODEL, "A colour is", options=few).response
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    answer = client.chat(MODEL, ASKED, format={**schema, "additionalProperties": False})
    assert json.loads(answer.message.content)["colour"] in ("red", "blue")


globals()[sys.argv[1]]()
print("answered")
