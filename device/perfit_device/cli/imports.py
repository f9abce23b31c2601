"""`perfit history import`, `imports`, `undo` and `export`: whole histories in and out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say, show
from perfit_device.cli.prompts import require_yes
from perfit_shared.errors import InvalidInput, NotFound
from perfit_shared.terminal import one_line, read_stdin_bytes

if TYPE_CHECKING:
    from perfit_device.history.importers import Report
    from perfit_device.operations.imports import Imported
    from perfit_device.operations.operation import Event


def import_(
    context: typer.Context,
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[PATH]", help='A file or a folder; "-" is stdin.', show_default=False),
    ] = None,
    *,
    git: Annotated[
        Path | None, typer.Option("--git", metavar="REPO", help="Commits of a git repository.")
    ] = None,
    author: Annotated[
        str | None,
        typer.Option(
            "--author", metavar="WHO", help="Whose commits: name or address.  [default: git's user.email]"
        ),
    ] = None,
    me: Annotated[
        list[str] | None,
        typer.Option("--me", metavar="ADDRESS", help="Your address in mail; may be given again."),
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            "--role", metavar="ROLE", help="Yours in chats: assistant or user.  [default: assistant]"
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", metavar="NAME", help="A table's column of the text.")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option("--answer-column", metavar="NAME", help="A table's column of the answer.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="ID", help="Whose history, in a LaMP file of several.")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Take the newest N alone.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="What it is, where the content does not say."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and say, and change nothing.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask the cloud which examples are too long.")
    ] = False,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Import a history, all or nothing. Importing it again adds nothing twice.

    \b
    What it is shows in its content:
      JSON lines, JSON lists, CSV with commas, semicolons or tabs, .xlsx;
      UTF-8, UTF-16 or Windows-1252
      chats: {"messages": [{"role": …, "content": …}]}, and ChatGPT's export
      mail that you sent: mbox or Maildir
      a folder of Markdown, a git repository, LaMP's files
      what `perfit history export` writes

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
    perfit history import mine.jsonl --task news_headline
    perfit history import sent.csv --task reply --dry-run
    perfit history import table.csv --text-column Mail --answer-column Answer
    perfit history import Sent.mbox --me nell@example.org
    perfit history import --git . --author nell@example.org --last 500
    perfit history import user_top_100_history.json --task news_categorize --user 3
    perfit history export | perfit --profile new history import -
    """
    session = Session.of(context, profile=profile, json=json)
    if (path is None) == (git is None):
        raise InvalidInput("say what to import: a PATH, or --git REPO")
    if git is not None and format_ not in (None, "git"):
        raise InvalidInput("--git says the format; leave --format out")
    from perfit_device.history.importers import Choices, Report, read_history
    from perfit_device.history.importers.source import Source
    from perfit_device.history.importers.text import LARGEST
    from perfit_device.operations.imports import DescribeTasks, ImportExamples
    from perfit_shared.json_input import error_context
    from perfit_shared.tasks import Task

    source = git or path or Path("-")
    data = read_stdin_bytes(LARGEST) if str(source) == "-" else None
    source = Path("stdin") if data is not None else source
    choices = Choices(
        format="git" if git else format_,
        user=user,
        text_column=text_column,
        answer_column=answer_column,
        role=role,
        me=tuple(me or ()),
        author=author,
        last=last,
    )
    report = Report(notify=say)
    with error_context(one_line(str(source))):  # before anybody types a passphrase
        _ = Source(source, data).head
    with session.performer() as performer:
        known = performer.perform(DescribeTasks(task), show)
        items = read_history(
            source,
            None if task is None else Task.from_json(known.chosen),
            default=known.suiting,
            data=data,
            choices=choices,
            report=report,
            tasks=known.by_task,
        )
        skipped = sum(each.count for each in report.skipped)
        name = source.resolve().name if data is None else "stdin"
        request = ImportExamples(items, report.name, name, skipped, dry_run, offline)
        _report(session, report, performer.perform(request, show))


