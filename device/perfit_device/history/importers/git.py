"""A person's commits in a git repository: what changed, and the subject that they gave it.

Two passes of git: the list of commits, which is quick, and the patches of those that are taken. A
repository may be hostile: nothing that its configuration names is run (hooks, monitors, pagers, drivers of
diffs, signature programs, transports), and no variable of this process steers git.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from perfit_device.changes import DIFF_OPTIONS, changes_of_diff
from perfit_device.history.importers.choices import Report
from perfit_device.history.importers.rows import check_pairs, of_pair
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import is_text
from perfit_shared.tasks import Task
from perfit_shared.terminal import one_line

__all__ = ["FIELDS", "FORMAT", "Commit", "commit_of", "git_environment", "not_worded", "safe_git"]

_NEWEST = 5000  # commits, unless the person says how many
_MOST = 1_000_000  # that are listed
_DIFF_BYTES = 1 << 20  # of one commit
_SUBJECT = 300  # characters of the longest
_SAFE = (
    ("core.fsmonitor", "false"),
    ("core.hooksPath", os.devnull),
    ("core.pager", "cat"),
    ("core.attributesFile", os.devnull),
    ("core.quotePath", "true"),
    ("log.showSignature", "false"),
    ("gpg.program", "false"),
)
_BOTS = r"\[bot\]|\b(dependabot|renovate|greenkeeper|github-actions|pre-commit-ci)\b"
_FIXUP = ("fixup!", "squash!", "amend!")
_REVERT = re.compile(r'(revert|reapply) "|revert(\([^)]*\))?!?:|this reverts commit', re.IGNORECASE)
_MERGE = re.compile(r"merge (branch|branches|pull request|remote-tracking|tag|commit)\b", re.IGNORECASE)
FIELDS = "%H%x00%P%x00%an%x00%ae%x00%at%x00%s"


@dataclass(frozen=True)
class Commit:
    name: str  # its hash
    parents: int
    author: str
    email: str
    date: str
    subject: str


def fits(source: Source) -> bool:
    """Whether a folder is a repository, or a bare one."""
    path = source.path
    return (path / ".git").exists() or all((path / name).exists() for name in ("HEAD", "objects", "refs"))


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    check_pairs(task, FORMAT.kind)
    if not source.is_folder:
        raise InvalidData("a repository is a folder")
    author = source.choices.author or _own_email(source.path)
    last = source.choices.last or _NEWEST
    source.report.format = f"git, the commits of {one_line(author)[:80]}"
    commits = sorted(_own(source.path, author, source.report), key=lambda commit: commit.date)
    for commit in commits[:-last]:
        source.report.skip(f"older than the newest {last}", commit.name[:12])
    yield from _examples(source.path, commits[-last:], task, source.report)


def git_environment() -> dict[str, str]:
    """This process's, without what steers git."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # A partial clone would fetch what it lacks, by any command that its remote names; older gits know the
    # list of protocols alone.
    no_fetching = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
    return kept | no_fetching | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def safe_git(*arguments: str) -> list[str]:
    """The command line of a git that runs nothing which the repository names."""
    settings = [word for name, value in _SAFE for word in ("-c", f"{name}={value}")]
    return ["git", "--no-pager", "--no-replace-objects", *settings, *arguments]


def _own_email(repo: Path) -> str:
    with _running(repo, "config", "--get", "user.email", may_fail=True) as output:
        email = output.readline(4096).decode(errors="replace").strip()
    if not email:
        raise InvalidData("git does not know your address; say whose commits, with --author")
    return email


def _own(repo: Path, author: str, report: Report) -> Iterator[Commit]:
    """The author's commits that they worded themselves."""
    if "\n" in author or "\0" in author or not author.strip():
        raise InvalidData("--author should be a name or an address")
    wanted = author.strip().casefold()
    for commit in _listed(repo):
        if wanted not in (commit.author.casefold(), commit.email.casefold()):
            report.skip("of other authors", commit.name[:12])
        elif reason := not_worded(commit):
            report.skip(reason, commit.name[:12])
        else:
            yield commit


