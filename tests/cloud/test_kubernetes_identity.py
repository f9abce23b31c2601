"""How a pod that serves comes to its state folder: what the init container of deploy/kubernetes does."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.authority import open_authority
from tests.support.balancers import ROOT

from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.state_folder import check_state
from perfit_shared.errors import ConfigError

POOLS = ("answers", "updates")


def pod(pool: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes" / f"{pool}.yaml").read_text())
    found: dict[str, Any] = next(documents)["spec"]["template"]["spec"]
    return found


def mount(container: dict[str, Any], volume: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in container["volumeMounts"] if each["name"] == volume)
    return found


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """What `perfit-cloud server` wrote, as a Secret is mounted."""
    folder = tmp_path / "identity"
    folder.mkdir()
    authority = open_authority(tmp_path / "authority")
    authority.write_serving_files(folder, ["cloud.example"])
    authority.close()
    for file in folder.iterdir():
        file.chmod(0o440)
    return folder


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """What Kubernetes makes of an emptyDir for a pod with fsGroup."""
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(0o2777)
    return folder


def prepare(pool: str, secret: Path, volume: Path) -> None:
    """Run the init container's command where its mounts are these folders."""
    (init,) = pod(pool)["initContainers"]
    python, flag, script = init["command"]
    assert (python, flag) == ("python", "-c")
    for name, folder in (("identity", secret), ("state", volume)):
        path = mount(init, name)["mountPath"]
        assert f'"{path}/' in script
        script = script.replace(f'"{path}/', f'"{folder}/')
    subprocess.run([sys.executable, flag, script], check=True, timeout=60)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pod_takes_its_state_folder(pool: str, secret: Path, volume: Path, tmp_path: Path) -> None:
    """The volume itself was mounted: the server refused it, as others can write it."""
    prepare(pool, secret, volume)
    (serve,) = pod(pool)["containers"]
    mounted = mount(serve, "state")
    assert mounted["mountPath"] == "/var/lib/perfit"  # PERFIT_CLOUD_STATE of the image
    with pytest.raises(ConfigError, match="others can write"):
        check_state(volume, trusts_group=True)
    with pytest.raises(ConfigError, match="others can write"):
        check_state(volume / mounted["subPath"], trusts_group=True)
    # A mount shows the folder alone, in a place where no folder above is anybody's.
    state = (volume / mounted["subPath"]).rename(tmp_path / "state")
    check_state(state, trusts_group=False)
    files = ServerFiles(state)
    assert files.is_current(files.identity())
    assert files.device_cas()
    assert {stat.S_IMODE(file.stat().st_mode) for file in state.iterdir()} == {0o600}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pod_gets_every_file_that_a_server_begins_with(pool: str, secret: Path, volume: Path) -> None:
    """server_ca.crt was left out: it is read at every handshake, and to renew."""
    prepare(pool, secret, volume)
    (state,) = volume.iterdir()
    assert {file.name: file.read_bytes() for file in state.iterdir()} == {
        file.name: file.read_bytes() for file in secret.iterdir()
    }


def test_a_pod_that_was_there_before_keeps_what_it_renewed(secret: Path, volume: Path) -> None:
    (volume / "new").mkdir()  # cut off in the midst of its first try
    (volume / "new" / "server.pem").write_text("half")
    prepare("answers", secret, volume)
    renewed = volume / "state" / "server.pem"
    assert renewed.read_bytes() == (secret / "server.pem").read_bytes()
    renewed.write_text("a newer one")
    prepare("answers", secret, volume)
    assert renewed.read_text() == "a newer one"
