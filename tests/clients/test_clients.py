"""Clients of others, unmodified, on the embedded model, whose chat template knows no tools; see `conftest`.

`programs` has what each is asked, as its own documentation writes it. Nothing here reads replies for their sense.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from prerope.server.models.checkpoint import Checkpoint

from tests.clients.conftest import ENVIRONMENTS, HERE, Runner

pytestmark = [pytest.mark.clients, pytest.mark.slow]

PROGRAMS = HERE / "programs"
LANGUAGES = {
    "agents": [
        "openai",
        "langchain",
        "pydantic_ai",
        "openai_agents",
        "smolagents",
        "huggingface_hub",
        "anthropic",
        "ollama",
    ],
    "older-openai": ["instructor", "litellm", "llama_index"],
    "js": ["openai", "ai-sdk-openai", "ai-sdk-openai-compatible"],
}
FILES = {"agents": "libraries.py", "older-openai": "older_openai.py", "js": "node.mjs"}
CASES = [(environment, client) for environment, clients in LANGUAGES.items() for client in clients]


@pytest.mark.parametrize(("environment", "client"), CASES)
def test_a_client_is_answered(run: Runner, environment: str, client: str) -> None:
    program = "node" if environment == "js" else "python"
    assert run(environment, program, str(PROGRAMS / FILES[environment]), client).endswith("answered\n")


def test_sglangs_language(run: Runner) -> None:
    assert run("sglang", "python", str(PROGRAMS / "sglang_program.py")).endswith("answered\n")


@pytest.mark.parametrize(
    ("kind", "path", "more", "tasks"),
    [
        ("local-completions", "completions", ",tokenizer_backend=remote", "colours,continued"),
        ("local-chat-completions", "chat/completions", "", "continued"),
    ],
)
def test_lm_eval(run: Runner, url: str, tmp_path: Path, kind: str, path: str, more: str, tasks: str) -> None:
    """log-likelihoods and text, to a finished table."""
    shutil.copytree(HERE / "tasks", tmp_path / "tasks")
    questions = [{"question": f"The colour of the {thing} is"} for thing in ("sky", "sea")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    asked = f"model=any,base_url={url}/v1/{path},num_concurrent=2,max_retries=1{more}"
    chat = ["--apply_chat_template"] if "chat" in kind else []
    told = run(
        "lm-eval", "lm_eval", "--model", kind, "--model_args", asked, "--tasks", tasks, "--include_path", "tasks", *chat
    )
    rows = dict(
        re.findall(r"^\|(\w+) *\|(?:[^|]*\|){3}(?:acc|exact_match) *\|[^|]*\| *([\d.]+)\|", told, flags=re.MULTILINE)
    )
    assert rows.keys() == set(tasks.split(","))
    assert rows.get("colours", "1") == "1"


def test_guidellm_to_a_finished_table(run: Runner, url: str, smollm2: Checkpoint) -> None:
    told = run(
        "guidellm", "guidellm", "run", "--backend", f"kind=openai_http,target={url}", "--profile", "kind=synchronous",
        "--constraint", "kind=max_requests,count=2", "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8",
        "--tokenizer", f"kind=hf_auto,model={smollm2.source}", "--disable-progress",
    )  # fmt: skip
    assert re.search(r"\| synchronous \|(?:[^|]*\|){5} 2 +\| 0 +\| 0 +\|", told), told


def test_a_chat_through_vllm_router(url: str) -> None:
    program = ENVIRONMENTS / "router" / "bin" / "vllm-router"
    if not program.exists():
        pytest.skip(f"{program} is missing: make test-clients")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = free.getsockname()[1]
    command = [str(program), "--worker-urls", url, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as router:
        try:
            body = {"model": "any", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8}
            answers = [chat_when_up(f"http://127.0.0.1:{port}", body | {"stream": stream}) for stream in (False, True)]
        finally:
            router.terminate()
    assert answers[0].json()["choices"][0]["message"]["content"]
    assert answers[1].text.endswith("data: [DONE]\n\n")


def chat_when_up(address: str, body: dict[str, object]) -> httpx.Response:
    for _ in range(60):
        try:
            if (reply := httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)).status_code == 200:
                return reply
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(f"no reply from {address}")
