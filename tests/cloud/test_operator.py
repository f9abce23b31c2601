"""What an operator starts with: `perfit-cloud init`, `status`, labels, and the files of deploy/."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.authority import csr_of, enrolled, new_key
from tests.support.cloud import Running
from typer.testing import CliRunner

from perfit_cloud.cli.main import app
from perfit_cloud.cli.status import _health
from perfit_cloud.config import CloudConfig, load_config
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_shared.errors import IdentityRevoked, InvalidInput, InviteRefused, NotFound, PerfitError

DEPLOY = Path(__file__).parents[2] / "deploy"
Command = Callable[..., str]


@pytest.fixture
def cloud(tmp_path: Path) -> Command:
    """A command's output; what went wrong is raised."""

    def run(*words: str) -> str:
        done: Any = CliRunner().invoke(app, [*words, "--state", str(tmp_path / "state")])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return str(done.stdout)

    return run


# -- init ----------------------------------------------------------------------------------------


def test_init_writes_what_serve_and_systemd_read_and_overwrites_nothing(
    cloud: Command, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    told = cloud("init")
    config, unit = state / "perfit-cloud.toml", state / "perfit-cloud.service"
    assert f"wrote {config}" in told and f"wrote {unit}" in told and "next:" in told
    assert load_config(file=config, environment={}) == CloudConfig(state=state)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (config, unit)} == {0o600}
    assert (state / "server_ca.pem").is_file()
    config.write_text("# mine\n")
    before = unit.read_bytes()
    assert f"kept {config}" in cloud("init")
    assert (config.read_text(), unit.read_bytes()) == ("# mine\n", before)


def test_every_setting_in_the_file_is_its_default(cloud: Command, tmp_path: Path) -> None:
    """A comment that shows another value would mislead, and an unknown key would not start."""
    printed = cloud("init", "--print")
    assert not (tmp_path / "state").exists()
    shown = re.findall(r"^# (\w+ = .+)$", printed, re.M)
    assert len(shown) >= 10
    (tmp_path / "all.toml").write_text("\n".join(shown))
    assert load_config(file=tmp_path / "all.toml", environment={}) == CloudConfig()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_reads_the_unit(cloud: Command, tmp_path: Path) -> None:
    cloud("init")
    unit = tmp_path / "state" / "perfit-cloud.service"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_a_unit_cannot_name_is_refused(tmp_path: Path) -> None:
    done: Any = CliRunner().invoke(app, ["init", "--state", str(tmp_path / "a b")])
    assert isinstance(done.exception, InvalidInput)
    assert not (tmp_path / "a b").exists()


# -- who may call --------------------------------------------------------------------------------


def test_labels_go_from_invites_to_devices_and_can_change(
    authority: Authority, cloud: Command, tmp_path: Path
) -> None:
    secret, _ = authority.invite(600, "Ann's laptop")
    authority.invite(600, "Bob")
    lines = [json.loads(line) for line in cloud("invites", "--json").splitlines()]
    assert {line["label"] for line in lines} == {"Ann's laptop", "Bob"}
    authority.enroll(secret, csr_of(new_key()))
    (device,) = [json.loads(line) for line in cloud("devices", "--json").splitlines()]
    assert device["label"] == "Ann's laptop"
    assert cloud("devices").rstrip().endswith("Ann's laptop")
    cloud("label", device["identity"][:8], "Ann, stolen")
    assert cloud("devices").rstrip().endswith("Ann, stolen")
    assert [line.split()[-1] for line in cloud("invites").splitlines()] == ["Bob"]
    for bad in ("two\nlines", "x" * 101):
        with pytest.raises(InvalidInput, match="one line"):
            cloud("label", device["identity"], bad)


def test_an_open_invite_is_withdrawn(authority: Authority, cloud: Command) -> None:
    secret, _ = authority.invite(600)
    id_ = json.loads(cloud("invites", "--json"))["id"]
    assert secret.hex()[: len(id_)] != id_
    assert cloud("invites", "--revoke", id_[:6]) == f"withdrew invite {id_}\n"
    assert cloud("invites") == ""
    with pytest.raises(InviteRefused):
        authority.enroll(secret, csr_of(new_key()))
    with pytest.raises(NotFound, match="no open invite"):
        cloud("invites", "--revoke", id_)


def test_a_revoked_device_is_welcome_again(authority: Authority, cloud: Command) -> None:
    certificate = enrolled(authority)
    identity = identity_of(certificate)
    cloud("revoke", identity)
    authority.refresh()
    with pytest.raises(IdentityRevoked):
        authority.check(certificate)
    assert identity in cloud("unrevoke", identity[:8])
    authority.refresh()
    authority.check(certificate)


# -- status --------------------------------------------------------------------------------------


def test_status_of_a_cloud_that_does_not_run(authority: Authority, cloud: Command) -> None:
    enrolled(authority)
    authority.revoke(identity_of(enrolled(authority)))
    authority.invite(600)
    found = json.loads(cloud("status", "--json"))
    assert (found["health"], found["model"], found["open_invites"]) == ("not running", None, 1)
    assert found["devices"] == {"welcome": 1, "lapsed": 0, "revoked": 1}
    assert found["certificate_days_left"]["server_ca"] > 3600
    assert "1 welcome, 0 lapsed, 1 revoked" in cloud("status")
    with pytest.raises(PerfitError, match="does not serve: not running"):
        cloud("status", "--check")


def test_health_is_asked_of_the_enrolment_listener(run: Callable[..., Running]) -> None:
    running = run()
    addresses = running.server.addresses
    der = running.authority.server_ca_der
    assert _health(running.config, addresses, der) == "SERVING"
    other = Authority(running.config.state.parent / "other", certificate_seconds=60, lapse_seconds=60)
    assert _health(running.config, addresses, other.server_ca_der).startswith("no answer")
    other.close()


# -- deploy/ -------------------------------------------------------------------------------------


def test_the_container_runs_as_nobody_in_particular() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line.split()[1] for line in lines if line.startswith("FROM")] == ["${BASE}"] * 2
    assert "ARG BASE=python:3.11-slim" in lines  # an operator may name one by digest
    assert lines.index("USER 10001") < lines.index('ENTRYPOINT ["perfit-cloud"]')
    variables = dict(re.findall(r"(PERFIT_CLOUD_\w+)=(\S+)", "\n".join(lines)))
    public = {"PERFIT_CLOUD_PUBLIC_ADDRESS": "c:1", "PERFIT_CLOUD_PUBLIC_ENROL_ADDRESS": "c:2"}
    assert load_config(environment={**variables, **public}).state == Path("/var/lib/perfit")
