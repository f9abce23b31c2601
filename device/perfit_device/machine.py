"""What this machine can spare: processor, power and disk. Small readings of our own, one a platform."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Machine", "Power", "look"]

_SUPPLIES = Path("/sys/class/power_supply")
_PMSET_SECONDS = 5.0


@dataclass(frozen=True)
class Power:
    """None where unknown: then nothing should wait for it."""

    on_battery: bool | None = None
    percent: int | None = None  # of the battery's charge


@dataclass(frozen=True)
class Machine:
    cores: int
    load: float | None  # processes that ran or waited, mean of the last minute; None: unknown (Windows)
    power: Power
    free: int  # bytes on the disk of the vault


def look(folder: Path) -> Machine:
    """The machine now; `folder` lies on the disk that is meant."""
    load = None
    with contextlib.suppress(AttributeError, OSError):
        load = os.getloadavg()[0]
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Machine(cores, load, _power(), shutil.disk_usage(folder).free)


def _power() -> Power:
    if sys.platform == "darwin":
        return _power_of_pmset()
    return _power_of_windows() if sys.platform == "win32" else power_of_linux(_SUPPLIES)


def power_of_linux(folder: Path) -> Power:
    """By the kernel's `power_supply` class. Batteries of mice and keyboards do not count."""
    mains, states, charges = False, [], []
    for supply in sorted(folder.iterdir()) if folder.is_dir() else []:
        kind = _read(supply / "type")
        if kind == "Battery" and _read(supply / "scope") != "Device":
            states.append(_read(supply / "status"))
            charges += [int(text)] if (text := _read(supply / "capacity")).isdigit() else []
        elif kind in ("Mains", "USB"):
            mains = mains or _read(supply / "online") == "1"
    if not states:
        return Power(on_battery=False if mains else None)
    return Power(not mains and "Discharging" in states, min(charges, default=None))


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""


def _power_of_pmset() -> Power:
    try:
        command = ["/usr/bin/pmset", "-g", "batt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PMSET_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return Power()
    return power_of_macos(done.stdout)


def power_of_macos(text: str) -> Power:
    """What `pmset -g batt` prints: "Now drawing from 'Battery Power'", and a charge in percent."""
    source = re.search(r"drawing from '([^']*)'", text)
    charge = re.search(r"(\d{1,3})%", text)
    return Power(source[1] == "Battery Power" if source else None, int(charge[1]) if charge else None)


class _PowerStatus(ctypes.Structure):
    """SYSTEM_POWER_STATUS of winbase.h."""

    _fields_: ClassVar = [
        ("line", ctypes.c_ubyte),  # 0 battery, 1 mains, 255 unknown
        ("flag", ctypes.c_ubyte),
        ("percent", ctypes.c_ubyte),  # 255 unknown
        ("saver", ctypes.c_ubyte),
        ("life", ctypes.c_uint32),
        ("full_life", ctypes.c_uint32),
    ]


def _power_of_windows() -> Power:
    status = _PowerStatus()
    windll: Any = getattr(ctypes, "windll", None)  # on Windows alone
    if not windll.kernel32.GetSystemPowerStatus(ctypes.byref(status)):
        return Power()
    return power_of_windows(status.line, status.percent)


def power_of_windows(line: int, percent: int) -> Power:
    return Power({0: True, 1: False}.get(line), percent if percent <= 100 else None)
