"""What a change is about, from diffs that git itself makes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tests.support.repositories import git, make_repository, put

from perfit_device import changes
from perfit_device.changes import DIFF_OPTIONS, changes_of_diff


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


def commit_all(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--message", "as it was")


def staged(folder: Path) -> bytes:
    git(folder, "add", "--all")
    return git(folder, "diff", "--cached", *DIFF_OPTIONS)


def test_a_change_has_the_form_of_the_public_data_set(repository: Path) -> None:
    body = "\n".join(f"    number_{i} = {i}" for i in range(8))
    put(repository, "code.py", f"def parse_line(text):\n{body}\n    return fetch(text, retries)\n")
    commit_all(repository)
    put(repository, "code.py", f"def parse_line(text):\n{body}\n    return fetch(text, limit, limit, Busy)\n")
    put(repository, "notes.md", "The limit is new.\n")
    assert changes_of_diff(staged(repository)) == (
        "code.py +1 -1; notes.md +1 -0 | in parse_line | adds limit, Busy | removes retries"
    )


def test_names_that_are_only_moved_are_no_news(repository: Path) -> None:
    put(repository, "a.txt", "alpha alpha beta gamma\n")
    commit_all(repository)
    put(repository, "a.txt", "beta alpha delta delta\n")
    assert changes_of_diff(staged(repository)) == "a.txt +1 -1 | adds delta | removes alpha, gamma"


def test_renames_binaries_modes_and_empty_files_have_their_new_paths(repository: Path) -> None:
    put(repository, "old name.txt", "one two three\n" * 20)
    put(repository, "script.sh", "echo\n")
    put(repository, "gone.txt", "farewell\n")
    commit_all(repository)
    (repository / "old name.txt").rename(repository / "a new name.txt")
    (repository / "gone.txt").unlink()
    put(repository, "image.png", b"\x89PNG\0\0" * 99)
    put(repository, "empty", "")
    (repository / "script.sh").chmod(0o755)
    assert changes_of_diff(staged(repository)) == (
        "a new name.txt +0 -0; empty +0 -0; gone.txt +0 -1; image.png +0 -0; script.sh +0 -0"
        " | removes farewell"
    )


def test_paths_that_git_quotes_are_read(repository: Path) -> None:
    put(repository, 'größe\t"x".txt', "eins\n")
    put(repository, b"latin-\xe9.txt", "")
    put(repository, "\x1b[31mred.txt", "")
    line = changes_of_diff(staged(repository))
    assert line == '[31mred.txt +0 -0; größe "x".txt +1 -0; latin-\ufffd.txt +0 -0 | adds eins'
    git(repository, "config", "core.quotePath", "false")
    assert changes_of_diff(staged(repository)) == line


def test_a_line_that_looks_like_a_header_is_a_line(repository: Path) -> None:
    put(repository, "a.sql", "-- drop_table\n++ plus_line\n")
    commit_all(repository)
    put(repository, "a.sql", "diff --git a/x b/x\n@@ -1 +1 @@ def nothing\n")
    assert changes_of_diff(staged(repository)) == (
        "a.sql +2 -2 | adds diff, nothing | removes drop_table, plus_line"
    )


@pytest.mark.parametrize("key", ["diff.noprefix", "diff.mnemonicPrefix", "color.ui", "diff.ignoreSubmodules"])
def test_a_person_s_own_settings_of_git_change_nothing(repository: Path, key: str) -> None:
    git(repository, "config", key, {"color.ui": "always", "diff.ignoreSubmodules": "all"}.get(key, "true"))
    put(repository, "a/b.txt", "hello\n")
    put(repository, "empty", "")
    assert changes_of_diff(staged(repository)) == "a/b.txt +1 -0; empty +0 -0 | adds hello"


def test_a_merge_counts_what_is_in_neither_parent(repository: Path) -> None:
    put(repository, "a.txt", "one\ntwo\nthree\n")
    commit_all(repository)
    git(repository, "checkout", "-b", "side")
    put(repository, "a.txt", "one\nside_line\nthree\n")
    git(repository, "commit", "--all", "--message", "side")
    git(repository, "checkout", "main")
    put(repository, "a.txt", "one\nmain_line\nthree\n")
    git(repository, "commit", "--all", "--message", "main")
    git(repository, "merge", "--strategy", "ours", "--no-commit", "side")
    put(repository, "a.txt", "one\njoint_line\nthree\n")
    git(repository, "commit", "--all", "--message", "merged")
    diff = git(repository, "show", "--format=", "--cc", *DIFF_OPTIONS)
    assert diff.startswith(b"diff --cc a.txt")
    assert changes_of_diff(diff) == "a.txt +1 -2 | adds joint_line | removes main_line, side_line"


def test_a_line_is_bounded_whatever_the_diff(repository: Path) -> None:
    for number in range(9):
        names = " ".join(f"a_rather_long_name_of_{number}_{i}" for i in range(40))
        put(repository, f"folder/of/a/file/{number}.txt", f"{names}\n{'x ' * (1 << 18)}LateName\n")
    line = changes_of_diff(staged(repository))
    assert line.startswith("folder/of/a/file/0.txt +2 -0; ")
    assert "; 4 more | adds a_rather_long_name_of_0_0, " in line
    assert len(line) <= 420
    assert "LateName" not in line


def test_a_huge_diff_is_read_as_it_comes_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a long one the rest is only counted."""
    longest = 0

    class Pipe(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal longest
            line = super().readline(size)
            longest = max(longest, len(line))
            return line

    monkeypatch.setattr(changes, "_NAMING_BYTES", 1 << 15)
    head = b"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -0,0 +1 @@\n+first\n+"
    line = changes_of_diff(Pipe(head + b"x " * (4 << 20) + b"\n+" + b". " * (4 << 20) + b"\n+later\n"))
    assert line == "x +4 -0 | adds first"
    assert longest <= 1 << 14


def test_nothing_changed_is_nothing(repository: Path) -> None:
    assert changes_of_diff(staged(repository)) == ""
    assert changes_of_diff("") == ""
