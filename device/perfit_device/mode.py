"""Whose model answers."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Mode"]


class Mode(StrEnum):
    base = "base"
    collective = "collective"
    personal = "personal"
