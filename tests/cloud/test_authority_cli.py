"""`perfit-cloud devices` and `prune`, on a state folder without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.authority import DAY, enrolled, renewed
from typer.testing import CliRunner

from perfit_cloud.cli.main import app
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_shared.errors import CertificateSuperseded, ConfigError, InvalidInput


@pytest.fixture
def cloud(authority: Authority, tmp_path: Path) -> Callable[..., str]:
    """A command's output; what went wrong is raised."""

    def run(*words: str) -> str:
        authority.refresh()
        done: Any = CliRunner().invoke(app, [*words, "--state", str(tmp_path / "state")])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return str(done.output)

    return run


def test_devices_show_who_came_with_a_certificate_that_was_replaced(
    authority: Authority, cloud: Callable[..., str]
) -> None:
    old, other = enrolled(authority), enrolled(authority)
    authority.check(renewed(authority, old))
    assert "replaced" not in cloud("devices")
    with pytest.raises(CertificateSuperseded):
        authority.check(old)
    lines = {line.split()[0]: line for line in cloud("devices").splitlines()}
    assert f"replaced certificate presented {datetime.now(UTC):%Y-%m-}" in lines[identity_of(old)]
    assert "replaced" not in lines[identity_of(other)]
    rows = {row["identity"]: row for row in map(json.loads, cloud("devices", "--json").splitlines())}
    assert rows[identity_of(old)]["superseded"] % DAY == 0
    assert rows[identity_of(other)]["superseded"] is None


def test_prune_says_what_it_deleted(
    authority: Authority, cloud: Callable[..., str], wrong_clock: Callable[[float], None]
) -> None:
    wrong_clock(-100 * DAY)
    authority.check(enrolled(authority))
    authority.refresh()
    wrong_clock(0)
    fresh, today = enrolled(authority), datetime.now(UTC).date()
    assert cloud("prune", "--day", f"{today}") == "deleted 1 identities and 1 invites\n"
    assert cloud("prune", "--day", f"{today}") == "deleted 0 identities and 0 invites\n"
    assert cloud("devices").split()[0] == identity_of(fresh)
    with pytest.raises(InvalidInput, match="still to come"):
        cloud("prune", "--day", f"{today + timedelta(days=2)}")
    assert "--day" in cloud("prune")


def test_a_folder_that_others_can_write_is_refused(cloud: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "state").chmod(0o777)
    for words in (["devices"], ["revoke", "abcdef"], ["prune", "--day", "2020-01-01"]):
        with pytest.raises(ConfigError, match="others can write"):
            cloud(*words)
