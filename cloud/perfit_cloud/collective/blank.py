"""Artefacts without collective data: φ₁ is the identity, and the seed starts at it or close by.

Personal shifts work with one from the first user on. Once many users have given examples,
`collective train` makes a better one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from perfit_cloud.collective.card import libraries
from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.collective.files import check_out, make_out
from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.spec import ShiftChoice, spec_of
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.placement import ONE_DEVICE, Placement
from perfit_cloud.model.sinks import past_sinks
from perfit_shared.errors import InvalidInput
from perfit_shared.presets import Preset, preset_for, preset_name, value_or
from perfit_shared.prompts import as_read
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.starts import near_identity
from perfit_shared.tasks import Task, load_task, task_named

__all__ = ["RATE", "START", "BlankRequest", "blank_artefact", "make_blank"]

RATE = 1e-3  # peak rate of updates where none is given; without data nothing chooses one
START = 1e-3  # how far the seed moves a hidden state, of the state's length
_SOME_TEXT = "The council will decide on the new bridge over the river on Thursday, its speaker said."


class UpdateChoice(ShiftChoice, Protocol):
    """And how devices update, and what is drawn."""

    @property
    def epochs(self) -> int | None: ...
    @property
    def batch_size(self) -> int | None: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class BlankRequest:
    """What an operator asks for; None stands for the preset's value."""

    task: str
    model: str  # folder, hub name, .gguf file or smollm2
    out: Path
    data: Path | None = None  # a folder whose task.json says more of the task
    preset: str | None = None  # the task's own
    layers: tuple[int, ...] | None = None
    positions: str | None = None
    personal_rank: int | None = None
    epochs: int | None = None  # of an update
    learning_rate: float | None = None  # peak rate of updates; RATE
    batch_size: int | None = None  # examples a step
    seed: int = 0
    force: bool = False  # replace a finished artefact
    dtype: str = "auto"
    device: str = "auto"
    placement: Placement = ONE_DEVICE  # over several devices, instead
    collective_rank: int | None = None  # not asked for: nothing needs one

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise InvalidInput("a learning rate should lie between 0 and 1")
        for name in ("epochs", "batch_size"):
            if value_or(getattr(self, name), 1) < 1:
                raise InvalidInput(f"{name.replace('_', ' ')} should be at least 1")


def make_blank(request: BlankRequest, *, base: BaseModel | None = None) -> Artefact:
    """Write the artefact with its card. `base`: what `request.model` names, where it is loaded already.

    Raises InvalidInput on flags that cannot be or an output folder in use, InvalidData on a task.json or a
    model that cannot be read.
    """
    check_out(request.out, force=request.force)
    task = task_named(request.task) if request.data is None else load_task(request.data, request.task)
    preset = preset_for(preset_name(task.name, request.preset))  # before a model is loaded
    base = base or load_base(
        request.model, dtype=request.dtype, device=request.device, placement=request.placement
    )
    task, how = as_read(task, has_template=base.has_chat_template)
    item = dict.fromkeys(task.field_names, _SOME_TEXT)
    prompts = [example.pair[0] for example in Encoder(base, task).examples([item])]
    spec = spec_of(request, preset, base)
    Progress(0).say(how)
    artefact = blank_artefact(request, task, base, spec, preset=preset, prompts=prompts, start=START)
    artefact = replace(artefact, card=_card(artefact, request, base))
    make_out(request.out)
    (request.out / "CARD.md").write_text(_page(artefact), "utf-8")
    artefact.save(request.out)
    return artefact


def blank_artefact(
    choice: UpdateChoice,
    task: Task,
    base: BaseModel,
    spec: ShiftSpec,
    *,
    preset: Preset,
    prompts: Sequence[list[int]],
    start: float = 0.0,
) -> Artefact:
    """φ₁ of rank 1 that changes nothing; a seed of the spec's personal rank that moves states by `start`.

    `prompts` show where the model's sinks are.
    """
    positions = past_sinks(choice.positions or spec.positions, base, prompts, spec.layers[0])
    # What changes nothing needs no more than rank 1.
    spec = replace(spec, positions=positions, collective_rank=1)
    Progress(0).say(preset.mapping(spec, blocks=base.blocks, given=choice.layers is not None))
    rank, seed = spec.personal_rank, 2 * choice.seed + 1
    return Artefact(
        name=task.name,
        spec=spec,
        task=task,
        fingerprint=base.fingerprint,
        collective=ShiftTensors.identity(spec, 1, 2 * choice.seed),
        seed=near_identity(spec, rank, seed=seed, size=start / math.sqrt(rank)),
        learning_rate=value_or(choice.learning_rate, RATE),
        epochs=choice.epochs or preset.epochs,
        batch_size=choice.batch_size or preset.batch_size,
    )


def _card(artefact: Artefact, request: BlankRequest, base: BaseModel) -> dict[str, Any]:
    return {
        "model": base.name,
        "data": None,
        "hyper_parameters": {
            "preset": preset_name(artefact.task.name, request.preset),
            **artefact.spec.to_json(),
            "blocks": base.blocks,
            "seed": request.seed,
            "start": START,
            "personal_parameters": artefact.spec.personal_parameters(),
            "device_learning_rate": artefact.learning_rate,
            "device_epochs": artefact.epochs,
            "device_batch_size": artefact.batch_size,
        },
        "learning_rate_note": "It was given"
        if request.learning_rate is not None
        else "It is the default: there were no data to try others on",
        "libraries": libraries(),
    }


def _page(artefact: Artefact) -> str:
    """CARD.md."""
    card = artefact.card
    hyper = card["hyper_parameters"]
    lines = [
        f"# {artefact.name}: a blank artefact for {card['model']}",
        "",
        "**No collective data.** φ₁ is the identity (rank 1, W = R, b = 0): it changes nothing. Nothing was "
        "trained, so there are no figures. Personal shifts learn from their user's examples alone; "
        "`perfit-cloud collective train` makes an artefact that knows more once there are many users.",
        "",
        f"**Seed.** φ₂ (rank {hyper['personal_rank']}) after blocks {', '.join(map(str, hyper['layers']))} "
        f"of {hyper['blocks']} (counted from 0), positions {hyper['positions']}; "
        f"{hyper['personal_parameters']:,} numbers in a personal shift. It is a random start (seed "
        f"{hyper['seed']}): R with orthonormal rows, W and b off the identity by normal noise that moves a "
        f"hidden state by about {hyper['start']:g} of its length.",
        "",
        f"**Learning rate for devices: {hyper['device_learning_rate']:g}**, {hyper['device_epochs']} epochs, "
        f"{hyper['device_batch_size']} examples a step. {card['learning_rate_note']}.",
        "",
        "**Privacy.** It holds nothing of anybody.",
        "",
        "**Libraries.** " + ", ".join(f"{k} {v}" for k, v in card["libraries"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"
