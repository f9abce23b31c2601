"""Where a cloud's identities are opened: what is missing for that is said, and nothing stays open."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.authority import open_authority

from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_shared.errors import ConfigError


@pytest.mark.parametrize("command", ["devices", "migrate-state"])
def test_a_driver_that_does_not_load_is_said_in_a_line(tmp_path: Path, command: str) -> None:
    """psycopg without libpq is there and cannot be imported; that ended in a traceback."""
    database = "postgresql://perfit@127.0.0.1:1/perfit"
    (tmp_path / "state").mkdir(mode=0o700)
    if command == "devices":
        open_authority(tmp_path / "state").close()
    config = tmp_path / "perfit-cloud.toml"
    config.write_text(f'database = "{database}"\n' if command == "devices" else "")
    run = "from perfit_cloud.cli.main import run; run()"
    words = [command, *([database] if command == "migrate-state" else []), "--config", str(config)]
    done = subprocess.run(
        [sys.executable, "-c", run, *words, "--state", str(tmp_path / "state")],
        env={**os.environ, "PSYCOPG_IMPL": "no such"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'perfit[fleet]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_goes_away_takes_no_roots_from_a_server_that_runs(tmp_path: Path) -> None:
    """Every sealed call became an internal error, while unsealed ones went on."""
    with closing(open_authority(tmp_path / "ca")) as authority:
        authority.write_serving_files(tmp_path, ["localhost"])
    files = ServerFiles(tmp_path)
    known = files.device_cas()
    (tmp_path / "device_ca.crt").rename(tmp_path / "elsewhere")
    assert files.device_cas() == known
    with pytest.raises(ConfigError):
        ServerFiles(tmp_path).device_cas()  # of one that starts
    (tmp_path / "device_ca.crt").write_bytes(b"no certificate")
    with pytest.raises(ConfigError):
        files.device_cas()
