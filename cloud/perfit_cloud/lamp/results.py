"""The results of a LaMP run: its settings, and for each user the losses and answers of every query.

    OUT/run.json                      settings of the run and how long it took
    OUT/users/{user_id}/result.json   one `UserResult`
    OUT/users/{user_id}/stage2.json, seconds.json, and the state that the method fitted, if it fits any

Everything that is reported (summary.json, comparisons, tables, figures) is computed from these, or from
what `measured` keeps of them in a folder without texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.checks import (
    DAMAGED,
    MODES,
    SECONDS,
    check_user,
    checked_drift,
    checked_settings,
    seconds_of,
)
from perfit_cloud.lamp.measured import FIGURES_FILE, UserFigures, check_alike
from perfit_shared.errors import InvalidData
from perfit_shared.files import write_whole
from perfit_shared.prompts import prompts_of
from perfit_shared.task import PENALTIES
from perfit_shared.tasks import Task

__all__ = [
    "MODES",
    "SECONDS",
    "QueryResult",
    "Run",
    "UserFolder",
    "UserResult",
    "completed",
    "write_bytes",
    "write_json",
]

_DECODING_KEYS = ("temperature", "top_k", "top_p")
_FORMAT = 1
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_LONGEST_NAME = 100  # characters of a folder, before a hash


@dataclass(frozen=True)
class QueryResult:
    """One held-out query. A mode that the run did not measure is missing from `loss` and `answers`."""

    id: str
    gold: str  # what answers are compared with
    tokens: int  # of the target, end of sequence included
    loss: Mapping[str, float]  # by mode, mean nats a target token of this query
    answers: Mapping[str, str]  # by mode, parsed
    origins: str | None = None  # `text_scores.origins_of` the gold; None of runs before there was this


@dataclass(frozen=True)
class UserResult:
    user_id: str
    examples: int  # of the history, trained on
    steps: int  # of stage 2
    queries: tuple[QueryResult, ...]

    def loss(self, mode: str) -> float:
        """Mean nats over all target tokens of this user's queries."""
        tokens = sum(q.tokens for q in self.queries)
        return sum(q.loss[mode] * q.tokens for q in self.queries) / tokens

    @property
    def modes(self) -> tuple[str, ...]:
        """Those measured of all queries, in MODES' order."""
        return tuple(mode for mode in MODES if all(mode in query.loss for query in self.queries))

    def with_modes(self, queries: Sequence[QueryResult]) -> UserResult:
        """With what these, the same queries in the same order, say of other modes."""
        merged = tuple(
            replace(new, loss={**old.loss, **new.loss}, answers={**old.answers, **new.answers})
            for old, new in zip(self.queries, queries, strict=True)
        )
        return replace(self, queries=merged)


