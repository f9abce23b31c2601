"""The folder that an artefact is written to."""

from __future__ import annotations

from pathlib import Path

from perfit_shared.errors import InvalidInput

__all__ = ["check_out", "make_out"]


def check_out(out: Path, *, force: bool) -> None:
    """Raises InvalidInput where an artefact cannot be written, or one is there and may not be replaced."""
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is a file; --out should be a folder")
    if (out / "artefact.json").exists() and not force:
        raise InvalidInput(f"{out} holds a finished artefact; use another --out, or --force to replace it")


def make_out(out: Path) -> None:
    """Raises InvalidInput."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write to {out}: {error.strerror}") from error
