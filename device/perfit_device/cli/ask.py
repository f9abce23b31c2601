"""`perfit ask`: an answer, streamed as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import FieldsOption, JsonFlag, ProfileOption, Session, TaskOption, fields_of
from perfit_shared.terminal import clean, read_stdin
from perfit_shared.types import Chunk, Mode

if TYPE_CHECKING:
    from perfit_device.operations.ask import PreparedQuestion

_LARGEST_TEXT = 1 << 22  # bytes of a text on stdin


def ask(
    context: typer.Context,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help='What to ask about, or "-" to read it from stdin.')
    ],
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
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Ask the cloud, in your own way.

    \b
    perfit ask "The council met until dawn over the stadium's debt."
    perfit ask "The council met until dawn." --compare --temperature 0
    perfit ask --task reply "Are we still on for Friday?"
    perfit ask --task chat "What should I cook with leeks?"
    perfit ask --task tickets "The page stays white." --field product=Web    a task of two fields
    echo "The council met until dawn." | perfit ask - --json
    perfit ask -- "-5 degrees on Monday"       a text that begins with a dash
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.ask import Question, prepare

    question = Question(
        text=read_stdin(_LARGEST_TEXT) if text == "-" else text,
        task=task,
        fields=fields_of(field),
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    with session.open_profile() as opened:
        prepared = prepare(opened, question, list(Mode) if compare else [mode])
        opened.release_vault()
        if compare:
            _compare(session, prepared)
            return
        answer, last = _answer(prepared, mode, show=not session.json)
        if session.json:
            value = {
                "task": prepared.artefact.name,
                "mode": mode.value,
                "answer": prepared.artefact.task.parse(answer),
            }
            counts = {"prompt_tokens": last.prompt_tokens, "answer_tokens": last.answer_tokens}
            session.emit(value | counts)


def _answer(prepared: PreparedQuestion, mode: Mode, *, show: bool) -> tuple[str, Chunk]:
    """(the whole answer, its last chunk); written to stdout as it comes if `show`."""
    from perfit_shared.types import Chunk

    chunks: list[str] = []
    last = Chunk("")
    for last in prepared.stream(mode):
        chunks.append(last.text)
        if show:
            print(clean(last.text), end="", flush=True)
    if show:
        print(flush=True)
    return "".join(chunks), last


def _compare(session: Session, prepared: PreparedQuestion) -> None:
    answers = {}
    for mode in Mode:
        if not session.json:
            print(f"{mode.value + ':':<12}", end="", flush=True)
        answer, _ = _answer(prepared, mode, show=not session.json)
        answers[mode.value] = prepared.artefact.task.parse(answer)
    if session.json:
        session.emit({"task": prepared.artefact.name, "answers": answers})
