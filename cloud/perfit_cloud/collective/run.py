"""A whole stage-1 run: read, choose rates, train, measure, write the artefact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perfit_cloud.collective import checkpoint
from perfit_cloud.collective.card import draw_losses, make_card, write_card
from perfit_cloud.collective.communities import FILE as COMMUNITIES
from perfit_cloud.collective.communities import check_communities
from perfit_cloud.collective.community_run import with_communities
from perfit_cloud.collective.data import Corpus, find_data, read_items, tokenise
from perfit_cloud.collective.files import check_out, make_out
from perfit_cloud.collective.items import Items
from perfit_cloud.collective.privacy import Budget
from perfit_cloud.collective.processes import Processes
from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.spec import spec_of
from perfit_cloud.collective.steps import from_torch
from perfit_cloud.collective.training import FORWARD, RunControl, Stage1Settings, Stage1Training
from perfit_cloud.collective.trials import choose_device_rate, choose_rate, device_work, trial_work
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.placement import ONE_DEVICE, Placement
from perfit_cloud.model.sinks import past_sinks
from perfit_shared.errors import InvalidInput
from perfit_shared.positions import Positions
from perfit_shared.presets import Preset, preset_for, preset_name, value_or
from perfit_shared.prompts import as_read, load_prompts
from perfit_shared.shifts import ShiftSpec

__all__ = ["CollectiveRequest", "train_collective"]


@dataclass(frozen=True)
class CollectiveRequest:
    """What an operator asks for; None stands for the preset's value, or a choice on the data."""

    task: str | None  # the one that the folder's task.json names
    data: Path  # a folder or a file
    model: str  # folder or hub name
    out: Path
    preset: str | None = None  # the task's own
    prompts: str | None = None  # of perfit_shared.prompts; task.json's, else the built-in ones
    chat: str | None = None  # of perfit_shared.prompts.READINGS; as the task says
    layers: tuple[int, ...] | None = None
    positions: str | None = None
    collective_rank: int | None = None
    personal_rank: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None  # examples a step, of all processes together
    accumulate: int = 1  # micro-batches that a process splits its share of a batch into
    gradient_checkpointing: bool = False
    users: int | None = None  # train on so many, drawn by the seed; all
    group: int | None = None  # train on one of the groups of `Items.group`
    validation: Path | None = None  # examples of others to validate on; a slice of the data's users
    budget: Budget | None = None  # of differential privacy by person; it needs `validation`
    communities: int = 1  # seeds beside the plain one, for clusters of people; 1: none
    device_epochs: int | None = None
    device_learning_rate: float | None = None
    seed: int = 0
    force: bool = False  # replace a finished artefact
    threads: int = 0  # of the CPU; 0: torch's own choice, one a core
    dtype: str = "auto"
    device: str = "auto"
    placement: Placement = ONE_DEVICE  # over several devices, instead


def train_collective(
    request: CollectiveRequest, *, base: BaseModel | None = None, stop: Callable[[], bool] = lambda: False
) -> Artefact:
    """Train and write the artefact, or go on with an interrupted run of the same request.

    `base`: what `request.model` names, where it is loaded already; the request's dtype and device
    then do not count. Its weights are used, its modules and their hooks are not.

    Started by `accelerate launch`, every process calls this and gets the artefact; the main one
    prints and writes. How many there are, and into how many micro-batches they split, may differ
    when an interrupted run goes on.

    Raises Cancelled when `stop` says so in any process (the run is saved), InvalidInput on flags that
    cannot be or an output folder in use, InvalidData on data that cannot be read.
    """
    processes = Processes()
    progress = Progress(0, shown=processes.main)
    processes.broadcast_from_main(lambda: check_out(request.out, force=request.force))
    if request.threads > 0:
        torch.set_num_threads(request.threads)
    training = _begin(request, base, processes, progress, stop)
    _plan_work(training, progress)
    with training.prepared():
        choose_rate(training)
        training.train()
        device_rate = choose_device_rate(training)
        losses = {mode: training.validation_loss(mode=mode) for mode in ("base", "collective", "seed")}
    training.save()
    artefact = _artefact(training, request, device_rate, losses)
    if request.communities > 1:
        artefact = with_communities(
            artefact,
            training.corpus,
            training.base,
            request.communities,
            seed=request.seed,
            out=request.out,
            progress=progress,
            stop=stop,
        )
    if processes.main:
        _write(artefact, training, request.out, base_loss=losses["base"])
    return artefact


