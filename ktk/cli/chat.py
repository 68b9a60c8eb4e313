"""``ktk chat``: a conversation in the terminal."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from ktk.cli import opening
from ktk.cli.run import interrupting, speeds
from ktk.paths import user_path

if TYPE_CHECKING:
    from ktk.generate.open import OpenModel
    from ktk.generate.session import Session

HELP = """/help             this list
/quit             leave; so does Ctrl-D
/clear            forget the conversation, not the system message
/history          show the conversation
/info             the model, what runs it, its memory
/retry            another answer to the last question
/system [TEXT]    show or set the system message; begins a new conversation
/save FILE        write the conversation as JSON
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""
EPILOG = """Examples:

  ktk chat Qwen3-30B-A3B-int4

  ktk chat model.gguf --system "Answer in one sentence." --temperature 0.7
"""


def command(
    call: typer.Context,
    model: opening.Model,
    max_tokens: opening.MaxTokens = opening.ANSWER_TOKENS,
    temperature: opening.Temperature = None,
    top_p: opening.TopP = None,
    top_k: opening.TopK = None,
    seed: opening.Seed = None,
    stop: opening.Stop = None,
    system: opening.System = None,
    method: opening.Method = "auto",
    weight_format: opening.WeightFormat = "auto",
    linear: opening.Linear = "file",
    dtype: opening.Dtype = None,
    adapter: opening.Adapter = None,
    force: opening.Force = False,
    expert_memory: opening.ExpertLimit = None,
    residency_policy: opening.Policy = None,
    gpu_experts: opening.GpuExperts = None,
    placement: opening.Placement = None,
    device: opening.Device = None,
    max_deferred_experts: opening.Deferred = 0,
    kv_dtype: opening.KvDtype = None,
    kv_disk: opening.KvDisk = None,
    kv_disk_limit: opening.KvDiskLimit = None,
    prompt_lookup: opening.PromptLookup = 8,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    opened, session = opening.session_of(call)
    if not opened.tokenizer.chat_template:
        raise ValueError(
            f"{model} has no chat template, so it was made to continue text: use ktk run {model} "
            "PROMPT"
        )
    chat = Chat(opened, session, system)
    chat.options = {
        "sampling": opening.sampling_of(opened.model, temperature, top_p, top_k, seed),
        "max_tokens": max_tokens or None,
        "stop": stop or (),
    }
    if sys.stdin.isatty():
        typer.echo(f"{opened.name}, {opened.description.kernel}. /help lists commands.", err=True)
    read = _reader()
    while True:
        try:
            line = read()
        except KeyboardInterrupt:  # at the prompt: drop the line
            continue
        except EOFError:
            return
        if not chat.take(line):
            return


def _reader() -> Callable[[], str]:
    """Reads what a person types, several lines if they end in a backslash; EOFError at the end."""
    if sys.stdin.isatty():
        from prompt_toolkit import PromptSession

        ask: Any = PromptSession().prompt
    else:

        def ask(prompt: str) -> str:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")

    def read() -> str:
        lines = [ask("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(ask(". "))
        return "\n".join(lines)

    return read


class Chat:
    """A conversation: its messages, and what the lines typed into it do."""

    def __init__(self, opened: OpenModel, session: Session, system: str | None) -> None:
        self.opened, self.session = opened, session
        self.messages: list[dict[str, str]] = []
        self.options: dict[str, Any] = {}
        self._set_system(system)

    def take(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self.messages.append({"role": "user", "content": line})
            self._answer()
            return True
        name, _, rest = text.partition(" ")
        if name == "/quit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: typer.echo(HELP),
            "/clear": self._clear,
            "/history": self._history,
            "/info": self._info,
            "/retry": self._retry,
            "/system": self._system,
            "/save": self._save,
        }
        if name not in commands:
            typer.echo(f"{name} is unknown: /help lists the commands", err=True)
        else:
            commands[name](rest.strip())
        return True

    def _answer(self) -> None:
        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        before = signal.signal(signal.SIGINT, interrupting(self.session))
        try:
            ids = self.session.encode_chat(self.messages)
            made = self.session.generate(ids, show=show, **self.options)
        except (
            ValueError
        ) as error:  # too long, or refused by the template: the chat goes on without it
            self.messages.pop()
            typer.echo(f"ktk: {error}", err=True)
            return
        finally:
            signal.signal(signal.SIGINT, before)
        show("\n")
        typer.echo(speeds(made, self.options.get("max_tokens") or 0), err=True)
        if (report := self.opened.residency()) is not None:
            typer.echo(f"[experts so far: {report.use()}]", err=True)
        self.messages.append({"role": "assistant", "content": made.text})
        self.session.save()

    def _set_system(self, system: str | None) -> None:
        self.messages = [] if not system else [{"role": "system", "content": system}]

    def _clear(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _history(self, _: str) -> None:
        for message in self.messages:
            typer.echo(f"{message['role']}: {message['content']}")

    def _info(self, _: str) -> None:
        from rich.console import Console

        Console(highlight=False).print(opening.description_table(self.opened.description))

    def _retry(self, _: str) -> None:
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            typer.echo("there is no question to answer again", err=True)
            return
        self._answer()

    def _system(self, text: str) -> None:
        if text:
            self._set_system(text)
            return
        own = [m["content"] for m in self.messages if m["role"] == "system"]
        typer.echo(own[0] if own else "no system message")

    def _save(self, name: str) -> None:
        if not name:
            typer.echo("/save needs a file name", err=True)
            return
        try:
            user_path(name).write_text(
                json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
            )
        except OSError as error:
            typer.echo(f"{name}: {error.strerror}", err=True)
        except ValueError as error:  # ~nobody
            typer.echo(str(error), err=True)
        else:
            typer.echo(f"{len(self.messages)} messages written to {name}", err=True)
