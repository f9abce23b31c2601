"""`perfit history`: the examples that your shift learns from. Nothing here talks to the cloud."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, one_line, say
from perfit_shared.errors import InvalidData, InvalidInput

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The examples that your shift learns from."
)


@app.command("add")
def add(
    context: typer.Context,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the example is about.")],
    answer: Annotated[str, typer.Argument(metavar="ANSWER", help="What you would have answered.")],
    *,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Add one example.

    \b
    perfit history add "The council met until dawn." "Bleary councillors, same old debt"
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history

    with session.open_vault() as vault:
        of = session.task(vault, task)
        values = {of.text_field: text, of.gold_field: answer}
        try:
            item = history.HistoryItem.make(of, values, date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        except InvalidData as error:
            raise InvalidInput(f"an example of {of.name} cannot be made of these two: {error}") from error
        _report(session, of.name, history.add(vault, [item]))


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, CSV, or a LaMP/OPPU file.")],
    *,
    task: TaskOption = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="ID", help="Whose history, in a LaMP file of several.")
    ] = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Import a file of examples, all or nothing. Importing it again adds nothing twice.

    \b
    perfit history import mine.jsonl --task news_headline
    perfit history import user_top_100_history.json --task news_categorize --user 3
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history
    from perfit_device.imports import read_history

    with session.open_vault() as vault:
        of = session.task(vault, task)
        items = read_history(file, of, user=user, tell=say)
        _report(session, of.name, history.add(vault, items))


@app.command("list")
def list_(
    context: typer.Context,
    *,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Show the examples, oldest first: name, task, part, date, target."""
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history

    with session.open_vault() as vault:
        items = history.load(vault, task)
    if session.json:
        session.emit([
            {"name": i.name, "task": i.task, "date": i.date, "part": i.part, "fields": dict(i.fields)}
            for i in items
        ])  # fmt: skip
        return
    for item in items:
        shown = one_line(" | ".join(item.fields.values()))
        cut = shown if len(shown) <= 100 else shown[:99] + "…"
        print(f"{item.short}  {item.task}  {item.part or '-':<4}  {item.date[:10] or '-':<10}  {cut}")
    say(f"{len(items)} examples")


@app.command("forget")
def forget(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="As `perfit history list` shows them.")
    ] = None,
    *,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="All examples of a task.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All examples of all tasks.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Forget examples for good: their rows and keys are overwritten in the vault.

    \b
    perfit history forget 3fa81c02
    perfit history forget --task news_headline
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history

    if sum((bool(names), task is not None, everything)) != 1:
        raise InvalidInput("say what to forget: names of examples, --task NAME, or --all")
    with session.open_vault() as vault:
        items = history.load(vault, task)
        count = history.forget(vault, history.find(items, names) if names else items)
        trained = bool(vault.list("shift"))
    if session.json:
        session.emit({"forgotten": count})
    say(
        f"forgot {count} examples"
        + (
            "; a shift trained on them keeps what it learned until `perfit update --fresh`"
            if count and trained
            else ""
        )
    )


def _report(session: Session, task: str, counts: tuple[int, int]) -> None:
    added, known = counts
    if session.json:
        value: dict[str, Any] = {"task": task, "added": added, "known": known}
        session.emit(value)
    say(f"{task}: {added} examples added" + (f", {known} were there already" if known else ""))