class UserFolder:
    """One user's files in the folder of a run."""

    def __init__(self, run: Path, user_id: str, state_file: str = "") -> None:
        self.path = run / "users" / _file_name(user_id)
        self.state_path = self.path / state_file

    @property
    def has_state(self) -> bool:
        return self.state_path.is_file()

    def save_state(self, state: bytes, *, losses: Sequence[float], seconds: float) -> None:
        """`losses`: of every step. The state is written last: where it is, the rest is too."""
        self._save_seconds(fit=seconds)
        write_json(self.path / "stage2.json", {"losses": losses, "seconds": seconds})
        write_bytes(self.state_path, state)

    @property
    def losses(self) -> tuple[float, ...]:
        """Of every step of stage 2."""
        path = self.path / "stage2.json"
        if not (self.has_state and path.is_file()):
            return ()
        try:
            return tuple(map(float, _read(path)["losses"]))
        except DAMAGED as error:
            raise InvalidData(f"{path} is damaged; remove the folder and run again") from error

    @property
    def steps(self) -> int:
        return len(self.losses)

    def has_measured(self, mode: str) -> bool:
        return (self.path / "result.json").is_file() and mode in self.load().modes

    def add_mode(self, measured: UserResult, seconds: float) -> None:
        """Add the modes of `measured` to this user's results; `seconds` that they took."""
        self._save_seconds(answers=self.seconds["answers"] + seconds)
        known = self.load() if (self.path / "result.json").is_file() else measured
        self.save(known.with_modes(measured.queries))

    def save(self, result: UserResult) -> None:
        write_json(self.path / "result.json", asdict(result))

    def load(self) -> UserResult:
        """Raises InvalidData naming the file."""
        path = self.path / "result.json"
        try:
            data = _read(path)
            found = UserResult(**{**data, "queries": tuple(QueryResult(**q) for q in data["queries"])})
            check_user(found)
            return found
        except DAMAGED as error:
            raise InvalidData(f"{path} is not a user's result; remove it and run again") from error

    @property
    def seconds(self) -> dict[str, float]:
        path = self.path / "seconds.json"
        try:
            return {"fit": 0.0, "answers": 0.0} | seconds_of(_read(path) if path.is_file() else {})
        except DAMAGED as error:
            raise InvalidData(f"{path} is damaged; remove it, and the run counts anew") from error

    def _save_seconds(self, **seconds: float) -> None:
        write_json(self.path / "seconds.json", self.seconds | seconds)


@dataclass(frozen=True)
class Run:
    """A finished run. `settings`: plain JSON values, the keys of which run.py and the method write."""

    folder: Path
    task: Task
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]  # SECONDS
    users: tuple[UserResult, ...]  # none of a run without its texts
    kept: tuple[UserFigures, ...] = ()  # of a run without its texts
    kept_drift: Mapping[str, Any] | None = None  # the same, where it measured that

    @property
    def modes(self) -> tuple[str, ...]:
        """Those measured of all users, in MODES' order. A run that was cut short has more of some users."""
        found = [set(user.modes) for user in (self.kept or self.users)]
        return tuple(mode for mode in MODES if all(mode in modes for modes in found))

    @property
    def people(self) -> int:
        return len(self.kept or self.users)

    @cached_property
    def figures(self) -> tuple[UserFigures, ...]:
        """Of every user, in all modes. Raises InvalidData naming a user who has no queries."""
        return self.kept or tuple(UserFigures.of(self.task, user, self.modes) for user in self.users)

    @property
    def prompts(self) -> str:
        """Of `perfit_shared.prompts`."""
        return str(self.settings["prompts"])

    @property
    def reading(self) -> str:
        """How the model reads prompts, in words."""
        return "chat turns" if self.settings["chat"] else "text"

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return _read(self.folder / "summary.json")

    @property
    def decoding(self) -> str:
        """How answers are drawn, in words, seed aside."""
        decoding = self.settings.get("decoding", {})
        words = [f"{name.replace('_', '-')} {decoding[name]}" for name in _DECODING_KEYS if name in decoding]
        stops = " or ".join(map(json.dumps, self.settings["stop"]))
        stop = f"to {stops}" if stops else "no stop"
        words = ["greedy"] if decoding.get("temperature") == 0 else words
        penalties = {name: self.settings[name] for name in PENALTIES if self.settings[name]}
        words += [f"{name.replace('_', ' ')} {value:g}" for name, value in penalties.items()]
        return ", ".join([*words, f"up to {self.settings['answer_tokens']} tokens, {stop}"])

    def save(self) -> None:
        """Write run.json; the users' files are there already."""
        data = {
            "format": _FORMAT,
            "task": json.loads(self.task.to_json()),
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
            "users": [user.user_id for user in self.users],
        }
        write_json(self.folder / "run.json", data)

    @classmethod
    def load(cls, folder: Path, *, texts: bool = True) -> Run:
        """Raises InvalidData naming the folder when it holds no finished run.

        Without `texts` a run of which figures alone were kept will do.
        """
        if not (folder / "run.json").is_file() and (folder / FIGURES_FILE).is_file():
            if texts:
                raise InvalidData(f"{folder} holds a run's figures without its texts, which this needs")
            return cls._of_figures(folder)
        try:
            data = _read(folder / "run.json")
            if data["format"] != _FORMAT:
                raise InvalidData(f"{folder}: format {data['format']} is not known to this version")
            task = Task.from_json(json.dumps(data["task"]))
            users = tuple(UserFolder(folder, user).load() for user in data["users"])
            if not users:
                raise InvalidData(f"{folder} has no users")
            settings = checked_settings(completed(data["settings"], task))
            return cls(folder, task, settings, seconds_of(data["seconds"]), users)
        except DAMAGED as error:
            raise InvalidData(f"{folder} holds no finished run; `perfit-cloud lamp run` makes one") from error

    def save_figures(self, folder: Path, *, drift: Mapping[str, Any] | None = None) -> Path:
        """Write what is measured into `folder`: no text of a person or the model, no id. Returns the file."""
        data = {
            "format": _FORMAT,
            "task": json.loads(self.task.to_json()),
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
            **({} if drift is None else {"drift": drift}),
            "users": [user.to_json() for user in self.figures],
        }
        write_bytes(folder / FIGURES_FILE, json.dumps(data, separators=(",", ":")).encode())
        return folder / FIGURES_FILE

    @classmethod
    def _of_figures(cls, folder: Path) -> Run:
        path = folder / FIGURES_FILE
        try:
            data = _read(path)
            if data["format"] != _FORMAT:
                raise InvalidData(f"{folder}: format {data['format']} is not known to this version")
            task = Task.from_json(json.dumps(data["task"]))
            figures = tuple(UserFigures.from_json(user) for user in data["users"])
            if not figures:
                raise InvalidData(f"{path} has no users")
            check_alike(figures, task)
            settings, seconds = (
                checked_settings(completed(data["settings"], task)),
                seconds_of(data["seconds"]),
            )
            return cls(folder, task, settings, seconds, (), figures, checked_drift(data.get("drift")))
        except DAMAGED as error:
            raise InvalidData(f"{path} is damaged; `perfit-cloud lamp figures` makes it") from error


