"""Unexpected errors, as the operator's log names them."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["error_location"]


def error_location(error: BaseException) -> str:
    """Type, file and line. Not the message, which may quote what was worked on."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"
