"""δ-vectors of all users of a file, streamed to disk.

    FOLDER/deltas.f32       rows × blocks × d, float32, a row for each user
    FOLDER/control.f32      the same with random tokens in the history's place, where asked for
    FOLDER/numbers.i64      each row's user, by number in the file
    FOLDER/progress.json    settings and counts; what lies beyond them in a file is not counted

A window of users is computed, appended and recorded before the next is read, so memory does not grow with
users. Windows depend on the data alone: an interrupted run that goes on ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perfit_cloud.analysis.prompts import Prompt, Prompts
from perfit_cloud.analysis.queries import AskingUser
from perfit_cloud.analysis.residuals import last_tokens
from perfit_cloud.collective.progress import Progress
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput
from perfit_shared.files import write_whole

__all__ = ["Array", "Counts", "DeltaSettings", "Deltas", "open_deltas", "write_deltas"]

Array = npt.NDArray[np.float32]
_WINDOW_QUESTIONS, _WINDOW_USERS = 128, 128
_FILES = ("deltas.f32", "control.f32", "numbers.i64")


@dataclass(frozen=True)
class DeltaSettings:
    """What decides the bytes. Another run in the same folder must share it."""

    model: str  # fingerprint
    dtype: str
    task: str  # as JSON, since its templates decide prompts
    source: str  # the data file, by its folder's name and its own
    data_digest: str  # sha-256 of its bytes, hex
    retrieved: int
    most: int
    users: int | None
    control: bool
    pass_tokens: int
    seed: int


@dataclass
class Counts:
    users: int = 0  # read
    rows: int = 0  # of them with a vector
    questions: int = 0
    too_long: int = 0  # questions that leave no room for a history
    history_tokens: int = 0
    query_tokens: int = 0


@dataclass(frozen=True)
class Deltas:
    """A finished folder. Arrays are memory-mapped and read-only."""

    vectors: Array  # (users, blocks, d)
    control: Array | None
    numbers: npt.NDArray[np.int64]
    counts: Counts


def write_deltas(
    folder: Path,
    users: Iterable[AskingUser],
    prompts: Prompts,
    base: BaseModel,
    settings: DeltaSettings,
    *,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Compute what `folder` lacks. `users`: all of them, from the first on.

    Raises InvalidInput where the folder holds other settings, InvalidData where nobody has a vector or the
    folder is damaged, Cancelled when `stop` says so between two windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts, finished = _read_progress(folder, settings)
    if finished:
        return
    _truncate(folder, counts, base, settings)
    progress.skip(counts.questions)
    for window in _windows(users, skip=counts.users):
        if stop():
            raise Cancelled(f"stopped; the same command goes on from {counts.rows} users")
        _append(folder, _compute(window, prompts, base, settings, counts))
        _write_progress(folder, settings, counts, finished=False)
        progress.advance(sum(len(user.questions) for user in window), f"δ of {counts.rows} users")
    if counts.rows < 2:
        raise InvalidData(
            f"{settings.source}: two users should have a query and a history that fit {prompts.cap} tokens, "
            f"and {counts.rows or 'none'} has"
        )
    _write_progress(folder, settings, counts, finished=True)


def open_deltas(folder: Path, settings: DeltaSettings, base: BaseModel) -> Deltas:
    """Raises InvalidData where the folder is not finished."""
    counts, finished = _read_progress(folder, settings)
    if not finished:
        raise InvalidData(f"{folder} is not finished; run the same command again")
    shape = (counts.rows, base.blocks, base.hidden_size)

    def mapped(name: str) -> Array:
        return np.memmap(folder / name, np.float32, "r", shape=shape)

    return Deltas(
        mapped(_FILES[0]),
        mapped(_FILES[1]) if settings.control else None,
        np.fromfile(folder / _FILES[2], np.int64),
        counts,
    )


# -- one window --------------------------------------------------------------------------------------


def _windows(users: Iterable[AskingUser], *, skip: int) -> Iterator[list[AskingUser]]:
    window: list[AskingUser] = []
    questions = 0
    for index, user in enumerate(users):
        if index < skip:
            continue
        window.append(user)
        questions += len(user.questions)
        if questions >= _WINDOW_QUESTIONS or len(window) == _WINDOW_USERS:
            yield window
            window, questions = [], 0
    if window:
        yield window


def _compute(
    window: Sequence[AskingUser], prompts: Prompts, base: BaseModel, settings: DeltaSettings, counts: Counts
) -> Mapping[str, npt.NDArray[Any]]:
    """The window's rows of each file; `counts` grows."""
    kinds = 2 if settings.control else 1
    rows: list[int] = []  # numbers of users
    sequences: list[list[int]] = []
    weights: list[tuple[int, float, float]] = []  # of each sequence: its row, its share of δ, of the control
    for user in window:
        encoded = [prompts.encode(question) for question in user.questions]
        usable = [(index, prompt) for index, prompt in enumerate(encoded) if prompt is not None]
        counts.users += 1
        counts.questions += len(encoded)
        counts.too_long += len(encoded) - len(usable)
        for index, prompt in usable:
            _count(counts, prompt)
            share, row = 1 / len(usable), len(rows)
            sequences += [prompt.alone, prompt.with_history]
            weights += [(row, -share, -share), (row, share, 0.0)]
            if settings.control:
                key = (settings.seed, user.number, index)
                sequences.append(prompt.with_prefix(prompts.random_prefix(len(prompt.history), *key)))
                weights.append((row, 0.0, share))
        if usable:
            rows.append(user.number)
    counts.rows += len(rows)
    sums = np.zeros((kinds, len(rows), base.blocks, base.hidden_size), np.float32)
    for chosen, residuals in last_tokens(base, sequences, tokens=settings.pass_tokens) if rows else ():
        for index, residual in zip(chosen, residuals.numpy(), strict=True):
            row, *shares = weights[index]
            for kind, share in enumerate(shares[:kinds]):
                if share:
                    sums[kind, row] += np.float32(share) * residual
    if not np.isfinite(sums).all():
        raise InvalidData("the model's hidden states are not finite; try another --dtype")
    found: dict[str, npt.NDArray[Any]] = dict(zip(_FILES, sums, strict=False))
    return {**found, _FILES[2]: np.array(rows, np.int64)}


