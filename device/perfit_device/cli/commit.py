"""`perfit commit`: a commit message in one's own way, for git to take."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Annotated, BinaryIO, cast

import typer

from perfit_device.cli.common import ProfileOption, Session, TaskOption, say
from perfit_shared.errors import ConfigError, InvalidInput, PerfitError
from perfit_shared.terminal import clean, one_line

if TYPE_CHECKING:
    from perfit_device.operations.operation import Performer

__all__ = ["commit"]

_TASK = "commit_message"
_HOOK_SECONDS = 15.0  # that a commit waits for a message at most


def commit(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- GIT_OPTION...]", help="Passed on to `git commit`.")
    ] = None,
    *,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Commit all changed files that git follows.")
    ] = False,
    learn: Annotated[
        bool, typer.Option("--learn", help="What you commit in the end becomes an example.")
    ] = False,
    print_: Annotated[bool, typer.Option("--print", help="Print the message; commit nothing.")] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Let every `git commit` here begin with a message.")
    ] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Remove these hooks.")] = False,
    hook: Annotated[Path | None, typer.Option("--hook", metavar="FILE", hidden=True)] = None,
    committed: Annotated[bool, typer.Option("--committed", hidden=True)] = False,
    task: TaskOption = None,
    profile: ProfileOption = None,
) -> None:
    """Write the message of what is staged, in your own way, and commit it through your editor.

    The cloud sees paths, numbers of lines and names of what changed, and no code; and the same of up to
    four of your earlier commits, with their messages.

    \b
    git add -u && perfit commit
    perfit commit --all --learn
    perfit commit -- --signoff
    perfit commit --print
    perfit commit --install                 hooks in this repository
    git config perfit.learn true            --learn by default, and by the hooks
    """
    session = Session.of(context, profile=profile)
    if install or uninstall:
        from perfit_device.cli import git_hook

        done = git_hook.install(session.profile) if install else git_hook.uninstall()
        say(done)
        return
    if hook is not None:
        _fill(session, hook, task)
        return
    if committed:
        _learn_from_hook(session, task)
        return
    changes = _changes("HEAD" if everything and _head() else "--cached")
    with session.performer() as performer:
        message = _message(performer, changes, task)
    if print_:
        print(clean(message))
        return
    before = _head()
    from perfit_device.cli.editor import private_file

    with private_file(f"{message}\n") as path:
        alone = ["-c", "perfit.learn=false"]  # or the hook would learn the same
        options = ["--edit", "--file", str(path), *(["--all"] if everything else []), *(arguments or [])]
        code = subprocess.run(["git", *alone, "commit", *options], check=False).returncode
    if code:
        raise typer.Exit(code)
    if (learn or _learns_always()) and _head() != before:
        _learn(session, task)


def _changes(what: str) -> str:
    """Of what is about to be committed. Raises InvalidInput where that is nothing."""
    if changes := _changes_by("diff", what):
        return changes
    raise InvalidInput("nothing is staged; `git add` what the commit should hold, or use --all")


def _changes_by(*arguments: str) -> str:
    """By a command of git that prints a patch."""
    import tempfile

    from perfit_device.changes import DIFF_OPTIONS, changes_of_diff

    command = ["git", "-c", "core.quotePath=true", *arguments, *DIFF_OPTIONS]
    try:
        with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=PIPE, stderr=said) as running:
            changes = changes_of_diff(cast(BinaryIO, running.stdout))
            failed = running.wait()
            said.seek(0)
            why = one_line(said.read(4096).decode(errors="replace"))
    except FileNotFoundError as error:
        raise ConfigError("git is not installed") from error
    if failed:
        raise InvalidInput(f"git says: {why[:200] or 'no diff can be made here'}")
    return changes


def _message(performer: Performer, changes: str, task: str | None) -> str:
    from perfit_device.answers import Answer, Message
    from perfit_device.cli.learning import record
    from perfit_device.operations.ask import Ask, Question
    from perfit_shared.types import Mode

    done = performer.perform(Ask(Question(changes, task=task or _TASK)))
    text = done.by_mode[Mode.PERSONAL].parsed
    record(performer, Answer(text, done.artefact, messages=(Message("user", changes),)))
    return clean(text)


def _learn(session: Session, task: str | None) -> None:
    """The subject line of the newest commit. It stands, whatever happens here."""
    from perfit_device.answers import Answer, Message
    from perfit_device.cli.git_hook import git
    from perfit_device.cli.learning import say_learned
    from perfit_device.operations.feedback import Keep

    try:
        changes = _changes_by("diff-tree", "--root", "--no-commit-id", "-r", "HEAD")
        subject = git("log", "-1", "--format=%s")
        kept = Answer(subject, task or _TASK, messages=(Message("user", changes),))
        say_learned(session, session.perform(Keep(kept)))
    except (PerfitError, TimeoutError) as error:
        say(f"the commit is made, but is no example: {error}")


def _head() -> str:
    """ "" before the first commit."""
    from perfit_device.cli.git_hook import git

    try:
        return git("rev-parse", "--verify", "--quiet", "HEAD")
    except InvalidInput:
        return ""


def _learns_always() -> bool:
    from perfit_device.cli.git_hook import git

    with contextlib.suppress(InvalidInput):
        return git("config", "--type=bool", "perfit.learn") == "true"
    return False


# -- as a hook -----------------------------------------------------------------------------------


def _fill(session: Session, path: Path, task: str | None) -> None:
    """Put a message in front of git's own comments. Whatever fails, the commit goes on without one."""
    from perfit_device.cli.prompts import without_questions

    with contextlib.suppress(Exception), without_questions(), _at_most(_HOOK_SECONDS):
        there = path.read_text("utf-8", errors="surrogateescape")
        if any(line.strip() and not line.startswith("#") for line in there.splitlines()):
            return  # a template, or somebody else's message
        changes = _changes("--cached")
        with session.performer() as performer:
            message = _message(performer, changes, task)
        path.write_text(f"{message}\n{there}", "utf-8", errors="surrogateescape")


def _learn_from_hook(session: Session, task: str | None) -> None:
    """Of a commit that was worded just now: an amended or picked one keeps its author's date."""
    from perfit_device.cli.git_hook import git
    from perfit_device.cli.prompts import without_questions
    from perfit_device.history.importers.git import FIELDS, commit_of, not_worded

    *fields, written, committed = git("log", "-1", f"--format={FIELDS}%x00%at%x00%ct").split("\0")
    if written == committed and not not_worded(commit_of(fields)):
        with without_questions(), _at_most(_HOOK_SECONDS):
            _learn(session, task)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    import signal

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise TimeoutError("it takes too long")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
