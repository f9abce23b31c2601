"""A whole stage-1 run: read, choose rates, train, measure, write the artefact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perfit_cloud.collective import checkpoint
from perfit_cloud.collective.card import draw_losses, make_card, write_card
from perfit_cloud.collective.data import Corpus, find_data, read_items, tokenise
from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.steps import from_torch
from perfit_cloud.collective.training import FORWARD, Settings, Training
from perfit_cloud.collective.trials import choose_device_rate, choose_rate, device_users, trial_steps
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.shifts import hooked
from perfit_shared.errors import InvalidInput
from perfit_shared.presets import preset_for
from perfit_shared.shifts import ShiftSpec
from perfit_shared.tasks import load_task, task_named

__all__ = ["Request", "train_collective"]


@dataclass(frozen=True)
class Request:
    """What an operator asks for; None stands for the preset's value, or a choice on the data."""

    task: str
    data: Path  # a folder or a file
    model: str  # folder or hub name
    out: Path
    preset: str | None = None  # the task's own
    layers: tuple[int, ...] | None = None
    positions: str | None = None
    collective_rank: int | None = None
    personal_rank: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    device_epochs: int | None = None
    device_learning_rate: float | None = None
    seed: int = 0
    force: bool = False  # replace a finished artefact
    threads: int = 0  # of the CPU; 0: torch's own choice, one a core
    dtype: str = "auto"
    device: str = "auto"


def train_collective(
    request: Request, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
) -> Artefact:
    """Train and write the artefact, or go on with an interrupted run of the same request.

    Raises Cancelled when `stop` says so (the run is saved), InvalidInput on flags that cannot be or
    an output folder in use, InvalidData on data that cannot be read.
    """
    progress = progress or Progress(0)
    _check_out(request)
    if request.threads > 0:
        torch.set_num_threads(request.threads)
    task_named(request.task)
    file = find_data(request.data)
    task = load_task(file.parent, request.task)
    items = read_items(file, task)
    base = load_base(request.model, dtype=request.dtype, device=request.device)
    settings = _settings(request, base, progress)
    corpus = tokenise(items, base=base, task=task, seed=request.seed)
    _report(corpus, progress)
    _make_out(request.out)
    training = Training(base, corpus, task, settings, out=request.out, progress=progress, stop=stop)
    _plan_work(training, progress)
    with hooked(base.model, settings.spec.layers):
        choose_rate(training)
        training.train()
        device_rate = choose_device_rate(training)
        losses = {mode: training.validation_loss(mode=mode) for mode in ("base", "collective", "seed")}
    training.save()
    card = make_card(training, preset=request.preset or task.name, device_rate=device_rate, losses=losses)
    artefact = Artefact(
        name=task.name, spec=settings.spec, task=task, fingerprint=base.fingerprint,
        collective=from_torch(training.collective), seed=from_torch(training.personal),
        learning_rate=device_rate, epochs=settings.device_epochs, batch_size=settings.batch_size, card=card,
    )  # fmt: skip
    draw_losses(request.out / "loss.png", training, base=losses["base"])
    write_card(request.out / "CARD.md", artefact.name, card)
    artefact.save(request.out)
    (request.out / checkpoint.FILE).unlink(missing_ok=True)
    return artefact


def _check_out(request: Request) -> None:
    out = request.out
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is a file; --out should be a folder")
    if (out / "artefact.json").exists() and not request.force:
        raise InvalidInput(f"{out} holds a finished artefact; use another --out, or --force to replace it")


def _make_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write to {out}: {error.strerror}") from error


def _settings(request: Request, base: BaseModel, progress: Progress) -> Settings:
    preset = preset_for(request.preset or request.task)
    spec = preset.spec(blocks=base.blocks, hidden_size=base.hidden_size, layers=request.layers)
    changes = {
        "positions": request.positions,
        "collective_rank": request.collective_rank,
        "personal_rank": request.personal_rank,
    }
    spec = replace(spec, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    progress.say(_mapping(spec, preset.paper_layers, blocks=base.blocks, given=request.layers is not None))
    return Settings(
        spec=spec,
        epochs=_or(request.epochs, preset.collective_epochs),
        batch_size=_or(request.batch_size, preset.batch_size),
        device_epochs=_or(request.device_epochs, preset.epochs),
        learning_rate=request.learning_rate,
        device_learning_rate=request.device_learning_rate,
        seed=request.seed,
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _mapping(spec: ShiftSpec, paper: tuple[int, ...], *, blocks: int, given: bool) -> str:
    chosen = ";".join(map(str, spec.layers))
    origin = "as given" if given else f"from {';'.join(map(str, paper))} of 32"
    return (
        f"layers {chosen} of {blocks} ({origin}), positions {spec.positions}, "
        f"ranks {spec.collective_rank}/{spec.personal_rank}"
    )


def _report(corpus: Corpus, progress: Progress) -> None:
    data = corpus.summary()
    progress.say(
        f"{data['examples']} examples of {data['users']} users from {data['source']} ({data['rows']}), "
        f"{data['validation_examples']} of them for validation; left out: "
        f"{corpus.dropped_empty} with an empty field, {corpus.dropped_long} too long"
    )


def _plan_work(training: Training, progress: Progress) -> None:
    """Add up the units of all phases, so that the remaining time counts what is still to come."""
    settings, validation = training.settings, FORWARD * len(training.corpus.validation)
    units = len(training.examples) * settings.epochs + validation * (settings.epochs + 4)
    if settings.learning_rate is None and not training.record.learning_rate:
        units += 4 * (trial_steps(training) * settings.batch_size + validation)
    if settings.device_learning_rate is None:
        examples = sum(len(pairs) * 3 // 4 for pairs in device_users(training))
        units += 3 * examples * settings.device_epochs
    progress.total = units
