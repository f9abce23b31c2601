"""Commits as examples, and repositories that would run something."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from perfit_device.history.importers import Choices, Report, git, read_history
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS

TASK = TASKS["commit_message"]
ME = "nell@example.org"


class Repo:
    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, 1_700_000_000
        path.mkdir()
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.email", ME)
        self.git("config", "user.name", "Nell")

    def git(self, *arguments: str, **variables: str) -> None:
        environment = {**os.environ, **variables, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", *arguments], cwd=self.path, env=environment, check=True, capture_output=True)

    def commit(self, subject: str, name: str = "a.py", author: str = f"Nell <{ME}>") -> None:
        self.seconds += 60
        with (self.path / name).open("a") as file:
            file.write(f"def function_{self.seconds}(): pass\n")
        self.git("add", "-A")
        date = f"@{self.seconds} +0900"
        options = ("--author", author, "--date", date, "-m", subject)
        self.git("commit", "-q", "--no-verify", "--allow-empty-message", *options, GIT_COMMITTER_DATE=date)


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "repo")


def read(repo: Repo, report: Report | None = None, **choices: object) -> list[HistoryItem]:
    return read_history(repo.path, TASK, choices=Choices(**choices), report=report)  # type: ignore[arg-type]


def messages(items: list[HistoryItem]) -> list[str]:
    return [item.fields["message"] for item in items]


def test_own_commits_with_what_they_change(repo: Repo) -> None:
    repo.commit("Begin")
    repo.commit("Add a second one\n\nWith a body.")
    items = read(repo)
    assert messages(items) == ["Begin", "Add a second one"]
    assert items[1].fields["changes"] == "a.py +1 -0 | adds function_1700000120, pass"
    assert items[1].date == "2023-11-14T22:15:20Z", "the author's date, of UTC"


def test_what_a_person_did_not_word_is_counted(repo: Repo) -> None:
    repo.commit("Mine")
    repo.git("checkout", "-q", "-b", "side")
    repo.commit("On the side", "b.py")
    repo.git("checkout", "-q", "main")
    repo.commit("fixup! Mine")
    repo.commit('Revert "Mine"')
    repo.commit("chore: bump", author=f"dependabot[bot] <{ME}>")
    repo.commit("Theirs", author="Bo <bo@x>")
    repo.git("merge", "-q", "--no-ff", "--no-edit", "side")
    repo.git("commit", "-q", "--allow-empty", "-m", "Nothing")
    report = Report()
    assert messages(read(repo, report)) == ["Mine", "On the side"]
    assert {each.reason: each.count for each in report.skipped} == {
        "of other authors": 1,
        "merges": 1,
        "of bots": 1,
        "fixup! and squash! commits": 1,
        "reverts": 1,
        "that change no file": 1,
    }
    assert messages(read(repo, author="Bo")) == ["Theirs"] == messages(read(repo, author="BO@X"))


def test_the_newest_and_none(repo: Repo) -> None:
    with pytest.raises(InvalidData, match="git says: "):
        read(repo)
    for number in range(4):
        repo.commit(f"Number {number}")
    report = Report()
    assert messages(read(repo, report, last=2)) == ["Number 2", "Number 3"]
    assert report.skipped[0].reason == "older than the newest 2" and report.skipped[0].count == 2
    with pytest.raises(InvalidData, match=r"there are no examples in it \(4 of other authors\)"):
        read(repo, author="nobody")


def test_a_huge_patch_is_left_out(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git, "_DIFF_BYTES", 2000)
    (repo.path / "vendored").write_text("x" * 5000)
    repo.commit("Vendor it")
    repo.commit("Mine")
    report = Report()
    assert messages(read(repo, report)) == ["Mine"]
    assert "with a patch of more than" in report.skipped[0].reason


def test_hostile_names_of_files(repo: Repo) -> None:
    for name in ("--output=stolen", "-rf", "a\x1b[31m\nb", "\udcff.py", "tab\there"):
        (repo.path / name).write_text("x = 1\n")
    repo.commit("Names")
    (item,) = read(repo)
    changes = item.fields["changes"]
    assert "--output=stolen +1 -0" in changes and not {"\x1b", "\n", "\t"} & set(changes)
    assert not (repo.path / "stolen").exists()
    changes.encode()


def test_nothing_that_a_repository_names_is_run(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 >> {ran}\n")
    program.chmod(0o755)
    (repo.path / ".gitattributes").write_text("*.py diff=bad\n")
    repo.commit("One")
    repo.commit("Two")
    for name in (
        "core.fsmonitor", "core.pager", "pager.log", "diff.external", "diff.bad.command", "diff.bad.textconv",
        "gpg.program", "core.sshCommand", "core.editor", "core.askPass",
    ):  # fmt: skip
        repo.git("config", name, str(program))
    repo.git("config", "log.showSignature", "true")
    repo.git("config", "core.hooksPath", str(tmp_path))
    for name in ("GIT_EXTERNAL_DIFF", "GIT_PAGER", "GIT_SSH_COMMAND", "GIT_TRACE"):
        monkeypatch.setenv(name, str(program))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert messages(read(repo)) == ["One", "Two"]
    assert not ran.exists()


def test_a_partial_clone_fetches_nothing(repo: Repo, tmp_path: Path) -> None:
    """Git would ask the repository's remote for what is missing, by any command that its address names."""
    ran = tmp_path / "ran"
    repo.commit("One")
    blob = hashlib.sha1(b"blob 32\0" + (repo.path / "a.py").read_bytes()).hexdigest()  # noqa: S324
    (repo.path / ".git/objects" / blob[:2] / blob[2:]).unlink()
    (repo.path / "a.py").unlink()  # git would take it from there
    for name, value in (
        ("remote.origin.url", f"ext::touch {ran}"),
        ("remote.origin.promisor", "true"),
        ("protocol.ext.allow", "always"),
        ("extensions.partialClone", "origin"),
        ("core.repositoryFormatVersion", "1"),
    ):
        repo.git("config", name, value)
    with pytest.raises(InvalidData, match="git says: "):
        read(repo)
    assert not ran.exists()


def test_an_author_is_no_option(repo: Repo) -> None:
    repo.commit("One")
    for author in ("--output=x", "a\nb", " "):
        with pytest.raises(InvalidData):
            read(repo, author=author)
    assert sorted(path.name for path in repo.path.iterdir()) == [".git", "a.py"]


def test_a_repository_without_an_address(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.commit("One")
    repo.git("config", "--unset", "user.email")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")
    with pytest.raises(InvalidData, match="say whose commits, with --author"):
        read(repo)
