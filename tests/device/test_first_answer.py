"""The path of docs/quickstart.md from a fresh install to a personal answer, from commits and from mail."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path

import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud
from tests.support.repositories import git, make_repository, put

GUIDE = Path(__file__).parents[2] / "docs/quickstart.md"
BLOCKS = GUIDE.read_text("utf-8").split("```\n")[1::2]
[COMMANDS] = [lines for lines in map(str.splitlines, BLOCKS) if lines[0] == "pip install perfit"]
MAIL = (
    "From x Tue Jul  7 10:00:00 2026\nFrom: Nell <nell@example.org>\nSubject: Re: Friday\n"
    "Date: Tue, {} Jul 2026 10:00:00 +0200\n\n{} it is, as ever.\n\n> Still on for Friday, at {}?\n\n"
)


def words_of(line: str) -> list[str]:
    return shlex.split(line.partition("  #")[0])[1:]


@pytest.mark.parametrize("source", ["commits", "mail"])
def test_five_commands_from_install_to_a_personal_answer(
    source: str, perfit: Perfit, cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.tasks = ["commit_message", "reply"]
    repo = make_repository(tmp_path / "work")
    monkeypatch.chdir(repo)
    git(repo, "config", "user.email", "ada@example.org")
    for number in range(20):
        put(repo, "src/a.py", f"limit = {number}\n")
        git(repo, "add", ".")
        git(repo, "commit", "-m", f"Set the limit to {number}")
    Path("Sent.mbox").write_text("".join(MAIL.format(n + 1, n, n) for n in range(20)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(cloud.invite().encode().encode())))

    lines = COMMANDS[1:]
    assert len(lines) <= 4
    if source == "mail":
        lines[1] = "perfit history import Sent.mbox"
        lines[3] = 'perfit ask --task reply "Still on for Friday?"'
    done = [perfit(*words_of(line)) for line in lines]
    assert [code for code, _, _ in done] == [0, 0, 0, 0], done
    assert "20 examples added" in done[1][2]
    answered, about = done[3][1:]
    assert f"{cloud.answer} personal" in answered and "seed" not in about
