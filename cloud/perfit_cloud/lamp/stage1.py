"""The collective shift of a run: given, found where an earlier run left it, trained, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.run import CollectiveRun as CollectiveRequest
from perfit_cloud.collective.run import train_collective
from perfit_cloud.lamp.people import People
from perfit_cloud.lamp.request import LampRun
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.sinks import past_sinks
from perfit_shared.errors import InvalidInput, ShiftMismatch
from perfit_shared.positions import Positions
from perfit_shared.presets import Preset, preset_for
from perfit_shared.prompts import prompts_of
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import Task

__all__ = ["artefact_for"]


def artefact_for(
    request: LampRun, task: Task, base: BaseModel, people: People, stop: Callable[[], bool]
) -> tuple[Artefact, float]:
    """The collective shift with its seed, and what stage 1 took in seconds: given, found in OUT, or trained.

    Without a collective shift both are the identity, and `people` show where the model's sinks are.
    """
    say = Progress(0).say
    if request.alone:
        return _identity(request, task, base, people, say), 0.0
    folder = request.artefact or request.out / "artefact"
    if request.artefact is None and not (folder / "artefact.json").is_file():
        artefact = train_collective(_collective(request, folder), base=base, stop=stop)
    else:
        artefact = Artefact.load(folder)
        spec = artefact.spec
        say(f"{folder}: {_preset(request).mapping(spec, blocks=base.blocks, given=True)}")
    _check(artefact, request, base, folder)
    if request.artefact is None:
        _check_own(artefact, request, task, folder)
    elif artefact.task.name == task.name and _asked(artefact.task) != _asked(task):
        trained, asked = prompts_of(artefact.task), prompts_of(task)
        say(f"{folder} was trained with other prompts ({trained}) than are asked here ({asked})")
    return artefact, float(artefact.card.get("seconds", 0.0))


def _asked(task: Task) -> tuple[str, ...]:
    return task.template, task.answer, task.history_template


def _collective(request: LampRun, out: Path) -> CollectiveRequest:
    return CollectiveRequest(
        task=request.task,
        data=request.data,
        model=request.model,
        out=out,
        preset=request.preset,
        prompts=request.prompts,
        layers=request.layers,
        positions=request.positions,
        collective_rank=request.collective_rank,
        personal_rank=request.personal_rank,
        epochs=request.collective_epochs,
        learning_rate=request.collective_learning_rate,
        batch_size=request.batch_size,
        device_epochs=request.epochs,
        device_learning_rate=request.learning_rate,
        seed=request.seed,
        users=request.collective_users,
        dtype=request.dtype,
        device=request.device,
        threads=request.threads,
    )


def _spec(request: LampRun, base: BaseModel, people: People) -> ShiftSpec:
    """The preset's, with what the request overrides and past the model's attention sinks."""
    spec = _preset(request).spec(
        blocks=base.blocks,
        hidden_size=base.hidden_size,
        layers=request.layers,
        positions=request.positions,
        collective_rank=request.collective_rank,
        personal_rank=request.personal_rank,
    )
    prompts = [prompt for person in people.people for prompt, _ in person.history]
    positions = past_sinks(request.positions or spec.positions, base, prompts, spec.layers[0])
    return replace(spec, positions=positions)


def _preset(request: LampRun) -> Preset:
    return preset_for(request.preset or request.task)


def _identity(
    request: LampRun, task: Task, base: BaseModel, people: People, say: Callable[[str], None]
) -> Artefact:
    """φ₁ that changes nothing, and φ₂ at the personal rank or at the sum of both."""
    if request.learning_rate is None:
        raise InvalidInput("without stage 1 nothing chooses a learning rate; give --lr")
    preset, spec = _preset(request), _spec(request, base, people)
    say(preset.mapping(spec, blocks=base.blocks, given=request.layers is not None))
    rank = spec.personal_rank + (spec.collective_rank if request.ablation == "stage2_sum" else 0)
    spec = ShiftSpec(spec.layers, spec.positions, 1, rank, spec.hidden_size)
    return Artefact(
        name=task.name,
        spec=spec,
        task=task,
        fingerprint=base.fingerprint,
        collective=ShiftTensors.identity(spec, 1, 2 * request.seed),
        seed=ShiftTensors.identity(spec, rank, 2 * request.seed + 1),
        learning_rate=request.learning_rate,
        epochs=request.epochs or preset.epochs,
        batch_size=request.batch_size or preset.batch_size,
    )


def _check(artefact: Artefact, request: LampRun, base: BaseModel, folder: Path) -> None:
    """Raises ShiftMismatch or InvalidInput unless the artefact fits model and request."""
    if artefact.fingerprint != base.fingerprint:
        raise ShiftMismatch(f"{folder} was trained on another base model than {base.name}")
    asked = {
        "layers": request.layers,
        "positions": _positions(request, artefact),
        "collective_rank": request.collective_rank,
        "personal_rank": request.personal_rank,
    }
    differing = [k for k, v in asked.items() if v is not None and getattr(artefact.spec, k) != v]
    if differing:
        names = ", ".join(name.replace("_", " ") for name in differing)
        raise InvalidInput(f"{folder} was trained with other {names}; leave them out, or train anew")


def _positions(request: LampRun, artefact: Artefact) -> str | None:
    """What is asked for; where that leaves skipped tokens to the model, those that the artefact skips."""
    if request.positions is None:
        return None
    asked = Positions.parse(request.positions)
    if not request.positions.startswith("s") and asked.first:
        asked = replace(asked, skipped=Positions.parse(artefact.spec.positions).skipped)
    return str(asked)


def _check_own(artefact: Artefact, request: LampRun, task: Task, folder: Path) -> None:
    """Raises InvalidInput when the artefact that OUT holds was trained in another way than is asked now."""
    trained = artefact.card.get("hyper_parameters", {})
    asked = {
        "seed": request.seed,
        "epochs": request.collective_epochs,
        "batch_size": request.batch_size,
        "learning_rate": request.collective_learning_rate,
        "preset": request.preset,
    }
    differing = [k for k, v in asked.items() if v is not None and k in trained and trained[k] != v]
    if _asked(artefact.task) != _asked(task):
        differing.append("prompts")
    if differing:
        names = ", ".join(name.replace("_", " ") for name in differing)
        raise InvalidInput(f"{folder} was trained with other {names}; use another --out")
