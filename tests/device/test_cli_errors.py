"""How commands end: exit codes, errors as JSON, wrong usage, and values that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device.cli import progress
from perfit_device.cli.progress import Progress
from perfit_shared.command_line import run_command
from perfit_shared.errors import (
    Busy,
    CertificateExpired,
    ConfigError,
    IdentityRevoked,
    InvalidPrompt,
    InviteRefused,
    PerfitError,
    TooSlow,
    Unavailable,
    UpdateFailed,
    VaultBusy,
    WrongPassphrase,
    exit_code,
)
from soak.fuzzing.commands import leaves


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PerfitError("x"), 1),
        (InvalidPrompt("x"), 1),
        (ConfigError("x"), 1),
        (OSError(28, "full"), 1),
        (Unavailable("x"), 3),
        (Busy("x"), 3),
        (TooSlow("x"), 3),
        (IdentityRevoked("x"), 4),
        (CertificateExpired("x"), 4),
        (InviteRefused("x"), 4),
        (WrongPassphrase("x"), 6),
        (VaultBusy("x"), 6),
        (UpdateFailed("x"), 7),
        (KeyError("x"), 70),
    ],
)
def test_exit_codes_by_class(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_status_tells_by_its_code(ready: Perfit, cloud: Any) -> None:
    """It ended with 0, revoked or offline."""
    assert ready("status")[0] == 0
    cloud.fail = lambda method: IdentityRevoked("this device was revoked; ask the operator")
    code, out, _ = ready("status")
    assert code == 4 and "this device was revoked" in out
    assert json.loads(ready("status", "--json")[1])["cloud"].startswith("this device was revoked")
    cloud.fail = lambda method: None
    cloud.stop()
    assert ready("status")[0] == 3
    ready.fails("ask", "x", code=3)


def error_of(perfit: Perfit, *arguments: str) -> tuple[int, str, str]:
    """(exit code, code word, message) of an error as JSON."""
    code, out, err = perfit(*arguments)
    assert not out
    value = json.loads(err.splitlines()[-1])["error"]
    assert set(value) == {"code", "message"}
    return code, value["code"], value["message"]


def test_errors_are_json_under_json(ready: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.fail = lambda method: Busy("the cloud is busy", retry_ms=60_000)
    assert error_of(ready, "ask", "x", "--json") == (3, "busy", "the cloud is busy")
    assert error_of(ready, "--json", "ask", "x")[:2] == (3, "busy")
    assert error_of(ready, "fly", "--json")[:2] == (2, "usage")
    assert error_of(ready, "ask", "x", "--temperature", "hot", "--json")[:2] == (2, "usage")
    # As a text it is none.
    assert "perfit: the cloud is busy" in ready("ask", "--", "--json")[2]
    monkeypatch.setenv("PERFIT_PASSPHRASE", "wrong")
    assert error_of(ready, "status", "--json")[:2] == (6, "wrong_passphrase")


def test_a_fault_is_one_line_and_shows_where_when_asked(
    ready: Perfit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr("perfit_device.history.load", broken)
    code, _, err = ready("status")
    assert code == 70 and "a fault inside perfit (KeyError at test_cli_errors.py:" in err
    assert "a secret" not in err and "Traceback" not in err
    monkeypatch.setenv("PERFIT_TRACEBACK", "1")
    assert "Traceback" in ready("status")[2]


# -- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", leaves(), ids=" ".join)
def test_help_and_version_everywhere(
    name: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from perfit_cloud.cli.main import app as cloud
    from perfit_device.cli.main import app as device

    app = device if name[0] == "perfit" else cloud
    for flag, says in (("-h", "Usage:"), ("--help", "Usage:"), ("--version", f"{name[0]} 0.")):
        monkeypatch.setattr(sys, "argv", [*name, flag])
        with pytest.raises(SystemExit) as end:
            run_command(name[0], app)
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(says)


def test_texts_that_begin_with_a_dash(enrolled: Perfit) -> None:
    for command in (["ask", "-5 degrees"], ["history", "add", "-5 degrees", "cold"]):
        code, _, err = enrolled(*command)
        assert code == 2 and 'a text that begins with "-" goes behind --' in err
    assert enrolled("ask", "--mode", "base", "--", "-5 degrees")[0] == 0
    assert "goes behind" not in enrolled("status", "-x")[2], "it takes no text"


def test_values_that_cannot_be_are_named(ready: Perfit) -> None:
    for flags, says in (
        (["--epochs", "100000"], "epochs should be from 1 to 1000, not 100000"),
        (["--batch-size", "0"], "a batch size should be from 1 to 4096, not 0"),
        (["--seed", "-1"], "a seed should not be negative"),
        (["--lr", "nan"], "a learning rate should be above 0 and at most 10"),
        (["--checkpoint", "-1"], "--checkpoint should be a number of seconds, 0 or more"),
        (["--patience", "nan"], "--patience should be a number of seconds, 0 or more"),
    ):
        assert says in ready.fails("update", *flags, code=1)


# -- profiles ------------------------------------------------------------------------------------


def test_profiles_are_listed_and_chosen(
    enrolled: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """PERFIT_PROFILE was ignored in silence, and nothing listed them."""
    for name in ("work", "a.b"):
        enrolled.ok("--profile", name, "enroll", cloud.invite().encode())
    (home / "profiles" / "empty").mkdir()
    listed = {"a.b": False, "default": True, "work": False}
    assert enrolled.json("profiles") == [{"name": n, "current": c} for n, c in listed.items()]
    monkeypatch.setenv("PERFIT_PROFILE", "work")
    assert "* work" in enrolled.ok("profiles")
    enrolled.ok("history", "add", "a thing", "A Title")
    assert enrolled.json("status")["profile"] == "work"
    assert enrolled.json("status", "--profile", "default")["tasks"]["news_headline"]["examples"] == 0
    monkeypatch.setenv("PERFIT_PROFILE", "nobody")
    assert 'no profile "nobody"' in enrolled.fails("status")
    for name in ("../x", "default\n"):
        monkeypatch.setenv("PERFIT_PROFILE", name)
        assert "a profile's name should be" in enrolled.fails("status")


# -- progress ------------------------------------------------------------------------------------


class Terminal:
    """Standard error on a terminal so many columns wide."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...
    def fileno(self) -> int:
        return 2


