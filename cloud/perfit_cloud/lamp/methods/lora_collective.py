"""Stage 1 of LoRA's variants: one adapter on q, k and v for everybody, trained on the collective examples.

    OUT/lora_c.safetensors   the adapter, with how it was trained and how it validates
    OUT/lora_c.partial       an interrupted training; gone once the adapter is written

Where no rate is given, short runs choose it on the validation slice, as PerFit's stage 1 does, and of
all epochs the one that validates best is kept.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.trials import Search
from perfit_cloud.lamp.methods.added_weights import (
    AddedWeights,
    Weights,
    WeightTraining,
    mean_loss,
    paper_schedule,
)
from perfit_cloud.lamp.methods.lora import ALPHA, DROPOUT, RANK
from perfit_cloud.lamp.results import write_bytes
from perfit_cloud.lamp.stage1 import collective_corpus, prompt_texts
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput, ShiftMismatch, UpdateFailed
from perfit_shared.presets import preset_for, preset_name, value_or
from perfit_shared.training import Schedule

if TYPE_CHECKING:
    from perfit_cloud.lamp.methods.interface import TaskData
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["COLLECTIVE_OPTIONS", "FILE", "check_collective", "collective_settings", "load_or_train"]

FILE, _PARTIAL = "lora_c.safetensors", "lora_c.partial"
_TRAINS = frozenset({"collective_users", "collective_group", "collective_epochs", "collective_learning_rate"})
COLLECTIVE_OPTIONS = _TRAINS | {"lora", "preset", "batch_size"}
_SAVE_SECONDS = 60.0
_TRIAL_SHARE, _TRIAL_LEAST, _TRIAL_MOST = 0.1, 20, 100  # steps of one trial of a rate
_VALIDATION = 0.4  # cost of a validated example, in units of a trained one


def check_collective(request: LampRequest) -> None:
    """Raises InvalidInput where an adapter is given and another is asked for."""
    given = [name.replace("_", " ") for name in sorted(_TRAINS) if getattr(request, name) is not None]
    if request.lora is not None and given:
        raise InvalidInput(f"{', '.join(given)}: a LoRA is given, so there is no stage 1 to train")


def collective_settings(request: LampRequest, added: AddedWeights) -> dict[str, Any]:
    """What decides a collective adapter, for a run's settings."""
    return {
        **{name: getattr(request, name) for name in (*sorted(_TRAINS), "preset")},
        "lora": {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "version": added.version},
        "collective_parameters": added.count,
    }


def load_or_train(
    request: LampRequest, data: TaskData, added: AddedWeights, stop: Callable[[], bool]
) -> float:
    """Write the collective adapter's weights into `added`: given, found in OUT, or trained.

    Returns the seconds that its training took. Raises Cancelled on a stop, with the training saved.
    """
    given = request.lora
    path = request.out / FILE if given is None else given / FILE if given.is_dir() else given
    if given is None and not path.is_file():
        return _Training(request, data, added, stop).run(path)
    weights, card = _read(path)
    _check(card, request, data, path, own=given is None)
    try:
        added.write(weights)
    except InvalidData as error:
        raise InvalidInput(
            f"{path} lies on other blocks than are asked for; use another one, or another --out"
        ) from error
    return float(card["seconds"])


