"""`perfit doctor`, completion in real shells, and manual pages that mandoc takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device.operations import doctor
from perfit_shared.errors import IdentityRevoked

ROOT = Path(__file__).resolve().parents[2]


def findings(perfit: Perfit, code: int = 0) -> dict[str, tuple[str, str, str]]:
    """name → (state, text, fix); whatever is broken has a fix."""
    got, out, _ = perfit("doctor", "--json")
    found = {one["name"]: (one["state"], one["text"], one["fix"]) for one in json.loads(out)["findings"]}
    assert got == code, found
    assert all(fix and "\n" not in fix for state, _, fix in found.values() if state == "broken")
    return found


def test_doctor_before_anything(perfit: Perfit) -> None:
    found = findings(perfit)
    assert found["home"][0] == found["profile"][0] == "note"
    assert "perfit enroll" in found["profile"][2] and "vault" not in found


def test_doctor_of_a_sound_profile(ready: Perfit) -> None:
    ready.ok("update")
    found = findings(ready)
    assert {state for state, _, _ in found.values()} == {"ok"}
    assert {"clock", "home", "disk", "proxy", "agent", "vault", "certificate", "cloud"} <= set(found)
    assert "20 examples" in found["vault"][1] and found["shift news_headline"][1].startswith("version 1")
    assert "ok      clock" in ready.ok("doctor")


def test_doctor_without_a_passphrase(ready: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERFIT_PASSPHRASE")
    found = findings(ready)
    assert found["vault"][0] == "note" and "locked" in found["vault"][1] and "cloud" not in found
    monkeypatch.setenv("PERFIT_PASSPHRASE", "wrong")
    assert findings(ready, 1)["vault"][0] == "broken"


def test_doctor_finds_what_is_broken(
    ready: Perfit, cloud: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.ok("update")
    cloud.version = "v2"
    assert "perfit update --fresh" in findings(ready, 1)["shift news_headline"][2]
    cloud.fail = lambda method: IdentityRevoked("this device was revoked; ask the operator")
    assert "new invite" in findings(ready, 1)["cloud"][2]
    cloud.stop()
    assert "nothing answers at 127.0.0.1" in findings(ready, 1)["cloud"][1]
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    assert "no_proxy" in findings(ready, 1)["proxy"][2]
    (home / "profiles").chmod(0o700)
    home.chmod(0o777)
    state, text, fix = findings(ready, 1)["home"]
    assert state == "broken" and "others can write" in text and "chmod" in fix
    home.chmod(0o700)
    path = home / "profiles" / "default" / "vault.db"
    os.utime(path, (2e9, 2e9))
    assert findings(ready, 1)["clock"][0] == "broken"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert findings(ready, 1)["disk"][0] == "broken"
    path.write_bytes(path.read_bytes()[:5000])
    found = findings(ready, 1)
    assert "broken" in {found[name][0] for name in ("profile", "vault") if name in found}


def test_doctor_says_what_agent_is_gone(ready: Perfit, home: Path) -> None:
    (home / "profiles" / "default" / "agent.sock").touch()
    assert findings(ready)["agent"][0] == "note"


# -- completion --------------------------------------------------------------------------------------

needs = {
    shell: pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")
    for shell in ("bash", "zsh", "fish", "mandoc")
}
BASH = """
eval "$(perfit completion bash)"
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _perfit_completion perfit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
autoload -Uz compinit && compinit -u -d {home}/zcompdump; source <(perfit completion zsh)
_describe() {{ print -l -- $found; }}; _files() {{ print FILES; }}
words=({words}); CURRENT=${{#words}}; _perfit_completion
"""
FISH = "perfit completion fish | source; complete -C {line}"
WORDS: dict[str, tuple[list[str], set[str]]] = {
    "commands": (["perfit", "st"], {"status"}),
    "groups": (["perfit", "history", "l"], {"list"}),
    "options": (["perfit", "ask", "--temp"], {"--temperature"}),
    "values": (["perfit", "ask", "--mode", "c"], {"collective"}),
    "profiles": (["perfit", "ask", "--profile", "wo"], {"work"}),
    "tasks": (["perfit", "ask", "--task", "news_h"], {"news_headline"}),
}


def run_shell(command: list[str], home: Path) -> str:
    (home / "profiles" / "work").mkdir(parents=True, exist_ok=True)
    (home / "profiles" / "work" / "vault.db").touch()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment: Mapping[str, str] = {**os.environ, "PATH": path, "HOME": str(home), "TERM": "dumb"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=home)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("what", WORDS)
@pytest.mark.parametrize("shell", [pytest.param(s, marks=needs[s]) for s in ("bash", "zsh", "fish")])
def test_completion_in_a_shell(shell: str, what: str, home: Path) -> None:
    words, expected = WORDS[what]
    script = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    text = script.format(words=" ".join(words), home=home, line=repr(" ".join(words)))
    out = run_shell(
        [shell, *([] if shell == "fish" else ["-f"] if shell == "zsh" else ["--norc"]), "-c", text], home
    )
    assert {line.split("\t")[0].split(":")[0] for line in out.splitlines()} == expected


@needs["bash"]
def test_paths_and_nonsense_are_left_to_the_shell(home: Path) -> None:
    for words in ("perfit history import mi", "perfit ask --nonsense ''"):
        assert run_shell(["bash", "--norc", "-c", BASH.format(words=words)], home).split() == []


@needs["mandoc"]
@pytest.mark.parametrize("program", ["perfit", "perfit-cloud"])
def test_manual_pages_are_sound(program: str) -> None:
    page = str(ROOT / "docs" / "man" / f"{program}.1")
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []
    shown = subprocess.run(["mandoc", "-T", "utf8", page], capture_output=True, text=True, check=True).stdout
    assert "Show this message and exit" in shown