def _report(session: Session, report: Report, done: Imported) -> None:
    if session.json:
        values = {"task": done.task, "added": done.added, "known": done.duplicates}
        about = {"format": report.name, "too_long": done.too_long, "import": done.number or None}
        session.emit(values | about | {"skipped": [asdict(each) for each in report.skipped]})
    say(f"read as {report.format}")
    for each in report.skipped:
        say(f"left out {each.count} {each.reason} ({_listed(each.places, each.count)})")
    say(
        f"{done.task}: {done.added} examples {'added' if done.number else 'would be added'}"
        + (f", {done.duplicates} were there already" if done.duplicates else "")
    )
    if done.too_long:
        say(
            f"{done.too_long} are too long for the cloud ({_listed(done.too_long_places, done.too_long)}); "
            "they are kept, and updates leave them out"
        )
    if done.number and done.added:
        say(f"`perfit history undo {done.number}` takes this import back")


def _listed(places: Sequence[str], count: int) -> str:
    return ", ".join(map(one_line, places)) + (", …" if count > len(places) else "")


def imports(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """List the imports: number, date, format, file, examples, and how many of these came by it alone.

    \b
    perfit history imports
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.imports import ListImports

    found = session.perform(ListImports())
    if session.json:
        session.emit([asdict(each) for each in found])
        return
    for each in found:
        print(
            f"{each.number:>4}  {each.date[:10]}  {each.format:<9}  {one_line(each.file)[:40]:<24}  "
            f"{each.task}: {each.added} new, {each.known} known, {each.skipped} left out; "
            f"{each.alone} by it alone"
        )
    say(f"{len(found)} imports")


def undo(
    context: typer.Context,
    number: Annotated[
        int | None,
        typer.Argument(metavar="[NUMBER]", help="Of `perfit history imports`.", show_default="the last"),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Take an import back: forget, for good, the examples that it brought and no other import did.

    An example that was there before it stays.

    \b
    perfit history undo
    perfit history undo 3 --yes
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.imports import ListImports, UndoImport

    with session.performer() as performer:
        found = performer.perform(ListImports(), show)
        about = next((each for each in reversed(found) if number in (None, each.number)), None)
        if about is None:
            what = "was no import" if number is None else f"is no import {number}"
            raise NotFound(f"there {what}; `perfit history imports` shows them")
        if about.alone and not yes:
            require_yes(
                f"this forgets the {about.alone} examples that import {about.number}, of "
                f"{one_line(about.file)}, brought, for good."
            )
        done = performer.perform(UndoImport(about.number), show)
    if session.json:
        session.emit({"import": done.number, "forgotten": done.forgotten, "kept": done.kept})
    remark = "; a shift trained on them keeps what it learned until `perfit update --fresh`"
    say(
        f"import {done.number} is taken back: forgot {done.forgotten} examples"
        + (f", {done.kept} stay, since another import brought them too" if done.kept else "")
        + (remark if done.forgotten and done.is_trained else "")
    )


def export(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to write.", show_default="stdout")
    ] = None,
    *,
    task: TaskOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Write the examples as JSON lines, unsealed, as `perfit history import` reads them back.

    \b
    perfit history export mine.jsonl
    perfit history export --task reply > replies.jsonl
    """
    session = Session.of(context, profile=profile, json=json)
    if file is None or str(file) == "-":
        count = _write(session, task, sys.stdout)
    else:
        count = _write_file(session, task, file, force=force)
        if session.json:
            session.emit({"examples": count, "file": str(file)})
    say(f"{count} examples" + ("; the file is not sealed" if file else ""))


def _write_file(session: Session, task: str | None, file: Path, *, force: bool) -> int:
    import io
    import os

    from perfit_shared.files import written_whole

    if not force and os.path.lexists(file):
        raise InvalidInput(f"{file} exists; choose another name, or --force to replace it")
    try:
        with written_whole(file, mode=0o600, replaces=force) as binary:
            text = io.TextIOWrapper(binary, "utf-8")
            count = _write(session, task, text)
            text.detach()
    except OSError as error:
        raise InvalidInput(f"cannot write {file}: {error.strerror}") from error
    return count


def _write(session: Session, task: str | None, to: IO[str]) -> int:
    import json

    from perfit_device.operations.imports import Exported, ExportExamples

    def write(event: Event) -> None:
        if not isinstance(event, Exported):
            show(event)
            return
        for item in event.items:
            values = {"task": item.task, "date": item.date, "part": item.part, "fields": dict(item.fields)}
            to.write(json.dumps(values) + "\n")

    count = session.perform(ExportExamples(task), write)
    to.flush()
    return count
