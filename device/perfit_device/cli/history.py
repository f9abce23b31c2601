"""`perfit history`: the examples that your shift learns from. Nothing here talks to the cloud."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import (
    FieldsOption,
    JsonFlag,
    ProfileOption,
    Session,
    TaskOption,
    fields_of,
    say,
)
from perfit_device.cli.prompts import require_yes
from perfit_shared.errors import InvalidInput
from perfit_shared.terminal import one_line, read_stdin_bytes

if TYPE_CHECKING:
    from perfit_device.operations.examples import Added

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
    field: FieldsOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Add one example.

    \b
    perfit history add "The council met until dawn." "Bleary councillors, same old debt"
    perfit history add --task reply "Are we still on for Friday?" "Yes! Seven, as ever."
    perfit history add --task tickets "The page stays white." "Clear the cache, please." --field product=Web
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations import examples

    with session.open_profile() as opened:
        _report(session, examples.add(opened, text, answer, task, fields_of(field)))


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
      commit_message    changes, message
      reply             message, reply
      chat              prompt, reply
    A cloud's own tasks have other fields; a file that lacks one is told which.
    Every one may also have:
      date              2024-05-31: the newest test the shift, the oldest train it
      part              test: never trained on

    \b
    JSON lines, JSON lists, CSV with commas, semicolons or tabs, LaMP's files, and
    what `perfit history list --json` prints; UTF-8, UTF-16 or Windows-1252.

    \b
    perfit history import mine.jsonl --task news_headline
    perfit history import sent.csv --task reply
    perfit history import user_top_100_history.json --task news_categorize --user 3
    perfit history list --json | perfit --profile new history import -
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.history.importers.text import LARGEST, read_bytes
    from perfit_device.operations import examples
    from perfit_shared.json_input import error_context

    is_stdin = str(file) == "-"
    path = Path("stdin") if is_stdin else file
    with error_context(str(path)):  # before anybody types a passphrase
        data = read_stdin_bytes(LARGEST) if is_stdin else read_bytes(file)
    with session.open_profile() as opened:
        _report(session, examples.import_file(opened, path, data=data, task=task, user=user))


@app.command("list")
def list_(
    context: typer.Context, *, task: TaskOption = None, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Show the examples, oldest first: name, task, part, date, target.

    What --json prints can be imported again, into another profile too.
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations import examples

    with session.open_profile() as opened:
        items = examples.find(opened, task)
    if session.json:
        keys = ("name", "task", "date", "part")
        session.emit(
            [{key: getattr(item, key) for key in keys} | {"fields": dict(item.fields)} for item in items]
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
    from perfit_device.operations import examples

    if sum((bool(names), task is not None, everything)) != 1:
        raise InvalidInput("say what to forget: names of examples, --task NAME, or --all")
    with session.open_profile() as opened:
        items = examples.find(opened, task, names or [])
        if not names and items and not yes:
            require_yes(f"this forgets {len(items)} examples for good.")
        done = examples.forget(opened, items)
    if session.json:
        session.emit({"forgotten": done.count})
    remark = "; a shift trained on them keeps what it learned until `perfit update --fresh`"
    say(f"forgot {done.count} examples" + (remark if done.count and done.is_trained else ""))


def _report(session: Session, done: Added) -> None:
    if session.json:
        session.emit({"task": done.task, "added": done.added, "known": done.duplicates})
    say(
        f"{done.task}: {done.added} examples added"
        + (f", {done.duplicates} were there already" if done.duplicates else "")
    )
