"""Manners of both programs: help, suggestions, colour, narrow terminals, a light start, and the pages."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer._click.utils import make_default_short_help
from typer.exceptions import TyperException

from perfit_cloud.cli.main import app as cloud
from perfit_device.cli.main import app as device
from perfit_shared import errors
from perfit_shared.command_line import run_command
from perfit_shared.command_tree import Deferred, _help_of, command_of
from perfit_shared.terminal import paint

ROOT = Path(__file__).resolve().parents[2]
APPS = {"perfit": device, "perfit-cloud": cloud}
HEAVY = {
    *("torch", "transformers", "numpy", "grpc", "cryptography", "safetensors", "keyring", "rich", "msgspec"),
    *("asyncio", "sqlite3", "ssl", "http", "multiprocessing", "ctypes", "starlette", "uvicorn", "google"),
}
MOST_MODULES = 170  # beside those that a start of Python loads; typer brings most of them


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def running(program: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as end:
            run_command(program, APPS[program])
        return int(end.value.code or 0), *capsys.readouterr()

    return running


@pytest.mark.parametrize("program", APPS)
def test_help_of_a_command(run: Any, program: str) -> None:
    name = "status" if program == "perfit" else "serve"
    assert run(program, "help", name) == run(program, name, "--help")
    assert run(program, "help") == run(program, "-h")
    assert run(program, "help", "help")[0] == 0
    code, _, err = run(program, "help", "nothing")
    assert code == 2 and "No such command 'nothing'" in err
    code, _, err = run(program, "help", name, "more")
    assert code == 2 and f"{program} {name} has no commands" in err


def test_what_is_mistyped_is_suggested(run: Any) -> None:
    for words, says in (
        (["sttus"], "Did you mean 'status'?"),
        (["history", "lst"], "Did you mean 'list'?"),
        (["ask", "x", "--temperatur", "1"], "did you mean --temperature?"),
    ):
        code, _, err = run("perfit", *words)
        assert code == 2 and says in err
        assert says in run("perfit", *words, "--json")[2]


@pytest.mark.parametrize("columns", [1, 20, 40])
def test_help_is_as_narrow_as_the_terminal(run: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never narrower than 50 columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run("perfit", "help", "versions")
    prose = [line for line in out.splitlines() if " " in line.strip()]
    assert max(map(len, prose)) <= max(columns, 26)


@pytest.mark.parametrize(
    ("environment", "is_terminal", "is_red"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"CLICOLOR": "0"}, True, False),
        ({"CLICOLOR_FORCE": "1", "CLICOLOR": "0"}, False, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colour_where_it_is_wanted(
    environment: dict[str, str], is_terminal: bool, is_red: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream: Any = SimpleNamespace(isatty=lambda: is_terminal)
    assert paint("x", "red", stream) == ("\x1b[31mx\x1b[0m" if is_red else "x")


@pytest.mark.parametrize("words", [["--help"], ["help", "status"], ["completion", "bash"], ["--version"]])
def test_a_start_loads_little(words: list[str]) -> None:
    probe = (
        f"import sys; before = {{*sys.modules}}; sys.argv=['perfit', *{words}]\n"
        "from perfit_device.cli.main import run\n"
        "try: run()\nexcept SystemExit: pass\n"
        "print(*{*sys.modules} - before, file=sys.stderr)"  # an editable install loads much by itself
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    loaded = done.stderr.split()
    assert not {name.partition(".")[0] for name in loaded} & HEAVY
    assert len(loaded) < MOST_MODULES or words == ["--version"]  # which reads the package's metadata


def test_help_imports_no_command() -> None:
    """They are most of what a start of our own costs; a command imports itself alone."""
    probe = (
        "import sys; from perfit_device.cli.main import app\n"
        "from perfit_shared.command_tree import command_of\n"
        "command = command_of(app)\n"
        "for words in (['--help'], ['status', '--help']):\n"
        "    command.main(args=words, prog_name='perfit', standalone_mode=False)\n"
        "    print(*[name for name in sys.modules if name.startswith('perfit_device.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    usual = {f"perfit_device.cli.{name}" for name in ("common", "main", "prompts")}
    first, second = ({*line.split()} for line in done.stdout.splitlines() if "cli.main" in line)
    assert first == usual
    assert second - usual == {"perfit_device.cli.profile"}


def test_help_builds_no_command_but_its_own() -> None:
    probe = (
        "from perfit_device.cli.main import app; from perfit_shared.command_tree import command_of\n"
        "command = command_of(app)\n"
        "command.main(args=['help', 'status'], prog_name='perfit', standalone_mode=False)\n"
        "command.main(args=['--help'], prog_name='perfit', standalone_mode=False)\n"
        "print(sorted(command.commands._built))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['help', 'status']"


def test_what_is_deferred_is_listed_as_its_own_help_begins() -> None:
    for info in device.registered_commands:
        assert isinstance(info, Deferred)
        own = _help_of(info.load())
        for limit in (10, 30, 62):  # what a list of 80 columns leaves beside the longest name
            assert make_default_short_help(info.help or "", limit) == make_default_short_help(own, limit)


# -- what the pages say ------------------------------------------------------------------------------


def fenced(path: Path) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text("utf-8"), flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines]


PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.name != "help.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_are_commands(page: Path) -> None:
    """Names and options; examples in help run in test_manners_examples.py."""
    for line in fenced(page):
        if line.split()[:1] and line.split()[0] in APPS:
            parse(list(itertools.takewhile(lambda word: not _ENDS.match(word), shlex.split(line))))


_ENDS = re.compile(r"(\||>|&&|#|2>)")  # of a command's own words


def parse(words: list[str]) -> None:
    at: Any = command_of(APPS[words[0]]).make_context(words[0], words[1:])
    while hasattr(at.command, "commands"):
        name, command, rest = at.command.resolve_command(at, [*at._protected_args, *at.args])
        at = command.make_context(name, rest, parent=at)


def test_a_wrong_command_in_a_page_is_noticed() -> None:
    for line in ("perfit aks x", "perfit ask x --taks y", "perfit-cloud serve --nonsense"):
        with pytest.raises(TyperException):
            parse(line.split())


def test_the_page_has_every_exit_code() -> None:
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    table = re.findall(r"^\| ([\d, ]+) \|", text, flags=re.M)
    codes = {int(code) for row in table for code in row.split(",")}
    known = set(errors._EXIT_CODES.values()) | {errors.USAGE, errors.KEPT_OUT, errors.INTERRUPTED}
    assert codes == known | {0, 143, 129}


@pytest.mark.parametrize(
    ("script", "made"), [("generate_man.py", "docs/man"), ("draw_concepts.py", "docs/site/pictures")]
)
def test_generated_folders_are_current(script: str, made: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / made / path.name).read_bytes(), "run make help-page"


def test_the_wire_reference_is_current(tmp_path: Path) -> None:
    out = tmp_path / "reference.md"
    command = [sys.executable, str(ROOT / "scripts" / "generate_wire_reference.py"), "--out", str(out)]
    subprocess.run(command, check=True)
    assert out.read_bytes() == (ROOT / "docs" / "wire" / "reference.md").read_bytes(), "run make wire"
