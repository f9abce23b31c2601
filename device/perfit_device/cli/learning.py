"""`perfit correct` and `perfit log`: what was answered, kept sealed, and learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say
from perfit_device.cli.prompts import require_yes
from perfit_shared.errors import PerfitError
from perfit_shared.terminal import clean, one_line

if TYPE_CHECKING:
    from perfit_device.answers import Answer
    from perfit_device.operations.feedback import Learned
    from perfit_device.operations.operation import Performer

__all__ = ["app", "correct", "record", "say_learned"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Answers that are kept to learn from.")

_NameOfOne = Annotated[
    str, typer.Argument(metavar="[NAME]", help="As `perfit log list` shows it.  [default: the newest]")
]


def record(performer: Performer, answer: Answer, *, log: bool = False) -> Answer:
    """Keep it for `perfit correct`. Where that fails, the answer was given all the same."""
    from perfit_device.operations.log import Record

    try:
        return performer.perform(Record(answer, log=log))
    except PerfitError as error:
        if log:
            raise
        say(f"this answer is not kept for `perfit correct`: {error}")
        return answer


def say_learned(session: Session, learned: Learned) -> None:
    if session.json:
        session.emit({"status": learned.status, "task": learned.task, "example": learned.example[:8] or None})
    if learned.status == "nothing":
        say("the text is unchanged, so there is nothing to learn; `perfit log keep` keeps it as it is")
    else:
        there = "is an example now" if learned.status == "added" else "was an example already"
        say(f"{learned.example[:8]} {there}, of {learned.task}; the next `perfit update` learns from it")


def correct(
    context: typer.Context, name: _NameOfOne = "", *, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Put the last answer right in your editor; what you save becomes an example at once.

    VISUAL or EDITOR says which editor. An unchanged text teaches nothing.

    \b
    perfit correct
    perfit correct 3fa81c02          an earlier one, of `perfit log list`
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.cli.editor import edited
    from perfit_device.operations.feedback import Correct
    from perfit_device.operations.log import FindAnswer

    answer = session.perform(FindAnswer(name))
    # The profile is not held meanwhile: a person may think for long.
    say_learned(session, session.perform(Correct(edited(f"{clean(answer.text)}\n"), answer.name)))


@app.command("on")
def on(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """Keep every answer from now on, sealed in the vault: the newest 1,000.

    \b
    perfit log on
    """
    _set(Session.of(context, profile=profile, json=json), wanted=True)


@app.command("off")
def off(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """Keep the newest answer alone, as at first. What is in the log stays until `clear`.

    \b
    perfit log off
    """
    _set(Session.of(context, profile=profile, json=json), wanted=False)


def _set(session: Session, *, wanted: bool) -> None:
    from perfit_device.operations.log import SetLog

    is_on = session.perform(SetLog(wanted))
    if session.json:
        session.emit({"on": is_on})
    say("answers are logged from now on" if is_on else "only the newest answer is kept from now on")


@app.command("list")
def list_(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """Show the answers that are kept, oldest first: name, date, task, question, answer.

    \b
    perfit log list
    perfit log list --json
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.log import ReadLog

    log = session.perform(ReadLog())
    if session.json:
        session.emit({"on": log.is_on, "answers": [_values(answer) for answer in log.answers]})
        return
    for answer in log.answers:
        shown = one_line(f"{_question(answer)} → {answer.text}")
        cut = shown if len(shown) <= 100 else shown[:99] + "…"
        print(f"{answer.name[:8]:<8}  {answer.date[:16]}  {answer.task or '-'}  {cut}")
    say(f"{len(log.answers)} answers; the log is {'on' if log.is_on else 'off'}")


@app.command("show")
def show(
    context: typer.Context, name: _NameOfOne = "", *, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Show one answer whole, with what was asked.

    \b
    perfit log show
    perfit log show 3fa81c02
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.log import FindAnswer

    answer = session.perform(FindAnswer(name))
    if session.json:
        session.emit(_values(answer))
        return
    for key, text in answer.fields.items():
        print(clean(f"{key}: {text}"))
    for message in answer.messages:
        print(clean(f"{message.role}: {message.content}"))
    print(clean(f"\n{answer.text}"))


@app.command("keep")
def keep(
    context: typer.Context, name: _NameOfOne = "", *, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Make an answer an example as it is: you would have written the same.

    \b
    perfit log keep
    perfit log keep 3fa81c02
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.feedback import Keep
    from perfit_device.operations.log import FindAnswer

    with session.performer() as performer:
        learned = performer.perform(Keep(performer.perform(FindAnswer(name))))
    say_learned(session, learned)


@app.command("clear")
def clear(
    context: typer.Context,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Forget all kept answers for good. Examples made of them stay.

    \b
    perfit log clear --yes
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.log import ClearLog

    if not yes:
        require_yes("this forgets all kept answers for good.")
    count = session.perform(ClearLog())
    if session.json:
        session.emit({"cleared": count})
    say(f"forgot {count} answers")


def _question(answer: Answer) -> str:
    asked = [message.content for message in answer.messages if message.role == "user"]
    return asked[-1] if asked else " | ".join(answer.fields.values())


def _values(answer: Answer) -> dict[str, object]:
    said = [{"role": message.role, "content": message.content} for message in answer.messages]
    return {
        "name": answer.name,
        "date": answer.date,
        "task": answer.task,
        "mode": answer.mode,
        "fields": dict(answer.fields),
        "messages": said,
        "answer": answer.text,
    }
