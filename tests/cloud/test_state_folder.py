"""In a folder that others could write, another user swapped the authority and the database, and it served."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.support.authority import open_authority

from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.state_folder import Addresses, only_server
from perfit_shared.errors import ConfigError

SOMEBODY = 54321
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)


def opened_in_a_group(state: Path, *, trusts_group: bool) -> None:
    Authority(state, certificate_seconds=60, lapse_seconds=60, trusts_group=trusts_group).close()


@pytest.mark.parametrize("at", ["..", ".", "server_ca.pem", "device_ca.pem", "authority.db"])
def test_what_others_can_write_is_refused(authority: Authority, tmp_path: Path, at: str) -> None:
    authority.close()
    path = tmp_path / "state" / at
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | 0o002)
    with pytest.raises(ConfigError, match=f"others can write .*chmod o-w {path.resolve()}"):
        open_authority(tmp_path / "state")
    path.chmod(mode)
    open_authority(tmp_path / "state")


@pytest.mark.parametrize(
    "name", ["authority.db-journal", "authority.db-wal", "addresses.json", "serve.lock", "server.pem"]
)
def test_files_that_sqlite_or_invite_would_believe_are_looked_at(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    authority.close()
    path = tmp_path / "state" / name
    path.write_bytes(b"")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match=f"chmod g?o-w {path}"):
        open_authority(tmp_path / "state")


def test_what_we_make_ourselves_is_taken_again_whatever_the_umask(tmp_path: Path) -> None:
    state, umask = tmp_path / "new" / "state", os.umask(0)
    try:
        open_authority(state).close()
        Addresses("a:1", "a:2").save(state)
        with only_server(state):
            open_authority(state).close()
    finally:
        os.umask(umask)
    assert Addresses.load(state).address == "a:1"


@as_root
@pytest.mark.parametrize("at", [".", "device_ca.pem", "authority.db"])
def test_what_is_another_users_is_refused(authority: Authority, tmp_path: Path, at: str) -> None:
    authority.close()
    os.chown(tmp_path / "state" / at, SOMEBODY, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        open_authority(tmp_path / "state")


@as_root
def test_a_containers_volume_is_taken_when_the_operator_says_so(tmp_path: Path) -> None:
    """Its folder is the group's, and so are all files in it once it was mounted again."""
    state = tmp_path / "volume"
    state.mkdir()
    os.chown(state, 0, SOMEBODY)
    state.chmod(0o2770)
    with pytest.raises(ConfigError, match="set state_writers=group"):
        opened_in_a_group(state, trusts_group=False)
    opened_in_a_group(state, trusts_group=True)
    for path in state.iterdir():
        path.chmod(0o660)
    opened_in_a_group(state, trusts_group=True)
    (state / "device_ca.pem").chmod(0o664)
    with pytest.raises(ConfigError, match="chmod 600"):
        opened_in_a_group(state, trusts_group=True)
