"""A chat with the server through the official OpenAI client.

    pip install openai
    python examples/openai_chat.py
    python examples/openai_chat.py --url http://host:8000/v1 --key KEY

An empty line or Ctrl-D ends it.
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="the server's API_KEY, if it has one")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.key)
    model = client.models.list().data[0].id
    messages: list = [{"role": "system", "content": "You are a helpful assistant. Answer in a few sentences."}]
    while question := ask():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(client, model, messages)})


def ask() -> str:
    try:
        return input("\nyou   > ").strip()
    except EOFError:
        return ""


def answer(client: OpenAI, model: str, messages: list) -> str:
    """Print the answer as it streams, and return it. The server's extras go into `extra_body`."""
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0.6, stream=True, extra_body={"min_p": 0.05}
    )
    print("model > ", end="", flush=True)
    text = ""
    for chunk in stream:
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    main()
