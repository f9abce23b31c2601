"""What PerFit starts from: a collective shift that is given, found or trained, or the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from perfit_cloud.collective.blank import blank_artefact
from perfit_cloud.collective.data import Corpus, read_items, tokenise
from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.collective.spec import spec_of
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.sinks import evenly
from perfit_shared.errors import InvalidInput, ShiftMismatch
from perfit_shared.positions import Positions
from perfit_shared.presets import Preset, preset_for, preset_name
from perfit_shared.prompts import prompts_of
from perfit_shared.tasks import Task

if TYPE_CHECKING:
    from perfit_cloud.lamp.methods.interface import TaskData
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["collective_artefact", "collective_corpus", "identity_artefact", "prompt_texts"]


def collective_artefact(
    request: LampRequest, task: Task, base: BaseModel, stop: Callable[[], bool]
) -> Artefact:
    """The collective shift with its seed: given, found in OUT, or trained."""
    say = Progress(0).say
    folder = request.artefact or request.out / "artefact"
    if request.artefact is None and not (folder / "artefact.json").is_file():
        artefact = train_collective(_collective(request, folder), base=base, stop=stop)
    else:
        artefact = Artefact.load(folder)
        say(f"{folder}: {_preset(request).mapping(artefact.spec, blocks=base.blocks, given=True)}")
    _check(artefact, request, base, folder)
    if request.artefact is None:
        _check_own(artefact, request, task, folder)
    elif artefact.task.name == task.name and prompt_texts(artefact.task) != prompt_texts(task):
        trained, requested = prompts_of(artefact.task), prompts_of(task)
        say(f"{folder} was trained with other prompts ({trained}) than are asked here ({requested})")
    return artefact


def collective_corpus(request: LampRequest, data: TaskData) -> Corpus:
    """The collective users' examples as tokens, split as stage 1 splits them."""
    items = read_items(request.data, data.task)
    if request.collective_users is not None:
        items = items.first_users(request.collective_users, request.seed)
    if request.collective_group is not None:
        items = items.group(request.collective_group, request.seed)
    return tokenise(items, base=data.base, task=data.task, seed=request.seed)


def identity_artefact(request: LampRequest, data: TaskData, *, sums_ranks: bool) -> Artefact:
    """φ₁ that changes nothing, and φ₂ at the personal rank or at the sum of both.

    The people's histories show where the model's sinks are.
    """
    preset = _preset(request)
    spec = spec_of(request, preset, data.base)
    spec = replace(spec, personal_rank=spec.personal_rank + spec.collective_rank * sums_ranks)
    items = evenly([item for person in data.people.people for item in person.history])
    prompts = [example.pair[0] for example in data.encoder.examples(items)]
    return blank_artefact(request, data.task, data.base, spec, preset=preset, prompts=prompts)


def prompt_texts(task: Task) -> tuple[object, ...]:
    """What decides how the model is asked."""
    return task.template, task.answer, task.history_template, task.chat, task.system


_ALIKE = (
    *("task", "data", "model", "preset", "prompts", "chat", "layers", "positions", "collective_rank"),
    *("personal_rank", "batch_size", "seed", "dtype", "device", "threads"),
)


def _collective(request: LampRequest, out: Path) -> CollectiveRequest:
    return CollectiveRequest(
        **{name: getattr(request, name) for name in _ALIKE},
        out=out,
        users=request.collective_users,
        group=request.collective_group,
        epochs=request.collective_epochs,
        learning_rate=request.collective_learning_rate,
        device_epochs=request.epochs,
        device_learning_rate=request.learning_rate,
    )


def _preset(request: LampRequest) -> Preset:
    return preset_for(preset_name(request.task or "", request.preset))


def _check(artefact: Artefact, request: LampRequest, base: BaseModel, folder: Path) -> None:
    """Raises ShiftMismatch or InvalidInput unless the artefact fits model and request."""
    if artefact.fingerprint != base.fingerprint:
        raise ShiftMismatch(f"{folder} was trained on another base model than {base.name}")
    requested = {name: getattr(request, name) for name in ("layers", "collective_rank", "personal_rank")}
    requested["positions"] = _positions(request, artefact)
    differing = [k for k, v in requested.items() if v is not None and getattr(artefact.spec, k) != v]
    if differing:
        names = ", ".join(name.replace("_", " ") for name in differing)
        raise InvalidInput(f"{folder} was trained with other {names}; leave them out, or train anew")


def _positions(request: LampRequest, artefact: Artefact) -> str | None:
    """What is asked for; where that leaves skipped tokens to the model, those that the artefact skips."""
    if request.positions is None:
        return None
    requested = Positions.parse(request.positions)
    if not request.positions.startswith("s") and requested.first:
        requested = replace(requested, skipped=Positions.parse(artefact.spec.positions).skipped)
    return str(requested)


def _check_own(artefact: Artefact, request: LampRequest, task: Task, folder: Path) -> None:
    """Raises InvalidInput when the artefact that OUT holds was trained in another way than is asked now."""
    trained = artefact.card.get("hyper_parameters", {})
    requested = {
        "seed": request.seed,
        "epochs": request.collective_epochs,
        "batch_size": request.batch_size,
        "learning_rate": request.collective_learning_rate,
        "preset": request.preset,
    }
    differing = [k for k, v in requested.items() if v is not None and k in trained and trained[k] != v]
    if prompt_texts(artefact.task) != prompt_texts(task):
        differing.append("prompts")
    if differing:
        names = ", ".join(name.replace("_", " ") for name in differing)
        raise InvalidInput(f"{folder} was trained with other {names}; use another --out")
