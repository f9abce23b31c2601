"""`perfit chat`: a talk at the terminal, or with what is piped in."""

from __future__ import annotations

import contextlib
import json as json_format
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.common import (
    FrequencyPenaltyOption,
    JsonFlag,
    PresencePenaltyOption,
    ProfileOption,
    Session,
    say,
    show,
)
from perfit_device.cli.lines import Interrupted, read_message
from perfit_shared.errors import InvalidInput, PerfitError
from perfit_shared.terminal import clean
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from perfit_device.answers import Answer
    from perfit_device.operations.complete import AnswerSettings, Completion
    from perfit_device.operations.operation import Event, Performer
    from perfit_device.talk import Talk

__all__ = ["chat"]

_HELP = """\
/undo            take your last message and its answer back
/retry           another answer to your last message
/keep [TEXT]     the last answer becomes an example, in your own words where you give some
/mode MODE       base, collective or personal
/system [TEXT]   what the model is told first; without a text, nothing
/save FILE       the talk as JSON, which `perfit history import` reads
/quit            as Ctrl-D does
A line that ends in \\ goes on in the next one; \"\"\" begins and ends several lines.
A message that begins with / is written with // in front. Ctrl-C stops an answer."""


def chat(
    context: typer.Context,
    *,
    mode: Annotated[Mode, typer.Option("--mode", help="Whose model answers.")] = Mode.PERSONAL,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.  [default: the task's]")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.1,
    top_p: Annotated[float, typer.Option("--top-p", help="1 is all tokens.")] = 0.9,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Same seed, same answers.  [default: random]")
    ] = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    presence_penalty: PresencePenaltyOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Talk with your model; /help shows what can be typed.

    The talk is forgotten at its end, but for its last answer (see `perfit log`).

    \b
    perfit chat
    perfit chat --mode base --system "You answer in one sentence."
    printf 'Hello!\\nAnd in French?\\n' | perfit chat --temperature 0
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.complete import AnswerSettings
    from perfit_device.talk import Talk

    settings = AnswerSettings(
        max_tokens,
        temperature,
        0,
        top_p,
        seed,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
    )
    with session.performer() as performer, _ctrl_c():
        _Chat(session, performer, settings, mode, Talk(system)).run()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C raises Interrupted, so that it can be told from the signals that end the session."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Chat:
    session: Session
    performer: Performer
    settings: AnswerSettings
    mode: Mode
    talk: Talk
    _parts: list[str] = field(default_factory=list)  # of the answer that is coming
    _shown: set[Event] = field(default_factory=set)  # notes: once in a talk is enough

    def run(self) -> None:
        is_asked = sys.stdin.isatty()  # a person is there, so an error ends nothing
        if is_asked and not self.session.json:
            say("/help shows what can be typed, Ctrl-D ends")
        while (text := read_message()) is not None:
            try:
                if not self._take(text):
                    return
            except PerfitError as error:
                if not is_asked:
                    raise
                say(f"perfit: {error}")

    def _take(self, text: str) -> bool:
        """One message or command; False at the end."""
        if not text.strip():
            return True
        if not text.startswith("/") or text.startswith("//"):
            self.talk.ask(text.removeprefix("/"))
            self._answer()
            return True
        name, _, rest = text[1:].partition(" ")
        if name == "quit":
            return False
        commands = {
            "help": lambda _: say(_HELP),
            "undo": self._undo,
            "retry": self._retry,
            "keep": self._keep,
            "mode": self._set_mode,
            "system": self._set_system,
            "save": self._save,
        }
        if name not in commands:
            raise InvalidInput(f'there is no "/{name[:32]}"; /help shows what there is, // begins a message')
        commands[name](rest.strip())
        return True

    def _answer(self) -> None:
        """The answer to the last message; what Ctrl-C leaves of it counts as all of it."""
        from perfit_device.cli.learning import record
        from perfit_device.operations.complete import Complete

        self._parts = []
        done: Completion | None = None
        try:
            asked = Complete(messages=self.talk.messages(), model=self.mode.value, settings=self.settings)
            done = self.performer.perform(asked, self._show)
        except Interrupted:
            pass
        finally:
            self.talk.answer("".join(self._parts) if done is None else done.text)
            if self._parts and not self.session.json:
                print(flush=True)
        if done is None:
            say("stopped")
        elif done.dropped:
            say(f"the talk is long: its {done.dropped} oldest turns were left out")
        if self.session.json:
            text = "".join(self._parts) if done is None else done.text
            self.session.emit({"answer": text, "finish": done.finish.value if done else "stopped"})
        if self.talk.turns and self.talk.turns[-1].role == "assistant":
            record(self.performer, self._last(done.task if done else "chat"))

    def _show(self, event: Event) -> None:
        from perfit_device.operations.complete import AnswerChunk

        if not isinstance(event, AnswerChunk):
            if event not in self._shown:
                show(event)
            self._shown.add(event)
            return
        self._parts.append(event.text)
        if not self.session.json:
            print(clean(event.text), end="", flush=True)

    def _last(self, task: str = "chat", text: str = "") -> Answer:
        from perfit_device.answers import Answer

        messages, answer = self.talk.last_answer()
        return Answer(text or answer, task or "chat", self.mode.value, messages=messages)

    # -- commands ------------------------------------------------------------------------------

    def _undo(self, _rest: str) -> None:
        self.talk.undo()
        say("taken back")

    def _retry(self, _rest: str) -> None:
        if not self.talk.turns:
            raise InvalidInput("there is nothing to ask again")
        self.talk.ask(self.talk.undo())
        self._answer()

    def _keep(self, text: str) -> None:
        from dataclasses import replace

        from perfit_device.cli.learning import say_learned
        from perfit_device.operations.feedback import Keep

        learned = self.performer.perform(Keep(self._last(text=text)))
        say_learned(replace(self.session, json=False), learned)

    def _set_mode(self, name: str) -> None:
        if name not in list(Mode):
            raise InvalidInput(f"the {self.mode} model answers; a mode is {', '.join(Mode)}")
        self.mode = Mode(name)
        say(f"the {name} model answers from now on")

    def _set_system(self, text: str) -> None:
        self.talk.system = text
        say("the model is told this first" if text else "the model is told nothing first")

    def _save(self, name: str) -> None:
        """A new file, which nobody else can read."""
        if not name:
            raise InvalidInput("say where: /save talk.json")
        messages = [{"role": m.role, "content": m.content} for m in self.talk.messages()]
        path = Path(name).expanduser()
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(json_format.dumps({"messages": messages}) + "\n")
        except OSError as error:
            raise InvalidInput(f"{name[:64]} cannot be written: {error.strerror}") from error
        say(f"saved {len(messages)} turns to {name}")
