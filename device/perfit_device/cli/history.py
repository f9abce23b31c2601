"""`perfit history`: the examples that your shift learns from. Nothing here talks to the cloud."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.common import (
    JsonFlag,
    ProfileOption,
    Session,
    TaskOption,
    listed,
    recall,
    say,
)
from perfit_device.cli.prompts import require_yes
from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.terminal import one_line, read_stdin_bytes

if TYPE_CHECKING:
    from perfit_device.history import HistoryItem
    from perfit_device.history.importers import Found
    from perfit_device.vault.store import Vault

_WARNINGS = 5  # about single examples

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
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help='JSONL, CSV, or a LaMP/OPPU file; "-" is stdin.')
    ],
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
    Fields of an example, by its task; a table has them as the names of its columns:
      news_headline     text, title
      news_categorize   text, category
      movie_tagging     description, tag
      product_rating    text, score (1 to 5)
      scholarly_title   abstract, title
      tweet_paraphrase  input, text; or text alone
      chat              prompt, reply
    Every one may also have:
      date              2024-05-31: the newest test the shift, the oldest train it
      part              test: never trained on

    \b
    JSON lines, JSON lists, CSV with commas, semicolons or tabs, LaMP's files, and
    what `perfit history list --json` prints; UTF-8, UTF-16 or Windows-1252.

    \b
    perfit history import mine.jsonl --task news_headline
    perfit history import user_top_100_history.json --task news_categorize --user 3
    perfit history list --json | perfit --profile new history import -
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history
    from perfit_device.history.importers import HistoryFile
    from perfit_device.history.importers.text import LARGEST

    is_stdin = str(file) == "-"
    read = HistoryFile.read(
        Path("stdin") if is_stdin else file, data=read_stdin_bytes(LARGEST) if is_stdin else None, tell=say
    )
    with session.open_vault() as vault:
        of = None if read.is_listing and task is None else session.task(vault, task)
        found = read.examples(of, user=user, known=recall(vault).by_task)
        _warn_of_long_ones(found, vault)
        tasks = {one.item.task for one in found}
        _report(session, listed(tasks), history.add(vault, [one.item for one in found]))


def _warn_of_long_ones(found: Sequence[Found], vault: Vault) -> None:
    """By the limits that the cloud named last: what it has more words than tokens of, it will refuse."""
    known = recall(vault)
    limits = (known.prompt_tokens, known.new_tokens)
    if not all(limits):
        return
    long = [one for one in found if max(_words(one.item)) > max(limits)]
    for one in long[:_WARNINGS]:
        say(
            f"{one.place}: {max(_words(one.item))} words are too long for the cloud, which takes "
            f"{limits[0]} tokens; it is kept, and left out where the cloud refuses it"
        )
    if len(long) > _WARNINGS:
        say(f"{len(long) - _WARNINGS} more are too long as well")


def _words(item: HistoryItem) -> list[int]:
    return [len(text.split()) for text in item.fields.values()]


@app.command("list")
def list_(
    context: typer.Context,
    *,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Show the examples, oldest first: name, task, part, date, target.

    What --json prints can be imported again, into another profile too.
    """
    session = Session.of(context, profile=profile, json=json)

    with session.open_vault() as vault:
        items = _load(vault, task)
    if session.json:
        session.emit(
            [
                {"name": i.name, "task": i.task, "date": i.date, "part": i.part, "fields": dict(i.fields)}
                for i in items
            ]
        )
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
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before forgetting all of them.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Forget examples for good: their rows and keys are overwritten in the vault.

    \b
    perfit history forget 3fa81c02
    perfit history forget --task news_headline
    perfit history forget --all --yes
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history

    if sum((bool(names), task is not None, everything)) != 1:
        raise InvalidInput("say what to forget: names of examples, --task NAME, or --all")
    with session.open_vault() as vault:
        items = _load(vault, task)
        if not names and items and not yes:
            require_yes(f"this forgets {len(items)} examples for good.")
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


def _load(vault: Vault, task: str | None) -> list[HistoryItem]:
    """The examples of a task, or of an artefact's, or all. Raises NotFound when there is no such task."""
    from perfit_device import history
    from perfit_shared.tasks import TASKS

    items, known = history.load(vault), recall(vault)
    if task is None:
        return items
    name = known.task_of(task)
    there = {item.task for item in items}
    if name not in there and task not in known.tasks and name not in TASKS:
        raise NotFound(
            f'there is no task "{one_line(task)[:64]}"; there are {listed(there | known.tasks.keys())}'
        )
    return [item for item in items if item.task == name]


def _report(session: Session, task: str, counts: tuple[int, int]) -> None:
    added, known = counts
    if session.json:
        value: dict[str, Any] = {"task": task, "added": added, "known": known}
        session.emit(value)
    say(f"{task}: {added} examples added" + (f", {known} were there already" if known else ""))
