"""`prerope` on the command line, against a running server: what is written where, and what is asked of the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from prerope.rope.spec import METHOD_NAMES
from prerope.server import version
from prerope.server.cli import app as commands
from prerope.server.cli.chat import rope_field
from prerope.server.cli.client import CallFailed, Client, Document
from prerope.server.cli.files import documents_of
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parent.parent.parent
FIXED = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(
        serve_module(model_id=str(tiny_checkpoint), max_model_len=4096, kv_cache_memory="64MiB", api_key="secret")
    )


def run(*arguments: str, key: str = "secret", given: str | None = None) -> Result:
    environment = {"PREROPE_API_KEY": key, "COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(commands.app, arguments, input=given, env=environment)


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(url + path, json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
    return dict(reply.raise_for_status().json())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts, and three files that are none or hidden."""
    for name, text in {"b/two.md": "The roof is blue. " * 40, "one.txt": "The door is red. " * 40}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, data in {".hidden": b"x", "picture.png": b"\x89PNG\0", "empty": b""}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_questions_about_a_folder_go_through_the_chat_template_and_read_each_file_once(url: str, folder: Path) -> None:
    done = run("complete", str(folder), "--ask", "Which colour?", "--ask", "And the other?", "--url", url, *FIXED)
    assert done.exit_code == 0, done.output
    client, documents = Client(url, "secret"), documents_of([folder])
    assert [document.name for document in documents] == ["b/two.md", "one.txt"]
    replies = []
    for question in ("Which colour?", "And the other?"):
        prompt = client.chat_prompt([{"role": "user", "content": question}], documents)
        whole = post(url, "/detokenize", tokens=prompt["document_prefix"] + prompt["prompt"])["prompt"]
        asked = post(url, "/tokenize", messages=[{"role": "user", "content": f"Documents:\n\n{question}"}])["tokens"]
        assert whole == post(url, "/detokenize", tokens=asked)["prompt"]
        replies.append(post(url, "/generate", **prompt, temperature=0, max_tokens=8)["text"])
    assert done.stdout == "".join(f"{reply}\n" for reply in replies), "standard output is the replies alone"
    assert "" not in done.stderr.splitlines(), "a bar that nobody watches leaves no lines"
    first, second = [line for line in done.stderr.splitlines() if "tokens read" in line]
    assert "8 written" in first
    cached = [int(line.split("(")[1].split()[0].replace(",", "")) for line in (first, second)]
    assert cached[0] < 100 < 300 < cached[1], "the second question found the files"


def test_without_a_question_text_is_continued(url: str) -> None:
    """By the address that OpenAI's clients are given."""
    done = run(
        "complete",
        "-",
        "--url",
        f"{url.removeprefix('http://')}/v1/",
        "--method",
        "rerope:window=64",
        *FIXED,
        given="Once upon a time",
    )
    rope = {"method": "rerope", "window": 64}
    expected = post(url, "/generate", prompt="Once upon a time", temperature=0, max_tokens=8, rope=rope)
    assert done.stdout == expected["text"] + "\n"
    assert "rerope" in done.stderr


def test_a_chat_from_a_pipe_remembers(url: str) -> None:
    lines = "First\n/method rerope\nSecond\n/help\n/new\nFirst\n/quit\nnever\n"
    done = run("chat", "--url", url, "--system", "Be brief.", *FIXED, given=lines)
    assert done.exit_code == 0, done.output
    said: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    expected = []
    for question, rope in (("First", None), ("Second", {"method": "rerope"})):
        said.append({"role": "user", "content": question})
        ids = post(url, "/tokenize", messages=said)["tokens"]
        fields = {"rope": rope} if rope else {}
        said.append(
            {
                "role": "assistant",
                "content": post(url, "/generate", prompt=ids, temperature=0, max_tokens=8, **fields)["text"],
            }
        )
        expected.append(said[-1]["content"])
    assert done.stdout.startswith("".join(f"{reply}\n" for reply in expected))
    assert done.stdout.count("\n") >= 3
    assert "/add PATH" in done.stderr


