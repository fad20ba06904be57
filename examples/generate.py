"""Read a text file as a long prompt, and print the reply as it streams.

    pip install httpx
    python examples/generate.py book.txt --ask "What happens in the end?"
    python examples/generate.py book.txt --method rerope --window 2048

Progress and figures go to stderr, the reply to stdout. Ctrl-C closes the connection, and the server stops at once.
"""

import argparse
import json
import sys
from pathlib import Path

import httpx


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a text file, the prompt")
    parser.add_argument("--ask", default="", help="a question to put after the text")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="the server's API_KEY, if it has one")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--method", help="position method, where the server has ROPE_PER_REQUEST")
    parser.add_argument("--window", type=int, help="its window, in tokens")
    return parser.parse_args()


def body(args: argparse.Namespace) -> dict[str, object]:
    text = args.file.read_text(encoding="utf-8", errors="replace")
    fields: dict[str, object] = {
        "prompt": f"{text}\n\n{args.ask}\n" if args.ask else text,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        "return_progress": True,
    }
    if args.method:
        fields["rope"] = {"method": args.method} | ({"window": args.window} if args.window else {})
    return fields


def main() -> None:
    args = arguments()
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    timeout = httpx.Timeout(30, read=None)  # a long prompt takes its time
    with httpx.stream("POST", f"{args.url}/generate", json=body(args), headers=headers, timeout=timeout) as response:
        if response.is_error:
            response.read()
            sys.exit(f"{response.status_code}: {response.json()['error']['message']}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                show(json.loads(line.removeprefix("data: ")))


def show(event: dict) -> None:
    if "error" in event:
        sys.exit(f"\n{event['error']['message']}")
    if "progress" in event:
        progress = event["progress"]
        print(f"\rreading {progress['processed']} of {progress['total']} tokens", end="", file=sys.stderr, flush=True)
    if "text" in event:
        if event["index"] == 0:
            print(file=sys.stderr)
        print(event["text"], end="", flush=True)
    if "finish_reason" in event:
        usage, rope = event["usage"], event["rope"]
        print(f"\n\n{usage} · read as {rope['method']} · {event['finish_reason']}", file=sys.stderr)


if __name__ == "__main__":
    main()