def _begin(
    request: CollectiveRequest,
    base: BaseModel | None,
    processes: Processes,
    progress: Progress,
    stop: Callable[[], bool],
) -> Stage1Training:
    """Everything read and checked, at the step where an interrupted run stopped."""
    file = find_data(request.data)
    task = load_prompts(file.parent, request.task, request.prompts)
    items = read_items(file, task)
    validation = None if request.validation is None else read_items(request.validation, task)
    if request.budget is not None:
        _check_private(request, items)
    if request.communities > 1 and processes.count > 1:
        raise InvalidInput(
            "communities are learned in one process; leave out --communities, and add them with "
            "`perfit-cloud collective communities`"
        )
    if request.placement.splits and processes.count > 1:
        raise InvalidInput(
            "a model over several devices is trained on in one process; leave out the launcher"
        )
    if request.group is not None:
        items = items.group(request.group, request.seed)
    if request.users is not None:
        items = items.first_users(request.users, request.seed)
    if base is None:
        device = processes.device(request.device)
        dtype = processes.dtype(request.dtype, device)
        with processes.local_main_first():
            base = load_base(request.model, dtype=dtype, device=device, placement=request.placement)
    else:
        base = replace(base, model=base.share_weights())  # hooks that the caller has on it would shift twice
    task, how = as_read(task, has_template=base.has_chat_template, chat=request.chat, prompts=request.prompts)
    preset = preset_for(preset_name(task.name, request.preset))
    spec = spec_of(request, preset, base)  # before the data are tokenised: flags that cannot be end here
    corpus = tokenise(items, base=base, task=task, seed=request.seed, others=validation)
    if request.communities != 1:
        check_communities(request.communities, len(corpus.train))
    # The spec is public, so private prompts must not decide where the sinks are.
    prompts = [prompt for prompt, _ in corpus.validation]
    positions = processes.broadcast_from_main(
        lambda: past_sinks(request.positions or spec.positions, base, prompts, spec.layers[0])
    )
    settings = _settings(request, preset, spec := replace(spec, positions=positions))
    progress.say(how)
    progress.say(base.precision)
    progress.say(preset.mapping(spec, blocks=base.blocks, given=request.layers is not None))
    if (skipped := _skipped(positions)) is not None:
        progress.say(skipped)
    _report(corpus, progress)
    processes.broadcast_from_main(lambda: make_out(request.out))
    training = Stage1Training(
        base, corpus, task, settings, processes=processes, control=RunControl(request.out, progress, stop)
    )
    if (privacy := training.privacy) is not None:
        progress.say(
            f"private by person: epsilon {privacy.epsilon:g}, delta {privacy.delta:.2g}, "
            f"{privacy.people} people, {privacy.steps} steps of {privacy.expected:.0f} expected, "
            f"noise {privacy.noise_multiplier:.3g} times the clip norm {privacy.clip_norm:g}"
        )
    return training


def _check_private(request: CollectiveRequest, items: Items) -> None:
    """Raises InvalidInput where one person could stand as several, or decide what others' data do."""
    if request.communities > 1:
        raise InvalidInput(
            "the communities' seeds would tell of people beyond the privacy budget; leave out --communities "
            "with --epsilon"
        )
    if request.validation is None:
        raise InvalidInput(
            "what is validated on is told outside the privacy budget; give public examples with --validation"
        )
    if request.users is not None:
        raise InvalidInput(
            "one person more in the data would change who else is drawn; leave out --users with --epsilon"
        )
    if items.unnamed:
        raise InvalidInput(
            f"{items.source}: {items.unnamed} lines or questions would each count as a person; with "
            "--epsilon give every line a user_id, or a file of users"
        )
    if items.only_profiles:
        raise InvalidInput(
            f"{items.source}: {items.only_profiles} people have a profile and no query, so one person's "
            "query would decide whose data are read; with --epsilon give everybody queries, or nobody"
        )


def _artefact(
    training: Stage1Training, request: CollectiveRequest, device_rate: float, losses: Mapping[str, float]
) -> Artefact:
    settings, task = training.settings, training.task
    preset = preset_name(task.name, request.preset)
    card = make_card(training, preset=preset, device_rate=device_rate, losses=losses)
    return Artefact(
        name=task.name,
        spec=settings.spec,
        task=task,
        fingerprint=training.base.fingerprint,
        collective=from_torch(training.collective),
        seed=from_torch(training.personal),
        learning_rate=device_rate,
        epochs=settings.device_epochs,
        batch_size=settings.batch_size,
        card=card,
    )


def _write(artefact: Artefact, training: Stage1Training, out: Path, *, base_loss: float) -> None:
    """The artefact with its card and picture; the checkpoint is not needed any more."""
    draw_losses(out / "loss.png", training, base=base_loss)
    write_card(out / "CARD.md", artefact.name, artefact.card)
    artefact.save(out)
    for name in (checkpoint.FILE, COMMUNITIES):
        (out / name).unlink(missing_ok=True)


def _settings(request: CollectiveRequest, preset: Preset, spec: ShiftSpec) -> Stage1Settings:
    return Stage1Settings(
        spec=spec,
        epochs=value_or(request.epochs, preset.collective_epochs),
        batch_size=value_or(request.batch_size, preset.batch_size),
        device_epochs=value_or(request.device_epochs, preset.epochs),
        learning_rate=request.learning_rate,
        device_learning_rate=request.device_learning_rate,
        seed=request.seed,
        accumulate=request.accumulate,
        gradient_checkpointing=request.gradient_checkpointing,
        budget=request.budget,
    )


def _skipped(positions: str) -> str | None:
    skipped = Positions.parse(positions).skipped
    if skipped > 1:
        return f"the first {skipped} tokens, attention sinks, stay as they are"
    return "the first token, an attention sink, stays as it is" if skipped else None


def _report(corpus: Corpus, progress: Progress) -> None:
    data = corpus.summary()
    progress.say(
        f"{data['examples']} examples of {data['users']} users from {data['source']} ({data['rows']}), "
        f"{data['validation_examples']} of them for validation; left out: "
        f"{corpus.dropped_empty} with an empty field, {corpus.dropped_long} with an answer too long; "
        f"{corpus.shortened} prompts cut to {corpus.token_cap} tokens"
    )
    if corpus.only_profiles:
        progress.say(
            f"{corpus.only_profiles} users are left out: they have a profile and no query, and where anybody "
            "has queries those are trained on"
        )


def _plan_work(training: Stage1Training, progress: Progress) -> None:
    """Add up the units of all phases, so that the remaining time covers all of them."""
    settings, validation = training.settings, FORWARD * len(training.corpus.validation)
    units = len(training.examples) * settings.epochs + validation * (
        settings.epochs * training.checks_an_epoch + 4
    )
    units += training.cache_work
    if settings.learning_rate is None and not training.record.learning_rate:
        units += trial_work(training)
    if settings.device_learning_rate is None:
        units += device_work(training)
    progress.total = units
