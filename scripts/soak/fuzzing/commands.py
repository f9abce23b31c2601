"""Every command of both programs under streams, locales and arguments that nobody planned for.

    with Commands(folder) as commands:
        [outcome] = commands.run([Case("perfit", ("ask", "x"), stdout="full")])

A process of its own loads both programs once, and forks for every list of cases: the fork makes their
streams as Python does at start, runs the command, and flushes as Python does at exit. A profile lies in
`folder`, and what its cloud would say is made up in the process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from hypothesis import strategies as st

from soak.fuzzing.checking import Target, Unsound

__all__ = [
    "ENCODINGS",
    "INPUTS",
    "NAME",
    "OUTPUTS",
    "Case",
    "Commands",
    "Outcome",
    "bare_words",
    "leaves",
    "targets",
    "words_of",
]

NAME = "commands"
INPUTS = ("text", "bytes", "empty", "closed")
OUTPUTS = ("file", "full", "closed", "gone")  # gone: a pipe that nobody reads
ENCODINGS = ("utf-8", "latin-1", "ascii")
_PASSPHRASE = "correct horse"  # noqa: S105 - protects nothing
_NOTHING = SimpleNamespace(params=[])
_CODES = {0, 1, 2, 3, 4, 5, 6, 7}


@dataclass(frozen=True)
class Case:
    """One run of a command. Words are text with surrogates for bytes that are no UTF-8."""

    program: str
    words: tuple[str, ...]
    stdin: str = "text"
    stdout: str = "file"
    stderr: str = "file"
    encoding: str = "utf-8"  # of the streams
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    problem: str = ""  # what escaped from the program, or was left for the exit

    def check(self, case: Case) -> None:
        """Raises Unsound on a traceback, a fault, an unknown code, or silence about an error."""
        said = self.err
        if self.problem or "Traceback" in said or "fault inside" in said or "Exception ignored" in said:
            raise Unsound(f"{self.problem or said[-400:]} [{' '.join(case.words)[:80]}]")
        if self.code not in _CODES:
            raise Unsound(f"exit code {self.code} [{' '.join(case.words)[:80]}]")
        if self.code in (1, 3, 4, 6, 7) and not said and (case.stdout, case.stderr) == ("file", "file"):
            raise Unsound(f"exit code {self.code} without a word [{' '.join(case.words)[:80]}]")
        if self.code and said and case.words[-1:] == ("--json",) and case.stderr == "file":
            _check_json(said.splitlines()[-1], case)


def _check_json(line: str, case: Case) -> None:
    """Raises Unsound where --json, as the last word and a flag, does not make an error JSON."""
    options = [p for p in leaves().get(_leaf(case), _NOTHING).params if getattr(p, "is_flag", False)]
    flags = {name for option in options for name in option.opts}
    if "--json" not in flags or "--" in case.words:
        return
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if set(json.loads(line)["error"]) == {"code", "message"}:
            return
    raise Unsound(f"an error that is no JSON: {line[:200]} [{' '.join(case.words)[:80]}]")


def _leaf(case: Case) -> tuple[str, ...]:
    """The command that the words begin with."""
    name = (case.program,)
    for word in case.words:
        if (*name, word) not in leaves():
            break
        name = (*name, word)
    return name


# -- all commands ------------------------------------------------------------------------------------


@functools.cache
def leaves() -> dict[tuple[str, ...], Any]:
    """(program, words of the command) → the command, of both programs, groups included."""
    from perfit_cloud.cli.main import app as cloud
    from perfit_device.cli.main import app as device
    from perfit_shared.command_tree import command_of

    found: dict[tuple[str, ...], Any] = {}

    def walk(command: Any, name: tuple[str, ...]) -> None:
        found[name] = command
        for word, child in getattr(command, "commands", {}).items():
            walk(child, (*name, word))

    walk(command_of(device), ("perfit",))
    walk(command_of(cloud), ("perfit-cloud",))
    return found


# What leads further into a command than made-up values.
_MORE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("perfit", "ask"): ("-",),
    ("perfit", "enroll"): ("-",),
    ("perfit", "update"): ("--epochs", "1"),
    ("perfit", "evaluate"): ("--answers",),
    ("perfit", "history", "import"): ("-", "--task", "news_headline"),
    ("perfit", "forget"): ("--all", "--yes"),
    ("perfit", "history", "forget"): ("--all", "--yes"),
    ("perfit", "backup"): ("-",),
    ("perfit", "restore"): ("-",),
    ("perfit", "unenroll"): ("--yes",),
    ("perfit", "versions", "drop"): ("--all", "--yes"),
    ("perfit", "profiles", "remove"): ("default", "--yes"),
}
# What keeps a command from going on to what takes seconds, or starts the program anew.
# With hardening it would start the program anew; on an address of this machine it would serve for ever.
_ALWAYS = {
    ("perfit-cloud", "serve"): ("--set", "hardening=off", "--model", "nowhere"),
    ("perfit", "serve"): ("--host", "192.0.2.1"),
}


def bare_words(name: tuple[str, ...]) -> tuple[str, ...]:
    """The command without what it needs."""
    return (*name[1:], *_ALWAYS.get(name, ()))


def words_of(name: tuple[str, ...], command: Any, *, text: str = "x", path: str = "none") -> list[str]:
    """Words for a command, with `text` and `path` wherever it needs one."""
    words = [*bare_words(name)]
    if (text, path) == ("x", "none") and name in _MORE:
        return [*words, *_MORE[name]]
    for parameter in command.params:
        if not parameter.required:
            continue
        value = {"int": "1", "float": "1"}.get(parameter.type.name, path)
        value = text if parameter.type.name == "str" else value
        words += [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
    return words


# -- the process -------------------------------------------------------------------------------------


class Commands:
    """The process that runs them, with a home in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        script = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "soak.fuzzing.commands_child", str(folder)],
            env={**os.environ, "PYTHONPATH": script, "PERFIT_HOME": str(folder / "home")}
            | {
                "HOME": str(folder),  # where perfit-cloud keeps its state
                "PERFIT_PASSPHRASE": _PASSPHRASE,
                "PERFIT_BACKUP_PASSPHRASE": _PASSPHRASE,
                "COLUMNS": "80",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "XDG_CONFIG_HOME": str(folder / "config"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
        )

    def run(self, cases: Sequence[Case]) -> list[Outcome]:
        """What becomes of them, one after the other, each from the same home."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise Unsound("a process without pipes")
        stdin.write(json.dumps([asdict(case) for case in cases]).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise Unsound("the process that forks has died")
        return [Outcome(**values) for values in json.loads(line)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(30)
        self._process.stdout.close()  # type: ignore[union-attr]


# -- as a target -------------------------------------------------------------------------------------


@contextlib.contextmanager
def targets(work: Path) -> Iterator[list[Target]]:
    with Commands(work) as commands:

        def check(case: Case) -> str:
            [outcome] = commands.run([case])
            outcome.check(case)
            return f"exit {outcome.code}"

        yield [Target(NAME, 3, _cases(), check, seconds=60.0)]


def _cases() -> st.SearchStrategy[Case]:
    found = leaves()
    names = st.sampled_from(sorted(found))
    # What a command line can hold: no null bytes. Surrogates are bytes that are no UTF-8. No slashes or
    # tildes, for what is made by a name should be made in the folder of this run.
    plain = st.characters(exclude_characters="\0/~", exclude_categories=("Cs",))
    word = st.text(plain | st.sampled_from("\udcff\udc80\udce9"), max_size=20)
    flags = st.sampled_from(["--json", "--help", "-h", "--version", "--", "-", "--task", "--profile", "-5"])
    more = st.lists(word | flags, max_size=3)

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        name = draw(names)
        words = words_of(name, found[name], text=draw(st.just("x") | word), path=draw(st.just("none") | word))
        passphrase = draw(st.just("") | word)
        return Case(
            name[0],
            (*words, *draw(more)),
            draw(st.sampled_from(INPUTS)),
            draw(st.sampled_from(OUTPUTS)),
            draw(st.sampled_from(OUTPUTS)),
            draw(st.sampled_from(ENCODINGS)),
            {"PERFIT_PASSPHRASE": passphrase} if passphrase else {},
        )

    return cases()
