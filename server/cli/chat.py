"""`prerope chat`: a conversation in a terminal, or with a pipe a question a line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prerope.rope.spec import RopeSpec
from prerope.server.cli.client import CallFailed, Client, Document, Message
from prerope.server.cli.files import documents_of
from prerope.server.cli.reply import aside, stream_reply

HELP = """/add PATH     read a file or a folder as documents      /method NAME[:parameter=value]  how positions are read
/system TEXT  the system prompt                        /new   begin anew, documents kept
/help         this                                     /quit  or Ctrl-D"""


def rope_field(text: str) -> dict[str, Any]:
    """`rerope:window=2048` as the field `rope` of a request. Raises CallFailed."""
    try:
        spec = RopeSpec.parse(text)
    except ValueError as error:
        raise CallFailed(str(error)) from error
    given = {name: getattr(spec, name) for name in RopeSpec.__slots__}
    return {name: value for name, value in given.items() if value is not None and value is not False}


@dataclass(slots=True)
class Chat:
    """What has been said, and how replies are asked for.

    Attributes:
        fields: of /generate, beside the prompt.
    """

    client: Client
    fields: dict[str, Any]
    system: str | None = None
    documents: list[Document] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Answer a question; where that fails it was not asked."""
        messages = [*self.said, {"role": "user", "content": question}]
        first = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.client.chat_prompt([*first, *messages], self.documents)
        reply = stream_reply(self.client, {**self.fields, **prompt})
        self.said = [*messages, {"role": "assistant", "content": reply}]

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash asks; False ends the conversation."""
        name, _, given = line[1:].partition(" ")
        match name:
            case "quit" | "exit":
                return False
            case "new":
                self.said.clear()
            case "system":
                self.system = given or None
            case "method":
                self.fields["rope"] = rope_field(given)
            case "add":
                added = documents_of([Path(given).expanduser()])
                self.documents += added
                aside.print(
                    f"{len(added)} document{'s'[: len(added) != 1]} added, {len(self.documents)} in all", style="dim"
                )
            case _:
                aside.print(HELP)
        return True

    def run(self) -> None:
        """Chat until the input ends."""
        typed = sys.stdin.isatty()
        while True:
            try:
                line = (aside.input("[bold]› [/bold]") if typed else next(sys.stdin)).strip()
            except (EOFError, StopIteration):
                return
            except KeyboardInterrupt:
                aside.print()
                return
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.ask(line)
            except CallFailed as failure:
                if not typed:
                    raise
                aside.print(str(failure), style="red", markup=False)
