"""Authorities whose keys lie in a PKCS#11 token: SoftHSM stands for the device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.authority import DAY, enrolled, renewed

from perfit_cloud.service.identity.authority import Authority
from perfit_shared.errors import ConfigError

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
_MODULES = [Path("/usr/lib/softhsm/libsofthsm2.so"), *Path("/usr/lib").glob("*/softhsm/libsofthsm2.so")]
MODULE = next((path for path in _MODULES if path.exists()), None)
pytestmark = pytest.mark.skipif(
    MODULE is None or shutil.which("softhsm2-util") is None, reason="SoftHSM is not installed"
)

from perfit_cloud.service.identity.token_keys import TokenKeys  # noqa: E402 - needs pkcs11


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token of its own. The library reads where tokens lie once a process."""
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    config = folder / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {folder / 'tokens'}\n")
    (folder / "pin").write_text("1234\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(config))
        make = ["softhsm2-util", "--init-token", "--free", "--label", "perfit", "--pin", "1234"]
        subprocess.run([*make, "--so-pin", "5678"], check=True, capture_output=True)
        uri = f"pkcs11:token=perfit?module-path={MODULE}&pin-source=file:{folder / 'pin'}"
        TokenKeys(uri).create()  # so that the library has read its settings
    return uri


def opened(state: Path, token: str) -> Authority:
    return Authority(state, certificate_seconds=DAY, lapse_seconds=DAY, keys=TokenKeys(token))


def test_no_file_holds_a_key_and_certificates_are_issued_all_the_same(tmp_path: Path, token: str) -> None:
    state = tmp_path / "state"
    authority = opened(state, token)
    certificate = enrolled(authority)
    authority.check(renewed(authority, certificate))
    assert authority._device_ca.get().issued(certificate)
    assert not [path for path in state.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    authority.server_identity(["localhost"])
    again = opened(state, token)
    assert again.server_ca_der == authority.server_ca_der
    again.check(renewed(again, certificate))


def test_a_rotation_makes_new_keys_and_destroys_the_old_ones(tmp_path: Path, token: str) -> None:
    authority = opened(tmp_path / "state", token)
    before = (tmp_path / "state" / "device_ca.pem").read_bytes()
    TokenKeys(token).load(before)
    authority.rotation.take("begin")
    authority.rotation.take("switch", now=True)
    with pytest.raises(ConfigError, match="holds no key"):
        TokenKeys(token).load(before)
    enrolled(authority)


def test_a_folder_whose_keys_lie_in_a_token_says_so_without_it(tmp_path: Path, token: str) -> None:
    opened(tmp_path / "state", token)
    with pytest.raises(ConfigError, match="set ca_token"):
        Authority(tmp_path / "state", certificate_seconds=DAY, lapse_seconds=DAY)


@pytest.mark.parametrize("uri", ["perfit", "pkcs11:token=perfit", "pkcs11:object=x?module-path=/x"])
def test_what_names_no_token_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="should read"):
        TokenKeys(uri)


def test_a_token_that_cannot_be_opened_is_said(tmp_path: Path, token: str) -> None:
    for wrong in (
        token.replace("token=perfit", "token=nobody"),
        token.replace(str(MODULE), str(tmp_path / "no.so")),
    ):
        with pytest.raises(ConfigError, match="cannot open the token"):
            TokenKeys(wrong).create()