def completed(settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Settings of a run with what older versions did not write: how they trained and asked."""
    prompts, settings = prompts_of(task), dict(settings)
    ablation = settings.pop("ablation", "full")
    schedule = settings.get("schedule", None if "method" in settings else "device")
    if "asked_epochs" not in settings and schedule == "device":
        # It took the artefact's batches and epochs, however short a history was.
        settings = {**settings, "schedule": "old device"}
    elif schedule == "device" and "rate_growth" not in settings:  # its rate warmed up and decayed
        settings = {**settings, "schedule": "linear device"}
    if settings.get("k") is not None:
        settings = {"examples_as": "lines", **settings}
    return {
        "method": "perfit" if ablation == "full" else f"perfit_{ablation}",
        "asked_epochs": None,
        "asked_batch_size": None,
        "rate_growth": None,
        "collective_group": None,
        "queries": None,
        "communities": 0,
        "community_seeds": None,
        "prompts": prompts,
        "chat": task.chat is True,
        "artefact_prompts": prompts,
        "answer_tokens": task.answer_tokens,
        "stop": list(task.stop),
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        **settings,
    }


def _file_name(user_id: str) -> str:
    """Ids come from data files, so whatever a file name may not hold is escaped."""
    # Capitals too: some file systems hold "Ann" and "ann" for the same.
    safe = "".join(c if c in _PLAIN else "".join(f"%{b:02x}" for b in c.encode()) for c in user_id)
    if len(safe) > _LONGEST_NAME:
        safe = f"{safe[:_LONGEST_NAME]}~{hashlib.sha256(user_id.encode()).hexdigest()[:16]}"
    return safe or "%"


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return data


def write_json(path: Path, data: Any) -> None:
    write_bytes(path, json.dumps(data, ensure_ascii=False, indent=1).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