def test_methods_of_a_server_and_of_a_config_agree(url: str, tiny_checkpoint: Path) -> None:
    asked = run("methods", "--url", url).stdout
    read = run("methods", str(tiny_checkpoint), "--max-model-len", "4096").stdout
    assert asked == read
    assert "trained at 256 tokens, read to 4,096" in asked
    assert "is read by dynamic_leaky" in asked
    for name in METHOD_NAMES:
        assert f"│ {name} " in asked
    assert asked.count("not for this model") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("complete", "nowhere.txt", "--ask", "x"), "nowhere.txt cannot be read: No such file or directory"),
        (("complete", __file__, "--ask", "x", "--method", "ropes"), "'ropes' is no position method"),
        (("methods", "--url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("methods", "--key", "wrong"), "The API key is wrong"),
        (("methods", "./nowhere"), "MODEL_ID=./nowhere does not exist"),
    ],
)
def test_what_fails_is_told_in_one_line(
    url: str, arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    where = () if "--url" in arguments else ("--url", url)
    monkeypatch.setattr(sys, "argv", ["prerope", *arguments, *where])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prerope: ")
    assert said in line


def test_a_prompt_without_a_template_is_its_words(url: str) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise CallFailed("none", "no_chat_template")

    client = Client(url, "secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "post", refuse)
        prompt = client.chat_prompt([{"role": "user", "content": "Hi"}], [Document("a", "text")])
    assert prompt == {"prompt": "Hi", "documents": ["\n\n# a\n\ntext"]}


def test_a_method_is_written_as_elsewhere() -> None:
    assert rope_field("streaming:sinks=0:logn") == {"method": "streaming", "sinks": 0, "logn": True}
    assert rope_field("dpe:groups=2-8:window=9") == {"method": "dpe", "groups": (2, 8), "window": 9}


def test_the_module_and_the_completion_start_quickly() -> None:
    """Neither torch nor transformers is imported to talk to a server; a shell completes methods by name."""
    source = (
        "import sys; from prerope.server.cli.app import app, _method_names;"
        "print(_method_names('dyn')); print(sorted({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    names, heavy = done.stdout.splitlines()
    assert json.loads(names.replace("'", '"')) == [
        *("dynamic_linear", "dynamic_ntk", "dynamic_yarn", "dynamic_leaky", "dynamic_rerope")
    ]
    assert heavy == "[]"
    help_text = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--max-model-len" in help_text
    told = CliRunner().invoke(commands.app, ["--version"])
    assert (told.exit_code, told.output.strip()) == (0, version())


COMPLETIONS = [
    (["serve", "--rope-m"], ["--rope-method"]),
    (["serve", "--rope-method", "rer"], ["rerope"]),
    (["serve", "--generation-config", ""], ["auto", "none"]),
    (["serve", "--port", "1", "--strict-fields", "f"], ["false"]),
    (["serve", "--model-id", ""], []),
    (["serve", "--strict-fields", "--max-model"], ["--max-model-len"]),
    (["chat", "--method", "rer"], ["rerope"]),
    (["complete", "--as"], ["--ask"]),
]


@pytest.mark.parametrize(("words", "offered"), COMPLETIONS, ids=lambda case: "-".join(case))
def test_a_shell_completes_flags_and_the_words_they_take(words: list[str], offered: list[str]) -> None:
    line = {"COMP_WORDS": " ".join(["prerope", *words]), "COMP_CWORD": str(len(words))}
    told = CliRunner().invoke(
        commands.app, env={"_PREROPE_COMPLETE": "complete_bash", **line}, prog_name="prerope", args=[]
    )
    assert told.output.split() == offered


def test_what_follows_serve_reaches_the_server_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []
    monkeypatch.setattr("prerope.server.__main__.main", lambda arguments, _: taken.append(arguments))
    given = ["--port", "1", "--strict-fields", "--api-key", "", "--model-id=a b", "x"]
    for words in (given, []):
        assert CliRunner().invoke(commands.app, ["serve", *words]).exit_code == 0
    assert taken == [given, []]