def _read(path: Path) -> tuple[Weights, Mapping[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            card: dict[str, Any] = json.loads((file.metadata() or {})["card"])
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InvalidData(f"{path} is not a collective LoRA of a LaMP run") from error


def _check(card: Mapping[str, Any], request: LampRequest, data: TaskData, path: Path, *, own: bool) -> None:
    """Raises ShiftMismatch or InvalidInput unless the adapter fits the model, and OUT's own the request."""
    if card["fingerprint"] != data.base.fingerprint:
        raise ShiftMismatch(f"{path} was trained on another base model than {data.base.name}")
    asked = _asked(request, data) if own else {}
    # A card of an earlier version names no group: there were none.
    differing = [name for name, value in asked.items() if value is not None and card.get(name, -1) != value]
    if differing:
        names = ", ".join(name.replace("_", " ") for name in differing)
        raise InvalidInput(f"{path} was trained with other {names}; use another --out")


def _asked(request: LampRequest, data: TaskData) -> dict[str, Any]:
    """What a request says of a collective training, plain JSON values; None: nothing."""
    preset = preset_for(preset_name(data.task.name, request.preset))
    return {
        "fingerprint": data.base.fingerprint,
        "prompts": list(prompt_texts(data.task)),
        "users": request.collective_users or 0,
        "group": -1 if request.collective_group is None else request.collective_group,
        "epochs": value_or(request.collective_epochs, preset.collective_epochs),
        "batch_size": value_or(request.batch_size, preset.batch_size),
        "learning_rate": request.collective_learning_rate,
        "seed": request.seed,
    }


class _Training:
    def __init__(
        self, request: LampRequest, data: TaskData, added: AddedWeights, stop: Callable[[], bool]
    ) -> None:
        self._request, self._data, self._added, self._should_stop = request, data, added, stop
        self._asked = _asked(request, data)
        self._partial = request.out / _PARTIAL
        self._corpus = collective_corpus(request, data)
        self._pairs = self._corpus.examples()
        self._start = added.read()
        self._validation: list[float] = []  # before training and after every epoch
        self._best: Weights = self._start
        self._trials: dict[float, float] = {}  # validation loss by rate
        self._earlier = 0.0  # seconds of trials and validations, of earlier processes too
        self._progress = Progress(0)

    def run(self, path: Path) -> float:
        state = self._saved()
        trials_began = time.monotonic()
        self._progress.total = self._schedule(1e-3).work + _VALIDATION * len(self._corpus.validation)
        asked = state["rate"] if state else self._asked["learning_rate"]
        rate: float = self._choose() if asked is None else asked
        self._added.write(self._start)
        training = WeightTraining(self._added, self._pairs, self._schedule(rate))
        if state and training.resume(state["training"]):
            self._validation, self._best = list(state["validation"]), state["best"]
            self._earlier = state["earlier"]
        self._earlier += time.monotonic() - trials_began
        self._train(training, rate)
        self._added.write(self._best)
        card = {
            **self._asked,
            "learning_rate": rate,
            "trials": {f"{tried:g}": loss for tried, loss in self._trials.items() if math.isfinite(loss)},
            "validation": self._validation,
            "losses": training.losses,
            "seconds": training.seconds + self._earlier,
            "data": self._corpus.summary(),
        }
        metadata = {"card": json.dumps(card)}
        write_bytes(path, safetensors.torch.save(dict(self._added.read()), metadata))
        self._partial.unlink(missing_ok=True)
        return float(card["seconds"])

    def _schedule(self, rate: float) -> Schedule:
        figures = {name: self._asked[name] for name in ("epochs", "batch_size", "seed")}
        return paper_schedule(self._pairs, learning_rate=rate, **figures)

    def _train(self, training: WeightTraining, rate: float) -> None:
        saved, per_epoch = time.monotonic(), training.schedule.steps_per_epoch
        if not self._validation:
            self._validation.append(self._validate())
        while not training.done:
            examples = training.step()
            step, steps = len(training.losses), training.schedule.steps
            self._progress.advance(
                examples, f"collective LoRA: step {step}/{steps}, loss {training.losses[-1]:.3f}"
            )
            if step % per_epoch == 0:
                began = time.monotonic()
                self._validation.append(self._validate())
                if self._validation[-1] < min(self._validation[:-1]):
                    self._best = self._added.read()
                self._progress.say(
                    f"collective LoRA: epoch {step // per_epoch}, validation loss {self._validation[-1]:.4f} "
                    f"(at the start {self._validation[0]:.4f})"
                )
                self._earlier += time.monotonic() - began
            stopped = self._should_stop()
            if stopped or time.monotonic() - saved >= _SAVE_SECONDS:
                self._save(training, rate)
                saved = time.monotonic()
            if stopped:
                raise Cancelled("stopped; the same command goes on from there")

    def _validate(self) -> float:
        return mean_loss(self._added.base, self._corpus.validation)

    # -- the rate ------------------------------------------------------------------------------

    def _choose(self) -> float:
        """By short runs from the start over the same batches. Trials of an interrupted run are repeated."""
        self._validation = [self._validate()]
        rate = Search(self._trial, self._validation[0]).run()
        self._progress.say(f"collective LoRA: learning rate {rate:g}")
        return rate

    def _trial(self, rate: float) -> float:
        schedule = self._schedule(rate)
        steps = min(max(_TRIAL_LEAST, min(_TRIAL_MOST, round(_TRIAL_SHARE * schedule.steps))), schedule.steps)
        self._added.write(self._start)
        training = WeightTraining(self._added, self._pairs, schedule, steps=steps)
        loss = math.inf

        def stepped(examples: int) -> None:
            self._progress.advance(examples, f"trying learning rate {rate:g}")
            if self._should_stop():
                raise Cancelled("stopped while learning rates were tried; the same command tries again")

        try:
            training.run(stepped)
            loss = self._validate()
        except UpdateFailed:
            pass  # it diverged
        loss = loss if math.isfinite(loss) else math.inf
        self._progress.say(f"learning rate {rate:g}: validation loss {loss:.4f} after {steps} steps")
        self._trials[rate] = loss
        return loss

    # -- an interrupted run --------------------------------------------------------------------

    def _save(self, training: WeightTraining, rate: float) -> None:
        file = io.BytesIO()
        state = {
            "asked": self._asked,
            "rate": rate,
            "training": training.to_bytes(),
            "validation": self._validation,
            "best": dict(self._best),
            "earlier": self._earlier,
        }
        torch.save(state, file)
        write_bytes(self._partial, file.getvalue())

    def _saved(self) -> dict[str, Any] | None:
        """What an interrupted run of this request left. Raises InvalidData."""
        if not self._partial.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self._partial, weights_only=True)
            return state if state["asked"] == self._asked else None
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise InvalidData(f"{self._partial} is damaged; remove it and run again") from error