@pytest.mark.parametrize("columns", [12, 200])
def test_progress_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was wider scrolled, once for every step."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    with Progress() as shown:
        for step in range(1, 4):
            shown.step(step, 1000, 1.5)
    lines = terminal.text.rstrip("\n").split("\r")[1:]
    assert len(lines) == 3 and all(len(line) < columns for line in lines)
    assert lines[0].startswith("step 1/1000")


# -- as processes, with the system's own streams ---------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        ("perfit --help > /dev/full", 1, "perfit: cannot write: No space left on device"),
        ("perfit --help >&-", 1, "perfit: cannot write: Bad file descriptor"),
        ("perfit history list 2>&- <&-", 1, ""),
        ("perfit --help | head -c 1 > /dev/null", 0, ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 perfit enroll --help > /dev/null", 0, ""),
        ("PYTHONIOENCODING=latin-1 perfit enroll --help > /dev/null", 0, ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 perfit enroll caf\u00e9", 1, "not an invite"),
        ("printf '\\377' | perfit enroll -", 1, "perfit: stdin is not text in UTF-8"),
        ("perfit-cloud serve --help > /dev/full", 1, "perfit-cloud: cannot write"),
        ("perfit-cloud devices --state $'\\377' 2>&1 >&- | cat", 0, ""),
    ],
)
def test_streams_of_a_shell(shell: str, code: int, says: str, home: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", shell],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    for trouble in ("Traceback", "Exception ignored", "fault inside"):
        assert trouble not in done.stderr + done.stdout