def not_worded(commit: Commit) -> str:
    """Why a commit says nothing of how its author words one; "" where it does."""
    subject = commit.subject
    reasons = {
        "merges": commit.parents > 1 or _MERGE.match(subject),
        "of bots": re.search(_BOTS, f"{commit.author} {commit.email}", re.IGNORECASE),
        "fixup! and squash! commits": subject.startswith(_FIXUP),
        "reverts": _REVERT.match(subject),
        "whose subject is no UTF-8": not is_text(subject) or "\ufffd" in subject,
        f"whose subject is longer than {_SUBJECT} characters": len(subject) > _SUBJECT,
        "without a subject": not subject.strip(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _listed(repo: Path) -> Iterator[Commit]:
    options = ("-z", "--no-show-signature", "--encoding=UTF-8", f"--format={FIELDS}")
    with _running(repo, "log", *options, "HEAD", "--") as output:
        for number, record in enumerate(_records(output, 6)):
            if number == _MOST:
                raise InvalidData(f"more than {_MOST} commits")
            yield commit_of([field.decode(errors="replace") for field in record])


def commit_of(texts: Sequence[str]) -> Commit:
    """From git's six `FIELDS`."""
    name, parents, author, email, seconds, subject = texts
    return Commit(name, len(parents.split()), author, email, _date_of(seconds), one_line(subject))


def _records(output: IO[bytes], width: int) -> Iterator[list[bytes]]:
    """Groups of so many texts, with a null byte behind each."""
    rest, fields = b"", list[bytes]()
    while chunk := output.read(1 << 16):
        *whole, rest = (rest + chunk).split(b"\0")
        if len(rest) > 1 << 20:
            raise InvalidData("a commit with a subject of more than 1 MiB")
        fields += whole
        while len(fields) >= width:
            yield fields[:width]
            del fields[:width]
    if len(fields) == width - 1:  # none stands behind the last
        yield [*fields, rest]


def _date_of(seconds: str) -> str:
    try:
        return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, OverflowError, OSError):
        return ""


def _examples(repo: Path, commits: list[Commit], task: Task, report: Report) -> Iterator[HistoryItem]:
    names = "".join(f"{commit.name}\n" for commit in commits)
    by_name = {commit.name: commit for commit in commits}
    options = ("--stdin", "--root", "-r", "--always", "--format=%x00%H", *DIFF_OPTIONS)
    with _running(repo, "diff-tree", *options, given=names.encode()) as output:
        for name, diff, is_whole in _diffs(output):
            commit = by_name[name]
            if not is_whole:
                report.skip(f"with a patch of more than {_DIFF_BYTES >> 20} MiB", name[:12])
            elif changes := changes_of_diff(diff):
                yield of_pair(task, changes, commit.subject, date=commit.date, origin=name[:12])
            else:
                report.skip("that change no file", name[:12])


def _diffs(output: IO[bytes]) -> Iterator[tuple[str, bytes, bool]]:
    """(commit, patch, whether that is all of it)."""
    name, parts, size = "", list[bytes](), 0
    is_start = True
    while line := output.readline(1 << 16):
        if is_start and line.startswith(b"\0"):
            if name:
                yield name, b"".join(parts), size <= _DIFF_BYTES
            name, parts, size = line[1:].strip().decode("ascii", "replace"), [], 0
        else:
            size += len(line)
            if size <= _DIFF_BYTES:
                parts.append(line)
        is_start = line.endswith(b"\n")
    if name:
        yield name, b"".join(parts), size <= _DIFF_BYTES


@contextlib.contextmanager
def _running(repo: Path, *arguments: str, given: bytes = b"", may_fail: bool = False) -> Iterator[IO[bytes]]:
    """What git prints. Raises InvalidData with its last line when it fails."""
    command, environment = safe_git(*arguments), git_environment()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as errors:
        stdin.write(given)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                command, cwd=repo, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=errors
            )
        except OSError as error:
            raise InvalidData(f"git cannot be run ({error.strerror})") from error
        with process:
            try:
                yield process.stdout or io.BytesIO()
                if process.wait() and not may_fail:
                    errors.seek(0)
                    raise InvalidData(f"git says: {_last_line(errors.read(1 << 16))}")
            finally:
                process.kill()


def _last_line(said: bytes) -> str:
    lines = [one_line(line) for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("fatal: ")[:200] if lines else "nothing, and failed"


FORMAT = Format("git", "a git repository", fits, read, tasks=("commit_message",), reads=("author",))
