"""Restoring a backup, unlearning an example and leaving, killed: all of it is done, or nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import tiny
from local import PASSPHRASE, Device, LocalCloud
from perfit_device import answers, history
from perfit_device.shift_versions import Versions
from perfit_device.vault.store import Vault
from perfit_shared.errors import PerfitError
from soak.killing.agents import settings_of
from soak.killing.commands import Killed
from soak.killing.runs import copy_of, run_command

__all__ = ["Owned", "Owner", "fault"]

_TASK = "news_headline"
_COMMANDS = ("restore", "forget --retrain", "unenroll")
_BACKUP = {"PERFIT_BACKUP_PASSPHRASE": "a backup's passphrase, for this run only"}


@dataclass(frozen=True)
class Owned:
    """What a profile holds."""

    examples: frozenset[str] = frozenset()
    versions: tuple[int, ...] = ()
    current: int = 0
    answers: int = 0


def fault(name: str, before: Owned | None, now: Owned | None, after: Owned | None) -> str | None:
    """What is wrong with what a kill left; None stands for no profile."""
    allowed = [before, after]
    if name == "forget --retrain" and before is not None and after is not None:
        # The new version is there, and the example is still to be forgotten.
        allowed.append(
            Owned(before.examples, (*before.versions, *after.versions), after.current, before.answers)
        )
    return None if now in allowed else f"it left {now}, which is neither the state before nor the one after"


class Owner:
    """A profile with a shift, its backup, and an enrolled profile that has nothing yet."""

    def __init__(self, cloud: LocalCloud, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        lines, self._backup = folder / "mine.jsonl", folder / "mine.perfit"
        lines.write_text("".join(json.dumps(item) + "\n" for item in tiny.headlines(24)), "utf-8")
        self._trained, self._new = Device(folder / "trained", "default"), Device(folder / "new", "default")
        for device in (self._trained, self._new):
            device.env.update(_BACKUP)
            device("enroll", "-", text=cloud.invite())
        self._trained("history", "import", str(lines), "--task", _TASK)
        self._trained("update", "--task", _TASK, "--epochs", "2", "--anyway")
        self._example = self._trained.json("history", "list")[0]["name"]
        self._trained("ask", "--task", _TASK, tiny.headlines(1)[0]["text"])
        self._trained("backup", str(self._backup))
        self._references = {name: self._reference(name) for name in _COMMANDS}

    def kill(self, rng: random.Random) -> Iterator[Killed]:
        """One command; nothing when it was faster."""
        name = rng.choice(_COMMANDS)
        after, seconds = self._references[name]
        killed = Killed(name)
        with self._device(name) as device:
            before = look(device)
            run = run_command(device, self._arguments(name), kill_after=rng.uniform(0, seconds))
            try:
                killed.wrong = fault(name, before, look(device), after)
                run_command(device, self._arguments(name))
                if look(device) != after:
                    killed.wrong = killed.wrong or "it could not be done after the kill"
                left = [file for file in Path(device.env["PERFIT_HOME"]).rglob("*") if file.is_file()]
                if after is None and left:
                    killed.wrong = killed.wrong or f"{left[0].name} is left"
            except PerfitError as error:
                killed.wrong = str(error)
        if not run.done or killed.wrong is not None:
            yield killed

    def _reference(self, name: str) -> tuple[Owned | None, float]:
        """(the state after an unkilled command, seconds from its opening the vault to its end)."""
        with self._device(name) as device:
            run = run_command(device, self._arguments(name))
            return look(device), run.seconds

    def _arguments(self, name: str) -> list[str]:
        return {
            "restore": ["restore", str(self._backup)],
            "forget --retrain": ["forget", self._example, "--retrain", "--yes"],
            "unenroll": ["unenroll", "--offline", "--yes"],  # the copies share one certificate
        }[name]

    def _device(self, name: str) -> AbstractContextManager[Device]:
        """A copy of the profile that a command begins with."""
        self._count += 1
        template = self._new if name == "restore" else self._trained
        return copy_of(template, self._folder / f"home{self._count}", **_BACKUP)


def look(device: Device) -> Owned | None:
    """None where there is no profile. Raises PerfitError when its vault does not open."""
    path = settings_of(device).vault_path
    if not path.exists():
        return None
    with Vault.open(path, PASSPHRASE) as vault:
        examples = frozenset(item.name for item in history.load(vault))
        kept = [Versions.from_bytes(data) for data in vault.list("shift").values()]
        numbers = tuple(version.number for each in kept for version in each.kept)
        current = kept[0].current if kept else 0
        return Owned(examples, numbers, current, len(answers.load(vault)))
