"""Commands of a real device, killed: its state is the one before or the one after, and all goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from local import PASSPHRASE, Device, LocalCloud
from perfit_device import history, personal
from perfit_device.cloud_record import read_enrolment, read_record
from perfit_device.training.update import read_checkpoint
from perfit_device.vault.store import Vault
from perfit_shared.errors import PerfitError, WrongPassphrase
from perfit_shared.shifts import ShiftTensors
from soak.killing.agents import settings_of
from soak.killing.changes import carved, pieces_of
from soak.killing.runs import Run, copy_of, run_command

__all__ = ["Killed", "World"]

TASK = "news_headline"
_NEW_PASSPHRASE = "another passphrase for this run"  # noqa: S105
_COMMANDS = ("import", "undo", "forget", "add", "passphrase", "ask", "enroll")
_AT_AGENT = _COMMANDS[:-1]  # before `enroll` there is no profile, so no agent
_VICTIMS = ("agent", "caller")
_CHECKPOINT_SECONDS = 0.3
_UPDATE = (
    "update",
    "--task",
    TASK,
    "--epochs",
    "8",
    "--lr",
    "0.02",
    "--checkpoint",
    str(_CHECKPOINT_SECONDS),
)
_TOLERANCE = 2e-4  # of tensors: a step alone and one out of what the cloud keeps differ in rounding
_WORDS = ("cat", "dog", "mat", "door", "sat", "ran", "town", "council")


@dataclass(frozen=True)
class Seen:
    """What a profile holds."""

    passphrase: str
    examples: frozenset[str]
    enrolled: bool
    shift: str  # the name it is kept under, or ""


_NOBODY = Seen("", frozenset(), enrolled=False, shift="")


@dataclass
class Killed:
    """What became of one kill."""

    of: str
    wrong: str | None = None
    repeated_steps: int = 0
    repeated_seconds: float = 0.0
    longest_step_seconds: float = 0.0
    difference: float = 0.0  # the largest between the numbers of the shift and of an unkilled update's


class World:
    """A cloud, and the profile that every kill begins with a copy of."""

    def __init__(self, cloud: LocalCloud, folder: Path, seed: int) -> None:
        self._cloud, self._folder = cloud, folder
        self._count = 0
        self._first, self._more = folder / "first.jsonl", folder / "more.jsonl"
        _write_history(self._first, 40, seed)
        _write_history(self._more, 30, seed + 1)
        self._template = Device(folder / "template", "default")
        self._template("enroll", "-", text=cloud.invite())
        self._template("history", "import", str(self._first), "--task", TASK)
        self._start = self._look(self._template)
        self._references = {name: self._reference(name) for name in _COMMANDS}
        with self._device() as device:
            self._update_run = run_command(device, list(_UPDATE))
            self._trained = self._shift(device)

    # -- kills ---------------------------------------------------------------------------------

    def kill_command(self, rng: random.Random, *, at_agent: bool = False) -> list[Killed]:
        """Of one command, or of the agent that does it; none when it was faster."""
        name = rng.choice(_AT_AGENT if at_agent else _COMMANDS)
        victim = rng.choice(_VICTIMS) if at_agent else ""
        after, seconds = self._references[name]
        killed = Killed(f"{victim}: {name}" if victim else name)
        is_new = name == "enroll"
        with self._device(empty=is_new) as device:
            arguments, folder = self._arguments(name), _vault(device).parent
            before = _NOBODY if is_new else self._start
            rows = set() if is_new else pieces_of(folder / "vault.db")
            run = run_command(device, arguments, kill_after=rng.uniform(0, seconds), victim=victim)
            try:
                now = self._look(device)
                if now != after and (run.done or now != before):
                    killed.wrong = "what it left is neither the old state nor the new one"
                elif not is_new:
                    killed.wrong = carved(folder, rows)
                if now.passphrase != _NEW_PASSPHRASE and (now != after or after == before):
                    again = run_command(device, arguments, victim=victim)
                    if not again.done or self._look(device) != after:
                        killed.wrong = killed.wrong or "it could not be done after the kill"
            except PerfitError as error:
                killed.wrong = str(error)
        return [] if run.done and killed.wrong is None else [killed]

    def kill_update(self, rng: random.Random, *, at_most: int, at_agent: bool = False) -> list[Killed]:
        """One update, killed once or more often, itself or its agent, and resumed to its end."""
        seconds = self._update_run.seconds
        kills: list[Killed] = []
        with self._device() as device:
            for _ in range(rng.randint(1, at_most)):
                victim = rng.choice(_VICTIMS) if at_agent else ""
                run = run_command(device, list(_UPDATE), kill_after=rng.uniform(0, seconds), victim=victim)
                if run.done:
                    break
                kills.append(self._judged(device, run, victim))
                if kills[-1].wrong is not None:
                    return kills
                if self._is_updated(device):  # the kill came between its end and telling so
                    run.done = True
                    break
            if kills and not run.done and not run_command(device, list(_UPDATE)).done:
                kills[-1].wrong = "the update did not resume"
                return kills
            if kills:
                kills[-1].difference = _difference(self._shift(device), self._trained)
                if kills[-1].difference > _TOLERANCE:
                    kills[-1].wrong = "the update ended elsewhere than one that was not killed"
        return kills

    def _judged(self, device: Device, run: Run, victim: str) -> Killed:
        of = f"{victim}: update" if victim else "update"
        killed = Killed(of, longest_step_seconds=run.longest_step)
        try:
            kept = self._checkpoint_step(device)
            now = self._look(device)
        except PerfitError as error:
            killed.wrong = str(error)
            return killed
        last = max(run.steps, default=0)
        if self._is_updated(device):
            return killed
        if now != self._start:
            killed.wrong = "an update that was killed changed more than its checkpoint"
        if kept not in run.steps:
            return killed  # of the run before: this one had not begun, or had saved what it began with
        killed.repeated_steps = last - kept
        killed.repeated_seconds = run.steps[last] - run.steps[kept]
        if killed.repeated_seconds > _CHECKPOINT_SECONDS + run.longest_step:
            killed.wrong = f"{killed.repeated_seconds:.2f} s of steps are to be repeated"
        return killed

    # -- plumbing ------------------------------------------------------------------------------

    def _reference(self, name: str) -> tuple[Seen, float]:
        """(the state after an unkilled command, seconds from its opening the vault to its end)."""
        with self._device(empty=name == "enroll") as device:
            run = run_command(device, self._arguments(name))
            return self._look(device), run.seconds

    def _arguments(self, name: str) -> list[str]:
        return {
            "import": ["history", "import", str(self._more), "--task", TASK],
            "undo": ["history", "undo", "1", "--yes"],
            "ask": ["ask", "the cat sat", "--task", TASK, "--mode", "base", "--json"],
            "forget": ["history", "forget", "--task", TASK, "--yes"],
            "add": ["history", "add", "a text that was not there", "A Title", "--task", TASK],
            "passphrase": ["passphrase"],
            "enroll": ["enroll", self._cloud.invite() if name == "enroll" else ""],
        }[name]

    def _device(self, *, empty: bool = False) -> AbstractContextManager[Device]:
        """A copy of the template, or a profile that does not exist yet."""
        self._count += 1
        home = self._folder / f"home{self._count}"
        return copy_of(None if empty else self._template, home, PERFIT_NEW_PASSPHRASE=_NEW_PASSPHRASE)

    def _look(self, device: Device) -> Seen:
        """Raises PerfitError when the vault does not open."""
        if not _vault(device).exists():
            return _NOBODY
        with self._open(device) as (vault, passphrase):
            examples = frozenset(item.name for item in history.load(vault))
            shifts = personal.artefacts(vault)
            enrolled = read_enrolment(vault) is not None
            if not enrolled and not examples:  # made by `enroll`, which got no further
                return _NOBODY
            return Seen(passphrase, examples, enrolled, "".join(shifts))

    @contextmanager
    def _open(self, device: Device) -> Iterator[tuple[Vault, str]]:
        for passphrase in (PASSPHRASE, _NEW_PASSPHRASE):
            try:
                vault = Vault.open(_vault(device), passphrase)
            except WrongPassphrase:
                continue
            with vault:
                yield vault, passphrase
            return
        raise WrongPassphrase("neither passphrase opens it")

    def _checkpoint_step(self, device: Device) -> int:
        with self._open(device) as (vault, _):
            kept = [read_checkpoint(vault, place) for place in vault.list("checkpoint")]
        return kept[0].step if kept and kept[0] is not None else 0

    def _is_updated(self, device: Device) -> bool:
        """Whether there is a shift, and no update half-done; another `update` would train it further."""
        with self._open(device) as (vault, _):
            return bool(personal.artefacts(vault)) and not vault.list("checkpoint")

    def _shift(self, device: Device) -> ShiftTensors:
        with self._open(device) as (vault, _):
            (name,), cloud_id = personal.artefacts(vault), read_record(vault).cloud_id
            versions = personal.read_versions(vault, cloud_id, name)
            return personal.read_tensors(vault, cloud_id, name, versions.current if versions else 0)


def _vault(device: Device) -> Path:
    return settings_of(device).vault_path


def _difference(a: ShiftTensors, b: ShiftTensors) -> float:
    return max(float(np.abs(x - y).max()) for (_, x), (_, y) in zip(a.named(), b.named(), strict=True))


def _write_history(path: Path, count: int, seed: int) -> None:
    """Texts with a habit that a shift can learn."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = [
        {"text": f"{number} " + " ".join(rng.choices(_WORDS, k=5)), "title": f"the {rng.choice(_WORDS)} sat"}
        for number in range(count)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
