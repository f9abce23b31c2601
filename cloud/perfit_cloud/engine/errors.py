"""How an error that nobody foresaw is told to the operator."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["error_location"]


def error_location(error: BaseException) -> str:
    """Type and place. Not its message: that may quote what was worked on."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}"
