"""Every example in the help of `perfit` runs, against the fake cloud in a prepared home."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud
from tests.support.repositories import git, make_repository, put

from perfit_device.agent import install
from perfit_device.cli.main import app
from perfit_device.openai_api import server
from perfit_shared.command_tree import command_of
from perfit_shared.errors import KEPT_OUT
from perfit_shared.tasks import TASKS

# What another system, a terminal or a shell would have to be there for; the words of the example begin so.
CANNOT_RUN = {
    'perfit ask --task tickets "The page stays white."': "the task is its cloud's own",
    'perfit history add --task tickets "The page stays white."': "the task is its cloud's own",
}
# What an example stands for here.
STANDS_FOR = {
    "perfit1-AQAAA…": "{invite} --replace",
    "perfit enroll -": "perfit enroll - --replace",
    "3fa81c02": "{name}",
    "forget --task news_headline": "forget --task news_headline --yes",  # nobody is at a terminal
    "perfit history undo": "perfit history undo --yes",
    "perfit serve": "perfit serve --port 0",
}
_EXAMPLE = re.compile(r"^(?:\S.* (?:\||&&) |[A-Z_]+=\S+ |eval \"\$\(|source <\()?perfit(?: |$)")


def examples_in(text: str) -> list[str]:
    """Lines of a help text that run perfit, without the remarks behind them."""
    lines = [re.split(r"\s{3,}|\s+# ", line.strip())[0] for line in text.splitlines()]
    return [line for line in lines if _EXAMPLE.match(line)]


def commands(command: Any, name: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield name
    for word, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*name, word))


def help_of(name: tuple[str, ...]) -> str:
    command = command_of(app)
    for word in name[1:]:
        command = command.commands[word]
    return command.help or ""


FOUND = {name: examples_in(help_of(name)) for name in commands(command_of(app), ("perfit",))}


MAIL = """\
From nell@example.org Fri May 31 10:00:00 2024
From: Nell <nell@example.org>
To: Joris <joris@example.org>
Date: Fri, 31 May 2024 10:00:00 +0000
Subject: Re: Friday
Message-ID: <2@example.org>

Yes! Seven, as ever.

On Fri, 31 May 2024, Joris wrote:
> Are we still on for Friday?
"""


@pytest.fixture(scope="module")
def cloud() -> Iterator[FakeCloud]:
    """One for all, so that they can begin from one home."""
    fake = FakeCloud()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first test makes, and the others begin from: a home, and somebody's shift."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def prepared(
    perfit: Perfit,
    cloud: FakeCloud,
    trained: Path,
    home: Path,
    history_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Perfit]:
    """Three versions of a shift, an answer, and a repository with the files that examples name."""
    repository = make_repository(tmp_path / "repository")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PERFIT_NEW_PASSPHRASE", "battery staple")
    monkeypatch.setenv("PERFIT_BACKUP_PASSPHRASE", "staple battery")
    if not (trained / "home").exists():
        perfit.ok("enroll", cloud.invite().encode())
        perfit.ok("history", "import", str(history_file), "--offline")
        for _ in range(3):
            perfit.ok("update", "--again", "--epochs", "1", "--anyway")
        perfit.ok("export", "--shift", str(trained / "friend.shift"))
        cloud.tasks = sorted({*cloud.tasks, *TASKS})
        perfit.ok("status")  # so that the device knows them
        perfit.ok("config", "set", "task", "news_headline")
        perfit.ok("ask", "It rained.")
        home.rename(trained / "home")
    shutil.copytree(trained / "home", home)
    shutil.copy(trained / "friend.shift", repository)
    shutil.copy(tmp_path / "mine.jsonl", repository)
    rows = [f"{v} {n},{v}" for n, v in enumerate(("On Friday?", "Yes"))]
    Path("sent.csv").write_text("message,reply\n" + "\n".join(rows))
    Path("table.csv").write_text("Mail,Answer\n" + "\n".join(rows))
    Path("Sent.mbox").write_text(MAIL)
    tagged = [{"id": str(n), "text": f"Rain {n}", "category": "travel"} for n in range(3)]
    Path("user_top_100_history.json").write_text(json.dumps([{"user_id": 3, "profile": tagged}]))
    as_nell = {"GIT_AUTHOR_NAME": "Nell", "GIT_AUTHOR_EMAIL": "nell@example.org"}
    put(repository, "a.txt", "one\n")
    git(repository, "add", "a.txt")
    git(repository, "commit", "--message", "Add a", **as_nell)
    put(repository, "a.txt", "two\n")
    no_person_waits(repository, tmp_path, monkeypatch)
    yield perfit
    perfit("agent", "stop")


def no_person_waits(repository: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git, editors, the endpoint and the system's own programs go on as if somebody had done their part."""
    git(repository, "config", "user.name", "Nell")
    git(repository, "config", "user.email", "nell@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    monkeypatch.setenv("GIT_EDITOR", "true")
    monkeypatch.setenv("VISUAL", f"{sys.executable} -c \"import sys; open(sys.argv[1], 'a').write('More')\"")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(elsewhere / "config"))
    monkeypatch.setattr(install, "_run", lambda words: True)

    def interrupted(endpoint: server.Endpoint) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.Endpoint, "wait", interrupted)


