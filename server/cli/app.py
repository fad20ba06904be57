"""The commands, their options and their help. What a command does is in the modules beside this one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from prerope.rope.spec import METHOD_NAMES
from prerope.server import version
from prerope.server.cli.chat import Chat, rope_field
from prerope.server.cli.client import CallFailed, Client
from prerope.server.cli.files import documents_of
from prerope.server.cli.methods import from_config, from_server, heading, table
from prerope.server.cli.reply import stream_reply
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="PreRoPE: long prompts, read as you choose."
)

PASSED_ON = {"ignore_unknown_options": True, "help_option_names": []}


def _method_names(incomplete: str) -> list[str]:
    return [name for name in METHOD_NAMES if name.startswith(incomplete)]


def _settings(context: typer.Context, incomplete: str) -> list[str]:
    from prerope.server.flags import completions

    return completions(context.params.get("flags") or [], incomplete)


class _Serve(TyperCommand):
    """A command whose flags are read elsewhere: what begins with a dash is completed as any other word of it."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return self.params[0].shell_complete(ctx, incomplete)


Url = Annotated[str, typer.Option(help="Of a running server.", envvar="PREROPE_URL")]
Key = Annotated[str | None, typer.Option(help="API key.", envvar="PREROPE_API_KEY", show_envvar=True)]
Method = Annotated[
    str | None,
    typer.Option(help="How positions are read, e.g. rerope:window=2048.", autocompletion=_method_names),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of each reply.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=10, help="Unset: the model's own.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
LOCAL = "http://127.0.0.1:8000"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(version())
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Of PreRoPE, and end.")
    ] = False,
) -> None:
    """Without a command: what holds for all of them."""


@app.command(cls=_Serve, context_settings=PASSED_ON, add_help_option=False)
def serve(
    context: typer.Context, flags: Annotated[list[str] | None, typer.Argument(autocompletion=_settings)] = None
) -> None:
    """Serve a model. Every setting is a flag: `prerope serve --help`."""
    from prerope.server.__main__ import main as serve_main

    serve_main(flags or [], context.command_path)


@app.command()
def chat(
    files: Annotated[list[Path] | None, typer.Argument(help="Documents: files and folders.")] = None,
    url: Url = LOCAL,
    key: Key = None,
    system: System = None,
    method: Method = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
) -> None:
    """Talk to a running server, about documents if you name some. /help lists what else may be typed."""
    Chat(Client.at(url, key), _fields(method, max_tokens, temperature), system, documents_of(files or [])).run()


@app.command()
def complete(
    files: Annotated[list[Path], typer.Argument(help="Files and folders; - is standard input.")],
    ask: Annotated[list[str] | None, typer.Option(help="A question about them; may be given several times.")] = None,
    url: Url = LOCAL,
    key: Key = None,
    system: System = None,
    method: Method = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
) -> None:
    """Answer questions about files, each of which is read once; without --ask, continue their text."""
    client, fields, documents = (
        Client.at(url, key),
        _fields(method, max_tokens, temperature),
        documents_of(files),
    )
    if not ask:
        stream_reply(client, {**fields, "prompt": "".join(document.text for document in documents)})
    for question in ask or ():
        first = [{"role": "system", "content": system}] if system else []
        prompt = client.chat_prompt([*first, {"role": "user", "content": question}], documents)
        stream_reply(client, {**fields, **prompt})


@app.command()
def methods(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub id or .gguf file, or `embedded`; without it the server's model.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens to be read; as far as is meant if unset.")
    ] = None,
    url: Url = LOCAL,
    key: Key = None,
) -> None:
    """Which position methods a model takes, and what they come to."""
    told = from_server(Client.at(url, key)) if model is None else from_config(model, max_model_len)
    console = Console(highlight=False)
    console.print(escape(heading(told)), soft_wrap=True)
    console.print(table(told))


def _fields(method: str | None, max_tokens: int, temperature: float | None) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_tokens": max_tokens}
    if temperature is not None:
        chosen["temperature"] = temperature
    return chosen | ({"rope": rope_field(method)} if method else {})


def main() -> None:
    """The console script. What fails is told in one line."""
    from prerope.server.errors import ConfigurationError

    try:
        app()
    except (CallFailed, ConfigurationError) as error:
        print(f"prerope: {error}", file=sys.stderr)
        sys.exit(1)
