"""From data folders to vectors, numbers, pictures and the page.

OUT/NAME/           a folder's vectors (`deltas`)
OUT/*.png           its pictures, NAME-users.png and others
OUT/analysis.json   every number of the page; no text of anybody
OUT/report.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.analysis import figures
from perfit_cloud.analysis.cross_term import measure_cross_terms
from perfit_cloud.analysis.deltas import Array, Deltas, DeltaSettings, open_deltas, write_deltas
from perfit_cloud.analysis.outliers import place_users, sample_texts
from perfit_cloud.analysis.prompts import Prompts
from perfit_cloud.analysis.queries import asking_users, count_questions, find_users
from perfit_cloud.analysis.recommend import recommend
from perfit_cloud.analysis.report import TaskReport, write_html
from perfit_cloud.analysis.request import AnalysisRequest
from perfit_cloud.analysis.spectrum import Doubles, coordinates, spectrum, statistics_of
from perfit_cloud.collective.items import source_of
from perfit_cloud.collective.progress import Progress
from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.errors import InvalidInput
from perfit_shared.files import write_whole
from perfit_shared.prompts import as_read, load_prompts
from perfit_shared.shifts import ShiftTensors
from perfit_shared.tasks import Task

__all__ = ["run_analysis"]

_MAP_USERS = 2000  # of each task in the map of all


@dataclass(frozen=True)
class _Folder:
    name: str
    file: Path
    task: Task
    settings: DeltaSettings


def run_analysis(
    request: AnalysisRequest,
    *,
    personal: Mapping[str, Path] | None = None,
    base: BaseModel | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Do it, or go on with what OUT holds of the same request; gives what analysis.json holds.

    `personal`: files of trained personal shifts by user id, for the cross term; others have the seed.

    Raises Cancelled when `stop` says so, InvalidInput on what cannot be, InvalidData on data that cannot
    be read, ShiftMismatch for an artefact of another model.
    """
    if request.threads > 0:
        import torch

        torch.set_num_threads(request.threads)
    artefacts = _read_artefacts(request, personal or {})
    base = base or load_base(
        request.model, dtype=request.dtype, device=request.device, placement=request.placement
    )
    if request.layer is not None and request.layer >= base.blocks:
        raise InvalidInput(
            f"layer {request.layer} asked for, but the model has blocks 0 to {base.blocks - 1}"
        )
    folders = [_read_folder(request, path, base) for path in request.data]  # all, before any is computed
    if unused := artefacts.keys() - {folder.task.name for folder in folders}:
        raise InvalidInput(
            f"no data folder is of the task {', '.join(sorted(unused))} that an artefact is of"
        )
    analysis = _Analysis(request, base, artefacts, personal or {})
    found = [analysis.of_folder(folder, stop) for folder in folders]
    shared = analysis.draw_map(folders) if len(folders) > 1 else {}
    write_html(request.out, f"What a history changes in {base.name}", found, shared)
    numbers = {"model": base.name, "tasks": {task.name: _as_json(task) for task in found}}
    write_whole(request.out / "analysis.json", json.dumps(numbers, indent=1).encode())
    return numbers


def _read_folder(request: AnalysisRequest, path: Path, base: BaseModel) -> _Folder:
    file = find_users(path)
    task = load_prompts(file.parent, request.task, request.prompts)
    task, _ = as_read(task, has_template=base.has_chat_template, chat=request.chat, prompts=request.prompts)
    settings = DeltaSettings(
        model=base.fingerprint,
        dtype=str(base.model.dtype).removeprefix("torch."),
        task=task.to_json(),
        source=source_of(file),
        data_digest=_sha256(file),
        retrieved=request.queries.retrieved,
        most=request.queries.most,
        users=request.users,
        control=request.control,
        pass_tokens=BatchBudget.of(base.device).rows,
        seed=request.seed,
    )
    return _Folder(request.name_of(path), file, task, settings)


