"""`perfit-cloud server`, `rotate`, `migrate-state` and roles, as an operator types them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from tests.support.authority import DAY, enrolled, open_authority
from typer.testing import CliRunner

from local_postgres import MISSING, Cluster, server_programs
from perfit_cloud.cli.main import app
from perfit_cloud.config import CloudConfig
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_shared.errors import ConfigError, InvalidInput


def said(*words: object) -> str:
    """Standard output of a command in this process; its error is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def state(tmp_path: Path) -> Path:
    open_authority(tmp_path / "state").close()
    return tmp_path / "state"


def test_a_server_gets_its_files_and_can_be_revoked(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "replica"
    told = json.loads(said("server", "cloud.example.com", "--out", out, "--state", state, "--json"))
    assert {path.name for path in out.iterdir()} == {"server.pem", "server_ca.crt", "device_ca.crt"}
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    names = ServerFiles(out).identity().certificate.extensions
    assert "cloud.example.com" in str(list(names))
    assert f"{told['identity']}  issued" in (listed := said("devices", "--state", state))
    assert "server cloud.example.com" in listed
    assert "revoked" in said("revoke", told["identity"][:8], "--state", state)
    with pytest.raises(ConfigError, match="holds something"):
        said("server", "cloud.example.com", "--out", out, "--state", state)


def test_a_rotation_is_said_step_by_step(state: Path) -> None:
    authority = open_authority(state)
    enrolled(authority)
    authority.close()
    assert said("rotate", "--state", state) == "finished; next: begin, which waits for 0 to renew\n"
    assert "begun on" in said("rotate", "begin", "--state", state)
    found = json.loads(said("rotate", "--state", state, "--json"))
    assert (found["step"], found["next"], len(found["waits_for"])) == ("begun", "switch", 1)
    with pytest.raises(InvalidInput, match="have not renewed"):
        said("rotate", "switch", "--state", state)
    assert "switched on" in said("rotate", "switch", "--now", "--state", state)
    with pytest.raises(InvalidInput, match="is no step"):
        said("rotate", "back", "--state", state)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"roles": "answers"}, "needs the database"),
        ({"roles": "answers,updates", "database": "host=x"}, "authority_address"),
        ({"roles": "enrolment"}, "public_address"),
        ({"roles": "enrolment,training"}, 'not "training"'),
        ({"roles": ""}, "some of"),
        ({"roles": "answers", "database": "host=x", "authority_address": "here"}, "host:port"),
    ],
)
def test_roles_that_cannot_be_are_refused(change: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        CloudConfig(**change)  # type: ignore[arg-type]


def test_who_does_not_enrol_makes_no_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` or `invite` on it would have made one, and invites that no device can use."""
    monkeypatch.setenv("PERFIT_CLOUD_ROLES", "answers")
    monkeypatch.setenv("PERFIT_CLOUD_DATABASE", "host=nowhere")
    monkeypatch.setenv("PERFIT_CLOUD_AUTHORITY_ADDRESS", "cloud.example.com:7444")
    (tmp_path / "state").mkdir(mode=0o700)
    for command in ("status", "devices"):
        with pytest.raises(ConfigError, match="does not enrol"):
            said(command, "--state", tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.skipif(server_programs() is None, reason=MISSING)
def test_a_state_moves_and_its_devices_are_listed_from_there(
    state: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    authority = open_authority(state, life=DAY)
    enrolled(authority)
    authority.close()
    before, database = said("devices", "--state", state), cluster.database()
    assert "moved 1 devices" in said("migrate-state", database, "--state", state)
    with pytest.raises(ConfigError, match="moved to PostgreSQL"):
        said("devices", "--state", state)
    monkeypatch.setenv("PERFIT_CLOUD_DATABASE", database)
    assert said("devices", "--state", state) == before
