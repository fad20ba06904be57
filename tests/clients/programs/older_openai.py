"""The same of libraries that want an older `openai`: python older_openai.py NAME."""

import os
import sys

from pydantic import BaseModel

BASE, MODEL = f"{os.environ['URL']}/v1", "SmolLM2-135M-Instruct"


class Person(BaseModel):
    name: str
    age: int


def instructor():
    import instructor
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="-"))
    messages = [{"role": "user", "content": "Jason is 25 years old."}]
    person = client.chat.completions.create(model=MODEL, response_model=Person, messages=messages, max_tokens=120)
    assert isinstance(person, Person)


def litellm():
    """A message with calls goes back as it came."""
    import litellm

    tools = [{"type": "function", "function": {"name": "person", "parameters": Person.model_json_schema()}}]
    options = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": "-"}
    messages = [{"role": "user", "content": "Ann is 30."}]
    message = litellm.completion(messages=messages, tools=tools, tool_choice="required", max_tokens=80, **options)
    message = message.choices[0].message
    assert message.tool_calls
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls]
    assert litellm.completion(messages=[*messages, message, *answers], tools=tools, max_tokens=8, **options).choices
    stream = litellm.completion(
        messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}, **options
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def llama_index():
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=MODEL, api_base=BASE, api_key="-", is_chat_model=True, is_function_calling_model=True, max_tokens=80
    )
    assert str(model.complete("Say hi."))
    assert "".join(part.delta or "" for part in model.stream_complete("Say hi."))

    def person(name: str, age: int) -> str:
        """Keeps a person."""
        return f"{name} {age}"

    tool = FunctionTool.from_defaults(fn=person)
    assert model.chat_with_tools([tool], user_msg="Ann is 30.", tool_required=True).message.additional_kwargs


globals()[sys.argv[1]]()
print("answered")
