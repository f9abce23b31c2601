"""`perfit ask`: an answer, streamed as it comes."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import (
    FieldsOption,
    FrequencyPenaltyOption,
    JsonFlag,
    PresencePenaltyOption,
    ProfileOption,
    Session,
    TaskOption,
    fields_of,
    show,
)
from perfit_device.cli.learning import record, say_learned
from perfit_shared.errors import InvalidInput
from perfit_shared.terminal import clean, read_stdin
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from perfit_device.answers import Message
    from perfit_device.operations.operation import Event

_LARGEST_TEXT = 1 << 22  # bytes of a text on stdin


def ask(
    context: typer.Context,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help='What to ask about; what is piped in follows. "-": stdin.'),
    ] = None,
    *,
    task: TaskOption = None,
    field: FieldsOption = None,
    mode: Annotated[Mode, typer.Option("--mode", help="Whose model answers.")] = Mode.PERSONAL,
    compare: Annotated[
        bool, typer.Option("--compare", help="Base, collective and personal answers.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.  [default: the task's]")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.1,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is all tokens.")] = 10,
    top_p: Annotated[float, typer.Option("--top-p", help="1 is all tokens.")] = 0.9,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Same seed, same answer.  [default: random]")
    ] = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    presence_penalty: PresencePenaltyOption = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            min=0,
            help="Own examples before the question, those nearest to it.  [default: as many as your shift "
            "was trained behind, 4 in tasks whose answers are one line, else 0]",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="The answer becomes an example at once.")] = False,
    log: Annotated[bool, typer.Option("--log", help="Log the answer, even where the log is off.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="With --json, a line for each piece as it comes, then the whole.")
    ] = False,
) -> None:
    """Ask the cloud, in your own way.

    \b
    perfit ask "The council met until dawn over the stadium's debt."
    perfit ask The council met until dawn       words need no quotes
    perfit ask "The council met until dawn." --compare --temperature 0
    perfit ask --task reply "Are we still on for Friday?"
    perfit ask --task chat "What should I cook with leeks?"
    perfit ask --task tickets "The page stays white." --field product=Web    a task of two fields
    echo "The council met until dawn." | perfit ask --json
    perfit ask "The council met until dawn." --json --stream
    cat minutes.txt | perfit ask "Of last week's meeting:"
    perfit ask "The council met until dawn." --keep     learn from this answer
    perfit ask "The council met until dawn." --examples 4    with what you wrote of the like
    perfit ask -- "-5 degrees on Monday"       a text that begins with a dash
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.answers import Answer
    from perfit_device.operations.ask import Ask, Question
    from perfit_device.operations.feedback import Keep

    if keep and compare:
        raise InvalidInput("--keep keeps one answer; leave it or --compare out")
    question = Question(
        text=_text_of(context, text or []),
        task=task,
        fields=fields_of(field),
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        examples=examples,
    )
    printed = _Printed(titles=compare)
    asking = Ask(question, tuple(Mode) if compare else (mode,))
    learned = None
    with session.performer() as performer:
        pieces = (lambda event: _emit_piece(session, event)) if stream else show
        done = performer.perform(asking, pieces if session.json else printed.show)
        if not compare:
            # The question's own field is named by the task, which is known where the example is made.
            answer = Answer(
                done.by_mode[mode].parsed, done.artefact, mode.value, question.fields, _asked(question.text)
            )
            record(performer, answer, log=log)
            learned = performer.perform(Keep(answer)) if keep else None
    whole = {"done": True} if stream else {}
    if not session.json:
        printed.end()
    elif compare:
        answers = {mode.value: answer.parsed for mode, answer in done.by_mode.items()}
        session.emit({"task": done.artefact, "answers": answers} | whole)
    else:
        said = done.by_mode[mode]
        value = {"task": done.artefact, "mode": mode.value, "answer": said.parsed}
        counts = {"prompt_tokens": said.last.prompt_tokens, "answer_tokens": said.last.answer_tokens}
        session.emit(value | counts | ({"example": learned.example[:8]} if learned else {}) | whole)
    if learned:
        say_learned(replace(session, json=False), learned)


def _text_of(context: typer.Context, words: list[str]) -> str:
    """The words, then what is piped in. Where there is neither, the command is used wrongly."""
    if words == ["-"]:
        return read_stdin(_LARGEST_TEXT)
    piped = read_stdin(_LARGEST_TEXT).strip() if _is_piped() else ""
    said = " ".join(words)
    if not words and not piped:
        raise typer.BadParameter("give a text to ask about, or pipe one in", ctx=context, param_hint="TEXT")
    return f"{said}\n\n{piped}" if said and piped else said or piped


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file. A terminal, and what a service has there, holds no text."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind)


def _asked(text: str) -> tuple[Message, ...]:
    from perfit_device.answers import Message

    return (Message("user", text.strip()),)


def _emit_piece(session: Session, event: Event) -> None:
    from perfit_device.operations.ask import AnswerPart

    if isinstance(event, AnswerPart):
        session.emit({"mode": event.mode.value, "text": event.chunk.text})
    else:
        show(event)


class _Printed:
    """Answers on stdout as they come, each on lines of its own."""

    def __init__(self, *, titles: bool) -> None:
        self._titles = titles
        self._mode: Mode | None = None  # of the answer that is being printed

    def show(self, event: Event) -> None:
        from perfit_device.operations.ask import AnswerPart

        if not isinstance(event, AnswerPart):
            show(event)
            return
        if event.mode != self._mode:
            self.end()
            self._mode = event.mode
            print(f"{event.mode.value + ':':<12}" if self._titles else "", end="", flush=True)
        print(clean(event.chunk.text), end="", flush=True)

    def end(self) -> None:
        if self._mode is not None:
            print(flush=True)