class _Analysis:
    def __init__(
        self,
        request: AnalysisRequest,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        personal: Mapping[str, Path],
    ) -> None:
        self._request, self._base, self._artefacts = request, base, artefacts
        self._block = base.blocks // 2 if request.layer is None else request.layer
        (artefact,) = artefacts.values() if personal else (None,)
        self._personal = {} if artefact is None else _read_shifts(personal, artefact)

    def of_folder(self, folder: _Folder, stop: Callable[[], bool]) -> TaskReport:
        request, base, out = self._request, self._base, self._request.out
        users = partial(asking_users, folder.file, folder.task, request.queries, users=request.users)
        prompts = Prompts(base, folder.task)
        progress = Progress(count_questions(folder.file, folder.task, request.queries, users=request.users))
        progress.say(f"{folder.name}: {base.precision}")
        at = out / folder.name
        write_deltas(at, users(), prompts, base, folder.settings, progress=progress, stop=stop)
        deltas = open_deltas(at, folder.settings, base)
        blocks, directions = [], np.zeros(0)
        mean: Doubles = directions
        for block in range(base.blocks):
            statistics, found = statistics_of(
                block, _of_block(deltas.vectors, block), _control(deltas, block)
            )
            blocks.append(statistics)
            if block == self._block:
                directions, mean = found.directions, found.mean
        best = recommend(blocks, users=deltas.counts.rows, hidden_size=base.hidden_size)
        rows, control = _of_block(deltas.vectors, self._block), _control(deltas, self._block)
        pictures = {
            f"{folder.name}-users.png": "Users along the first directions (Figures 2, 7, 8).",
            f"{folder.name}-blocks.png": "Ranks and the first coordinate by block (Figure 15).",
        }
        names = list(pictures)
        along = coordinates(rows, directions)
        figures.draw_users(out / names[0], along, block=self._block)
        figures.draw_blocks(out / names[1], blocks, layers=best.layers)
        if control is not None:
            name = f"{folder.name}-control.png"
            figures.draw_control(
                out / name, blocks, along, coordinates(control, directions), block=self._block
            )
            pictures[name] = "Random prefixes of the same length in the histories' place (Figure 9)."
        placed = place_users(rows, mean, deltas.numbers)
        terms = []
        if folder.task.name in self._artefacts:
            artefact = self._artefacts[folder.task.name]
            terms = measure_cross_terms(base, artefact, self._personal, users(), prompts)
        return TaskReport(
            folder.name,
            self._facts(folder, deltas),
            self._block,
            blocks,
            best,
            placed,
            sample_texts(users(), [one.number for one in placed]) if request.texts else None,
            terms,
            pictures,
        )

    def _facts(self, folder: _Folder, deltas: Deltas) -> dict[str, Any]:
        counts, settings = deltas.counts, folder.settings
        measured = max(counts.questions - counts.too_long, 1)
        return {
            "task": folder.task.name,
            "data": settings.source,
            "model": self._base.name,
            "dtype": settings.dtype,
            "users": counts.rows,
            "queries": counts.questions,
            "queries_too_long": counts.too_long,
            "mean_query_tokens": round(counts.query_tokens / measured, 1),
            "mean_history_tokens": round(counts.history_tokens / measured, 1),
            "entries_retrieved": settings.retrieved,
            "hidden_size": self._base.hidden_size,
        }

    def draw_map(self, folders: list[_Folder]) -> dict[str, str]:
        """All tasks on the first two principal components of their vectors together, the mean taken out."""
        opened = {f.name: open_deltas(self._request.out / f.name, f.settings, self._base) for f in folders}
        parts = {name: _of_block(d.vectors, self._block)[:_MAP_USERS] for name, d in opened.items()}
        joined = np.concatenate(list(parts.values()))
        found = spectrum(joined, centred=True)
        placed = {name: coordinates(part - found.mean, found.directions[:2]) for name, part in parts.items()}
        figures.draw_tasks(self._request.out / "tasks.png", placed, block=self._block)
        return {"tasks.png": "All tasks' vectors in one map (Figure 16)."}


def _read_artefacts(request: AnalysisRequest, personal: Mapping[str, Path]) -> dict[str, Artefact]:
    """By task."""
    read = [Artefact.load(path) for path in request.artefacts]
    found = {artefact.task.name: artefact for artefact in read}
    if len(found) < len(read):
        raise InvalidInput("two of the artefacts are of one task; name one of them")
    if personal and len(found) != 1:
        raise InvalidInput("personal shifts belong to one artefact; name that one alone")
    return found


def _read_shifts(files: Mapping[str, Path], artefact: Artefact) -> dict[str, ShiftTensors]:
    spec = artefact.spec
    return {
        name: ShiftTensors.from_bytes(path.read_bytes(), spec, spec.personal_rank)
        for name, path in files.items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_block(vectors: Array, block: int) -> Array:
    """(users, d), still on the disk."""
    return vectors[:, block]


def _control(deltas: Deltas, block: int) -> Array | None:
    return None if deltas.control is None else _of_block(deltas.control, block)


def _as_json(task: TaskReport) -> dict[str, Any]:
    return {
        **task.facts,
        "block": task.block,
        "blocks": [asdict(block) for block in task.blocks],
        "recommendation": asdict(task.recommendation),
        "placed": [asdict(one) for one in task.placed],
        "cross_terms": [asdict(term) for term in task.cross_terms],
    }