def _count(counts: Counts, prompt: Prompt) -> None:
    counts.history_tokens += len(prompt.history)
    counts.query_tokens += len(prompt.alone)


# -- files -------------------------------------------------------------------------------------------


def _append(folder: Path, rows: Mapping[str, npt.NDArray[Any]]) -> None:
    for name, array in rows.items():
        with (folder / name).open("ab") as file:
            file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())


def _truncate(folder: Path, counts: Counts, base: BaseModel, settings: DeltaSettings) -> None:
    """Drop what was appended and not recorded."""
    row = 4 * base.blocks * base.hidden_size
    sizes = {_FILES[0]: row, **({_FILES[1]: row} if settings.control else {}), _FILES[2]: 8}
    for name, size in sizes.items():
        path = folder / name
        path.touch()
        if path.stat().st_size < counts.rows * size:
            raise InvalidData(f"{path} is damaged; use another --out")
        os.truncate(path, counts.rows * size)


def _read_progress(folder: Path, settings: DeltaSettings) -> tuple[Counts, bool]:
    path = folder / "progress.json"
    if not path.is_file():
        return Counts(), False
    try:
        data = json.loads(path.read_text("utf-8"))
        theirs, counts = data["settings"], Counts(**data["counts"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{path} is damaged; use another --out") from error
    ours = asdict(settings)
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        names = ", ".join(name.replace("_", " ") for name in changed)
        raise InvalidInput(f"{folder} holds vectors made with other {names}; use another --out")
    return counts, bool(data.get("finished"))


def _write_progress(folder: Path, settings: DeltaSettings, counts: Counts, *, finished: bool) -> None:
    data = {"settings": asdict(settings), "counts": asdict(counts), "finished": finished}
    write_whole(folder / "progress.json", json.dumps(data, indent=1).encode())
