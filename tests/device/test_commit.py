"""`perfit commit` and its hook, with real git."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.repositories import git, make_repository, put

MESSAGE = "Add the hello"


@pytest.fixture
def committing(perfit: Perfit, cloud: Any) -> Perfit:
    cloud.tasks, cloud.answer = ["commit_message"], MESSAGE
    perfit.ok("enroll", cloud.invite().encode())
    return perfit


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "ada@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    monkeypatch.setenv("GIT_EDITOR", "true")
    folder = make_repository(tmp_path / "repository")
    monkeypatch.chdir(folder)
    return folder


def stage(folder: Path, name: str = "a.txt", text: str = "hello\n") -> None:
    put(folder, name, text)
    git(folder, "add", "--all")


def subject(folder: Path) -> str:
    return git(folder, "log", "-1", "--format=%s").decode().strip()


def test_a_commit_has_the_message_in_one_s_own_way(
    committing: Perfit, cloud: Any, repository: Path, monkeypatch: Any
) -> None:
    stage(repository)
    assert committing.ok("commit", "--print").strip() == f"{MESSAGE} personal"
    assert "Changes: a.txt +1 -0 | adds hello\nCommit message:" in cloud.prompts[-1].text
    committing.ok("commit")
    assert subject(repository) == f"{MESSAGE} personal"
    stage(repository, text="hello\nagain\n")
    monkeypatch.setenv("GIT_EDITOR", "sed -i 's/^/docs: /'")
    committing.ok("commit", "--", "--signoff", "--quiet")
    body = git(repository, "log", "-1", "--format=%B").decode()
    assert body.startswith(f"docs: {MESSAGE} personal\n") and "Signed-off-by: " in body
    assert not committing.json("history", "list")


def test_what_was_committed_in_the_end_is_learned_from_on_demand(
    committing: Perfit, repository: Path, monkeypatch: Any
) -> None:
    stage(repository)
    monkeypatch.setenv("GIT_EDITOR", "sed -i '1s/.*/My own words/'")
    assert "is an example now" in committing("commit", "--learn")[2]
    put(repository, "a.txt", "good bye\n")
    git(repository, "config", "perfit.learn", "true")
    committing.ok("commit", "--all")
    assert [item["fields"] for item in committing.json("history", "list")] == [
        {"changes": "a.txt +1 -0 | adds hello", "message": "My own words"},
        {"changes": "a.txt +1 -1 | adds good | removes hello", "message": "My own words"},
    ]


def test_what_git_refuses_is_no_commit_and_no_example(
    committing: Perfit, repository: Path, monkeypatch: Any
) -> None:
    assert "nothing is staged" in committing.fails("commit")
    stage(repository)
    monkeypatch.setenv("GIT_EDITOR", "false")
    assert committing("commit", "--learn")[0] == 1
    monkeypatch.setenv("GIT_EDITOR", "sed -i d")  # an empty message
    assert committing("commit", "--learn")[0] == 1
    assert not committing.json("history", "list")
    monkeypatch.chdir("/")
    assert "git says:" in committing.fails("commit")


# -- the hook --------------------------------------------------------------------------------------


@pytest.fixture
def hooked(committing: Perfit, repository: Path) -> Path:
    assert "prepare-commit-msg" in committing("commit", "--install")[2]
    return repository


def commit(folder: Path, *options: str, **environment: str) -> None:
    git(folder, "commit", *options, **{"GIT_EDITOR": "true", **environment})


def test_the_hook_gives_a_message_to_begin_with(hooked: Path) -> None:
    stage(hooked)
    commit(hooked)
    assert subject(hooked) == f"{MESSAGE} personal"
    stage(hooked, text="more\n")
    commit(hooked, "--message", "my own")
    assert subject(hooked) == "my own"
    commit(hooked, "--amend")
    assert subject(hooked) == "my own"
    git(hooked, "worktree", "add", "../other")
    put(hooked.parent / "other", "b.txt", "other\n")
    git(hooked.parent / "other", "add", "--all")
    commit(hooked.parent / "other")
    assert subject(hooked.parent / "other") == f"{MESSAGE} personal"


def test_a_commit_never_fails_because_of_the_hook(
    committing: Perfit, cloud: Any, hooked: Path, monkeypatch: Any
) -> None:
    """A locked profile, a cloud that is away, none at all: git's own message is what it was."""
    editor = 'sh -c \'grep -q personal "$1" && exit 1; echo mine > "$1"\' -'
    stage(hooked)
    commit(hooked, GIT_EDITOR=editor, PERFIT_PASSPHRASE="wrong")
    stage(hooked, text="2\n")
    monkeypatch.delenv("PERFIT_PASSPHRASE")
    commit(hooked, GIT_EDITOR=editor)
    monkeypatch.setenv("PERFIT_PASSPHRASE", "correct horse")
    stage(hooked, text="3\n")
    commit(hooked, GIT_EDITOR=editor, PERFIT_HOME="/no/such/home")
    stage(hooked, text="4\n")
    cloud.fail = lambda method: None if method == "Describe" else _away()
    commit(hooked, GIT_EDITOR=editor)
    assert git(hooked, "log", "--format=%s").decode().split() == ["mine"] * 4


