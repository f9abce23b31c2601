"""`perfit-cloud` as an operator types it, in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import RUN, fork

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.state_folder import Addresses
from perfit_shared.invites import Invite


def cloud(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERFIT")}
    return subprocess.run(
        [*RUN, *words], capture_output=True, text=True, timeout=120, check=False, env=kept | environment
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line on stderr of a command that failed."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def refusal(tmp_path: Path, *words: str) -> str:
    """The single line on stderr of a `serve` that fails, forked where torch is loaded."""
    state = {"PERFIT_CLOUD_STATE": str(tmp_path / "state")}
    process = fork("serve", "--enrol-address", "127.0.0.1:0", *words, errors=tmp_path / "errors", env=state)
    assert process.wait(120) == 1
    assert process.stdout.read() == ""
    (line,) = process.errors().splitlines()
    (tmp_path / "errors").unlink()
    return line


@pytest.mark.slow
def test_serve_invite_revoke_and_stop(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    load: Callable[[str], BaseModel],
    make_artefact: Callable[..., Artefact],
) -> None:
    base, state = load("llama"), str(tmp_path / "state")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, name in zip(folders, ("news_headline", "news_categorize"), strict=True):
        make_artefact(base, name).save(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        "serve",
        "--model",
        str(model_folder("llama")),
        "--state",
        state,
        "--json",
        "--threads",
        "1",
        "--address",
        "127.0.0.1:0",
        "--enrol-address",
        "127.0.0.1:0",
        "--set",
        "drain_seconds=1",
        "--set",
        f"metrics_address={metrics}",
        "--artefact",
        str(folders[0]),
        "--artefact",
        str(folders[1]),
    ]
    with subprocess.Popen([*RUN, *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["fingerprint"] == base.fingerprint
            assert told["artefacts"] == ["news_headline", "news_categorize"]
            assert not told["address"].endswith(":0")
            with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=60) as reply:
                page = reply.read().decode()
            assert 'perfit_engine_alive{engine="updates"} 1.0' in page
            assert f'fingerprint="{base.fingerprint}"' in page
            lines = cloud("invite", "--state", state, "--count", "2", "--life", "15m").stdout.split()
            invites = [Invite.decode(line) for line in lines]
            assert len({invite.secret for invite in invites}) == 2
            assert {invite.address for invite in invites} == {told["enrol_address"]}
            assert cloud("devices", "--state", state).stdout == ""
            seen = json.loads(cloud("status", "--json", "--state", state, "--check").stdout)
            assert (seen["health"], seen["open_invites"]) == ("SERVING", 2)
            assert (seen["fingerprint"], seen["artefacts"]) == (base.fingerprint, told["artefacts"])
            assert "no identity starts with" in one_line(cloud("revoke", "abcdef", "--state", state))
            second = one_line(cloud(*words))
            assert "another perfit-cloud serves from" in second
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


# Libraries that complain about what they work on, once everything is set up.
TALKATIVE = """
import logging
from perfit_cloud.service.server import CloudServer
start = CloudServer.start
def talk(self):
    start(self)
    for name in ("transformers", "transformers.generation"):
        logging.getLogger(name).error("ids of a prompt: 42 42 42")
