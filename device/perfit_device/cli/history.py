"""`perfit history`: the examples that your shift learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli import imports
from perfit_device.cli.common import (
    FieldsOption,
    JsonFlag,
    ProfileOption,
    Session,
    TaskOption,
    fields_of,
    say,
)
from perfit_device.cli.forget import forget
from perfit_shared.terminal import one_line

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
    from perfit_device.operations.examples import AddExample

    _report(session, session.perform(AddExample(text, answer, task, fields_of(field))))


app.command("import")(imports.import_)
app.command("imports")(imports.imports)
app.command("undo")(imports.undo)
app.command("export")(imports.export)


@app.command("list")
def list_(
    context: typer.Context, *, task: TaskOption = None, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Show the examples, oldest first: name, task, part, date, target.

    What --json prints can be imported again, into another profile too.
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.examples import FindExamples

    items = session.perform(FindExamples(task))
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


app.command("forget")(forget)


def _report(session: Session, done: Added) -> None:
    if session.json:
        session.emit({"task": done.task, "added": done.added, "known": done.duplicates})
    say(
        f"{done.task}: {done.added} examples added"
        + (f", {done.duplicates} were there already" if done.duplicates else "")
    )
