"""The artefacts that come with perfit: folders in `perfit_cloud/artefacts`, made for the default model."""

from __future__ import annotations

from pathlib import Path

from perfit_cloud.model.artefacts import Artefact

__all__ = ["FOLDER", "shipped_for"]

FOLDER = Path(__file__).resolve().parents[1] / "artefacts"


def shipped_for(fingerprint: str) -> list[Artefact]:
    """Those of the base model with this fingerprint, by name. Raises InvalidData when one is damaged."""
    shipped = [Artefact.load(file.parent) for file in sorted(FOLDER.glob("*/artefact.json"))]
    return [artefact for artefact in shipped if artefact.fingerprint == fingerprint]