CloudServer.start = talk
from perfit_cloud.cli.main import run
run()
"""


@pytest.mark.slow
def test_start_up_line_for_people(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    words = ["serve", "--model", str(model_folder("llama")), "--address", "127.0.0.1:0"]
    words += ["--enrol-address", "127.0.0.1:0", "--state", str(tmp_path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TALKATIVE, *words], **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving llama") and line.rstrip().endswith("; float32: as asked for")
            assert "no artefacts on 127.0.0.1:" in line
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
            assert (process.returncode, rest) == (0, "")
            first, second = errors.splitlines()
            assert first.startswith("nobody has enrolled yet: perfit-cloud invite --state ")
            assert second.startswith("and there is no artefact")
        finally:
            process.kill()


def test_artefact_of_another_model_is_not_served(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    load: Callable[[str], BaseModel],
    make_artefact: Callable[..., Artefact],
) -> None:
    replace(make_artefact(load("llama")), fingerprint="0" * 64).save(tmp_path / "a")
    words = ["--model", str(model_folder("llama")), "--artefact", str(tmp_path / "a")]
    assert "trained on another model" in refusal(tmp_path, *words)


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    load: Callable[[str], BaseModel],
    make_artefact: Callable[..., Artefact],
) -> None:
    good, short, artefact = model_folder("llama"), tmp_path / "short", tmp_path / "artefact"
    shutil.copytree(good, short)
    os.truncate(short / "model.safetensors", 1000)
    make_artefact(load("llama")).save(artefact)
    os.truncate(artefact / "seed.safetensors", 100)
    (tmp_path / "file").touch()
    taken = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    mistakes = [
        (good, ["--set", "device=cuda:99"], "device"),
        (good, ["--set", "device=quantum"], "device"),
        (good, ["--dtype", "float16"], "dtype"),
        (good, ["--artefact", str(artefact)], "not a usable artefact"),
        (good, ["--artefact", "none"], "not a usable artefact"),
        (good, ["--address", address], f"cannot listen on {address}"),
        (good, ["--config", str(tmp_path)], "cannot read"),
        (good, ["--state", str(tmp_path / "file")], "state folder"),
        (short, [], "cannot load"),
    ]
    with taken:
        for model, words, says in mistakes:
            assert says in refusal(tmp_path, "--model", str(model), *words)


def test_who_may_call_is_decided_without_a_model(tmp_path: Path) -> None:
    """An invite took six seconds, all of them for libraries that it does not use."""
    authority = Authority(tmp_path / "state", certificate_seconds=60, lapse_seconds=60)
    authority.close()
    Addresses("a:1", "b:2").save(tmp_path / "state")
    words = ["invite", "--state", str(tmp_path / "state")]
    program = (
        "import sys; from perfit_cloud.cli.main import run; sys.argv[0] = 'perfit-cloud'\n"
        "try: run()\nfinally: print([m for m in ('torch', 'transformers', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    invite, loaded = done.stdout.splitlines()
    assert Invite.decode(invite).address == "b:2"
    assert loaded == "[]"


def test_errors_of_the_system_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "state" / "serve.lock").mkdir(parents=True)
    (tmp_path / "state").chmod(0o700)
    line = one_line(cloud("serve", "--model", "m", PERFIT_CLOUD_STATE=str(tmp_path / "state")))
    assert line.startswith("perfit-cloud: ")
    assert "serve.lock: Is a directory" in line


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["serve"], {"PERFIT_CLOUD_MODEL": ""}, "model is empty"),
        (["serve", "--model", "m", "--set", "modle=x"], {}, '"modle"'),
        (["serve", "--model", "m", "--set", "modle"], {}, "KEY=VALUE"),
        (["serve", "--model", "m"], {"PERFIT_CLOUD_MODLE": "x"}, "PERFIT_CLOUD_MODLE"),
        (["serve", "--model", "m", "--config", "none.toml"], {}, "none.toml"),
        (["serve", "--model", "m", "--address", "nowhere"], {}, "host:port"),
        (["invite"], {}, "no server has run"),
        (["invite", "--life", "soon"], {}, "--life"),
        (["devices"], {}, "no state folder"),
        (["revoke", "abcdef"], {}, "no state folder"),
    ],
)
def test_mistakes_are_one_clear_line(
    tmp_path: Path, words: list[str], environment: dict[str, str], says: str
) -> None:
    state = {"PERFIT_CLOUD_STATE": str(tmp_path / "state")}
    assert says in one_line(cloud(*words, **state, **environment))


def test_without_the_extra_it_says_which_to_install() -> None:
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: n != 'torch' and find(n)"
    code = f"{hide} or None; {RUN[2]}"
    done = subprocess.run([sys.executable, "-c", code, "serve"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'perfit[cloud]'" in done.stderr


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['perfit-cloud', 'serve', '--help']\n"
        "from perfit_cloud.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: print({'torch', 'transformers', 'grpc'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