# What has to be done before an example; the words of the example begin so.
BEFORE = {
    "perfit commit": "git add -u",
    "perfit commit --all": "rm a.txt",
    "perfit commit -- ": "touch b.txt && git add b.txt",
    "perfit commit --print": "touch c.txt && git add c.txt",
    "perfit lock": "perfit agent start",
    "perfit unlock": "perfit agent start",
    "perfit agent stop": "perfit agent start",
    "perfit agent uninstall": "perfit agent install",
    "perfit log keep": "perfit log on && perfit ask 'It snowed.'",
    "perfit history undo": "perfit history import sent.csv --task reply --format csv",
    "perfit history undo 3": "perfit history import table.csv --text-column Mail --answer-column Answer "
    "&& perfit history import user_top_100_history.json --task news_categorize --user 3",
    "perfit history export mine.jsonl": "rm mine.jsonl",
    "perfit history export | perfit --profile new": "perfit --profile new enroll perfit1-AQAAA…",
    "perfit import --shift mine.shift": "perfit export --shift mine.shift",
    "perfit restore mine.perfit": "perfit backup mine.perfit "
    "&& perfit --profile new enroll perfit1-AQAAA… && perfit profiles use new",
    "perfit restore mine.perfit --into default": "perfit profiles use default",
    "perfit unenroll --keep-history": "perfit enroll perfit1-AQAAA…",
    "perfit versions use 3": "perfit versions use 2",
    "perfit versions drop 3": "perfit versions use 2",
    "perfit profiles use work": "perfit --profile work enroll perfit1-AQAAA…",
    "perfit profiles remove old": "perfit --profile old enroll perfit1-AQAAA…",
}


def run(perfit: Perfit, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `line` as a shell would: what stands before a bar writes what perfit reads."""
    *first, line = line.split(" && ")
    for each in first:
        run(perfit, each, monkeypatch)
    if setting := re.match(r"([A-Z_]+)=(\S+) ", line):
        monkeypatch.setenv(*setting.groups())
        line = line[setting.end() :]
    if " | " not in line and not _EXAMPLE.match(line):
        subprocess.run(shlex.split(line), check=True)
        return
    given = ""
    parts = re.sub(r"^(?:eval \"\$\(|source <\()(.*?)\)\"?$", r"\1", line).split(" | ")
    for part, after in itertools.pairwise([*parts, "perfit"]):
        words = list(itertools.takewhile(lambda word: word != ">", shlex.split(part)))
        if words[0] != "perfit":
            given = " ".join(words[1:])
            continue
        monkeypatch.setattr(sys, "stdin", piped(given) if given else io.TextIOWrapper(io.BytesIO()))
        with monkeypatch.context() as patch:
            if not after.startswith("perfit"):  # another program reads it, and it may be bytes
                patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
            code, given, err = perfit(*words[1:])
        assert code in (0, KEPT_OUT), f"{line}: {err}"


def piped(text: str) -> TextIO:
    """Stdin as a shell's bar makes it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(write, "wb") as file:
        file.write(text.encode())
    return os.fdopen(read, encoding="utf-8")


def with_values(perfit: Perfit, cloud: Any, line: str) -> str:
    for word, value in STANDS_FOR.items():
        if word in line:
            name = name_for(perfit, line) if value == "{name}" else ""
            line = line.replace(word, value.format(invite=cloud.invite().encode(), name=name))
    return re.sub(
        r"^(pbpaste \| )?perfit enroll -", f"echo {cloud.invite().encode()} | perfit enroll -", line
    )


def name_for(perfit: Perfit, line: str) -> str:
    """Of an example, or of an answer."""
    if "history" in line or "forget" in line:
        return str(perfit.json("history", "list")[0]["name"][:8])
    return str(perfit.json("log", "list")["answers"][-1]["name"][:8])


@pytest.mark.parametrize("name", [name for name, found in FOUND.items() if found], ids=" ".join)
def test_examples_run(
    name: tuple[str, ...], prepared: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in FOUND[name]:
        if any(line.startswith(words) for words in CANNOT_RUN):
            continue
        if before := [words for words in BEFORE if f"{line} ".startswith(words)]:
            made_ready = with_values(prepared, cloud, BEFORE[max(before, key=len)])
            run(prepared, made_ready, monkeypatch)
        run(prepared, with_values(prepared, cloud, line), monkeypatch)


def test_what_is_known_of_examples_stands_in_the_help() -> None:
    shown = [f"{line} " for found in FOUND.values() for line in found]
    assert all(any(line.startswith(words) for line in shown) for words in (*CANNOT_RUN, *BEFORE))


def test_an_example_is_told_from_prose() -> None:
    text = "\b\nperfit ask -    a remark\necho x | perfit ask -\nperfitly said, run perfit ask\n"
    assert examples_in(text) == ["perfit ask -", "echo x | perfit ask -"]
    assert sum(map(len, FOUND.values())) >= 30
