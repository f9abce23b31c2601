"""Artefacts with a signature: what was signed is served, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.support.cloud import key_pem

from perfit_cloud.cli.start_up import load_artefacts
from perfit_cloud.config import CloudConfig
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.signatures import check_signature
from perfit_shared.errors import ConfigError, InvalidData

pytest.importorskip("model_signing", reason="model-signing is not installed")


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public), PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key_pem(key))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def sign(folder: Path, private: Path) -> None:
    words = [
        "sign",
        "key",
        "--private_key",
        str(private),
        "--signature",
        str(folder / "model.sig"),
        str(folder),
    ]
    subprocess.run([sys.executable, "-m", "model_signing", *words], check=True, capture_output=True)


@pytest.mark.slow
def test_only_what_was_signed_is_served(tmp_path: Path, artefact: Artefact) -> None:
    folder = tmp_path / "artefact"
    artefact.save(folder)
    private, public = keys(tmp_path, "ours")
    config = CloudConfig(artefacts=(str(folder),), artefact_key=str(public))
    with pytest.raises(InvalidData, match=r"has no model\.sig"):
        load_artefacts(config)
    sign(folder, private)
    assert [each.version for each in load_artefacts(config)] == [artefact.version]
    with pytest.raises(InvalidData, match="not what was signed"):
        check_signature(folder, keys(tmp_path, "theirs")[1])
    # The card is in no digest of the artefact's own: the signature alone protects it.
    (folder / "CARD.md").write_text("measured by nobody")
    with pytest.raises(InvalidData, match="not what was signed"):
        load_artefacts(config)


def test_what_cannot_be_checked_is_said(tmp_path: Path, artefact: Artefact) -> None:
    artefact.save(tmp_path / "artefact")
    with pytest.raises(ConfigError, match="no file"):
        check_signature(tmp_path / "artefact", tmp_path / "none.pub")
    with pytest.raises(ConfigError, match="name the artefacts"):
        CloudConfig(artefact_key="key.pub")