def _away() -> Exception:
    from perfit_shared.errors import NotAuthenticated

    return NotAuthenticated("not today")


def test_somebody_s_hook_stays(committing: Perfit, repository: Path, tmp_path: Path) -> None:
    hook = repository / ".git" / "hooks" / "prepare-commit-msg"
    put(repository, ".git/hooks/prepare-commit-msg", "#!/bin/sh\nexit 0\n")
    assert "somebody else's hook" in committing.fails("commit", "--install")
    assert "somebody else's hook" in committing.fails("commit", "--uninstall")
    assert hook.read_text() == "#!/bin/sh\nexit 0\n"
    hook.unlink()
    put(repository, ".git/hooks/post-commit", "#!/bin/sh\nexit 0\n")
    assert "post-commit is somebody else's hook" in committing.fails("commit", "--install")
    assert not hook.exists()
    (repository / ".git" / "hooks" / "post-commit").unlink()
    hook.symlink_to(tmp_path / "elsewhere")
    assert "somebody else's hook" in committing.fails("commit", "--install")
    assert not (tmp_path / "elsewhere").exists()


def test_the_hook_stands_where_git_looks_and_goes_again(
    committing: Perfit, repository: Path, tmp_path: Path
) -> None:
    git(repository, "config", "core.hooksPath", str(tmp_path / "my hooks"))
    committing.ok("--profile", "default", "commit", "--install")
    committing.ok("commit", "--install")
    hook = tmp_path / "my hooks" / "prepare-commit-msg"
    assert os.access(hook, os.X_OK)
    stage(repository)
    commit(repository)
    assert subject(repository) == f"{MESSAGE} personal"
    committing.ok("commit", "--uninstall")
    assert not hook.exists() and not hook.with_name("post-commit").exists()
    assert "no hook" in committing("commit", "--uninstall")[2]


def test_the_hooks_learn_what_was_committed_where_git_s_configuration_says_so(
    committing: Perfit, hooked: Path
) -> None:
    def learned() -> list[str]:
        return [item["fields"]["message"] for item in committing.json("history", "list")]

    stage(hooked)
    commit(hooked, GIT_EDITOR="sed -i '1s/.*/Not asked for/'")
    assert not learned()
    git(hooked, "config", "perfit.learn", "true")
    stage(hooked, text="2\n")
    commit(hooked, GIT_EDITOR="sed -i '1s/.*/My own words/'")
    stage(hooked, text="3\n")
    commit(hooked, "--message", "Typed at once", "--message", "A body.")
    assert learned() == ["My own words", "Typed at once"]
    (_, item) = committing.json("history", "list")
    assert item["fields"]["changes"] == "a.txt +1 -1"
    commit(hooked, "--amend", "--message", "Amended", GIT_COMMITTER_DATE="2030-01-01T00:00:00Z")
    stage(hooked, text="4\n")
    commit(hooked, "--fixup", "HEAD")
    stage(hooked, text="5\n")
    commit(hooked, "--message", "Nobody can open it", PERFIT_PASSPHRASE="wrong")
    assert subject(hooked) == "Nobody can open it"
    assert learned() == ["My own words", "Typed at once"]
    put(hooked, "a.txt", "6\n")
    _, _, err = committing("commit", "--all")
    assert err.count("is an example now") == 1 and "already" not in err
    assert len(learned()) == 3


def test_the_hook_asks_nothing_at_the_terminal(committing: Perfit, hooked: Path) -> None:
    """A passphrase prompt in the middle of a commit would be taken for git's."""
    from tests.support.terminals import Terminal

    stage(hooked)
    env = {"PERFIT_PASSPHRASE": "", "GIT_EDITOR": "echo mine >"}
    with Terminal("git", "-C", str(hooked), "commit", env=env) as terminal:
        before = terminal.wait_for("mine")
        assert terminal.ends_with() == 0
    assert "assphrase" not in before
    assert subject(hooked) == "mine"
