"""One run of the method on one task: stage 1, stage 2 for every user, answers, summary.

    OUT/settings.json                what the run was asked for; a later one must share it
    OUT/artefact/                    stage 1, unless an artefact was given
    OUT/users/{user_id}/             personal.safetensors, result.json
    OUT/run.json, summary.json       written last
    OUT/predictions.json             personal answers in LaMP's schema, with golds.json (`predictions`)

Whatever is finished is kept, so that the same command goes on after a kill at any moment, and ends
with the same figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from perfit_cloud.collective.progress import Progress
from perfit_cloud.engine.gradients.batch import GradientEngine
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.lamp import stage2
from perfit_cloud.lamp.measure import measure, use_of
from perfit_cloud.lamp.people import People, Person, read_people, swap_histories
from perfit_cloud.lamp.predictions import write_predictions
from perfit_cloud.lamp.request import LampRun
from perfit_cloud.lamp.results import (
    MODES,
    QueryResult,
    Run,
    UserResult,
    completed,
    user_folder,
    write_bytes,
    write_json,
)
from perfit_cloud.lamp.stage1 import artefact_for
from perfit_cloud.lamp.summary import summarise
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput, PerfitError
from perfit_shared.presets import PRESETS
from perfit_shared.prompts import load_prompts, prompts_of
from perfit_shared.shifts import ShiftTensors
from perfit_shared.tasks import Task
from perfit_shared.training import Schedule

__all__ = ["run_lamp"]

_T = TypeVar("_T")

_ANSWER = 1.5  # cost of a query's loss and answer in one mode, in units of a training example


def run_lamp(
    request: LampRun, *, base: BaseModel | None = None, stop: Callable[[], bool] = lambda: False
) -> Run:
    """Run it, or go on with an interrupted run of the same request; a finished one is only read.

    Raises Cancelled when `stop` says so (everything done is kept), InvalidInput on flags that cannot
    be or an OUT of another request, InvalidData on data that cannot be read.
    """
    if request.threads > 0:
        import torch

        torch.set_num_threads(request.threads)
    task = load_prompts(request.data, request.task, request.prompts)
    base = base or load_base(request.model, dtype=request.dtype, device=request.device)
    people = read_people(request.data, task, base, users=request.users)
    say = Progress(0).say
    _describe(people, task, say)
    artefact, seconds = artefact_for(request, task, base, people, stop)
    run = _Run(
        request, task=task, base=base, people=people, artefact=artefact, stage1_seconds=seconds, stop=stop
    )
    return run.finished() or run.run()


def _describe(people: People, task: Task, say: Callable[[str], None]) -> None:
    histories = sum(len(person.history) for person in people.people)
    golds = [question.gold for person in people.people for question in person.questions]
    say(
        f"{len(people.people)} users, {histories} past examples, {len(golds)} queries; left out: "
        f"{people.dropped_empty} with an empty field, {people.dropped_long} with an answer too long, "
        f"{people.without_queries} users without queries; {people.shortened} prompts cut to fit "
        f"{people.token_cap} tokens with the answer; {prompts_of(task)} prompts"
    )
    unknown = sum(gold not in task.labels for gold in golds) if task.labels else 0
    if unknown:
        say(
            f"{unknown} of {len(golds)} golds are none of the {len(task.labels)} labels of {task.name}, so "
            'no answer to them is right; if the data has others, name them in a task.json: {"labels": […]}'
        )
    if people.extra_labels:
        many = "label belongs" if people.extra_labels == 1 else "labels belong"
        say(f"{people.extra_labels} {many} to no query; golds.json has those of the queries")


class _Run:
    """One run with everything loaded."""

    def __init__(
        self,
        request: LampRun,
        *,
        task: Task,
        base: BaseModel,
        people: People,
        artefact: Artefact,
        stage1_seconds: float,
        stop: Callable[[], bool],
    ) -> None:
        self._request, self._task, self._base, self._artefact = request, task, base, artefact
        self._out, self._stage1_seconds, self._wishes = request.out, stage1_seconds, stop
        self._people = people.people if request.histories == "own" else swap_histories(people.people)
        self._stage2 = _stage2_settings(request, task, artefact)
        self._cohort = people
        self._settings = self._described(people)

    def _described(self, people: People) -> dict[str, Any]:
        """Everything that decides the figures, plain JSON values."""
        request, spec = self._request, self._artefact.spec
        return {
            "task": self._task.name,
            "model": self._base.name,
            "fingerprint": self._base.fingerprint,
            "dtype": str(self._base.model.dtype).removeprefix("torch."),
            "data": people.digest(),
            "blocks": self._base.blocks,
            "hidden_size": spec.hidden_size,
            "layers": list(spec.layers),
            "positions": spec.positions,
            "collective_rank": 0 if request.alone else spec.collective_rank,
            "personal_rank": spec.personal_rank,
            "personal_parameters": spec.personal_parameters(),
            **asdict(self._stage2),
            "users": len(self._people),
            "users_together": request.users_together,
            "collective_users": request.collective_users,
            "collective_epochs": request.collective_epochs,
            "collective_learning_rate": request.collective_learning_rate,
            "preset": request.preset,
            "ablation": request.ablation,
            "histories": request.histories,
            "artefact": self._artefact.version,
            "artefact_task": self._artefact.task.name,
            "artefact_prompts": prompts_of(self._artefact.task),
            "prompts": prompts_of(self._task),
            "decoding": asdict(request.decoding),
            "answer_tokens": self._task.answer_tokens,
            "stop": list(self._task.stop),
            "token_cap": people.token_cap,
            "shortened": people.shortened,
        }

    def finished(self) -> Run | None:
        """The run that OUT holds, if it is this one and finished.

        Raises InvalidInput when OUT holds another one, finished or not.
        """
        path = self._out / "settings.json"
        if path.is_file():
            try:
                theirs = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise InvalidData(f"{path} is damaged; use another --out") from error
            theirs, ours = completed(theirs, self._task), json.loads(json.dumps(self._settings))
            differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
            changed = sorted(differing - {"token_cap", "shortened"})  # what they do shows in the data
            if changed:
                names = ", ".join(name.replace("_", " ") for name in changed)
                raise InvalidInput(f"{self._out} holds a run with other {names}; use another --out")
        else:
            write_json(path, self._settings)
        if not (self._out / "summary.json").is_file():
            return None
        try:
            run = Run.load(self._out)
        except InvalidData:  # a file is gone or damaged; what is left of it is made again
            return None
        return run if run.modes == self._modes() else None

    def run(self) -> Run:
        if self._request.ablation != "stage1":
            self._train()
        self._evaluate()
        users = tuple(UserResult.load(self._folder(person)) for person in self._people)
        seconds = {
            "stage1": self._stage1_seconds,
            "stage2": sum(self._times(person)["stage2"] for person in self._people),
            "evaluation": sum(self._times(person)["evaluation"] for person in self._people),
        }
        run = Run(self._out, self._task, self._settings, seconds, users)
        run.save()
        write_predictions(run, self._cohort, model=self._base.name)
        write_json(self._out / "summary.json", summarise(run))
        return run

    # -- stage 2 -------------------------------------------------------------------------------

    def _train(self) -> None:
        """A personal shift for everyone with a history that is long enough."""
        learners = [person for person in self._people if self._stage2.trains(person)]
        cohorts = stage2.cohorts(learners, self._request.users_together)
        progress = Progress(sum(map(self._stage2.work, learners)))
        if steps := [self._stage2.schedule_for(person).steps for person in learners]:
            progress.say(
                f"stage 2 by the {self._stage2.schedule} schedule: {min(steps)} to {max(steps)} steps a user"
            )
        engine = UpdateEngine(self._base, keep_bytes=self._request.keep_bytes)
        done = 0
        try:
            for cohort in cohorts:
                missing = [p for p in cohort if not (self._folder(p) / "personal.safetensors").is_file()]
                if missing:
                    self._train_cohort(engine, cohort, progress, done=done, of=len(learners))
                else:
                    progress.skip(sum(map(self._stage2.work, cohort)))
                done += len(cohort)
        finally:
            engine.close()

    def _train_cohort(
        self, engine: UpdateEngine, cohort: Sequence[Person], progress: Progress, *, done: int, of: int
    ) -> None:
        checkpoint = self._out / "stage2.bin"
        began = time.monotonic()

        def tell(examples: int, finished: int) -> None:
            progress.advance(examples, f"stage 2: {done + finished} of {of} users done")

        trainings = stage2.train(
            engine,
            cohort,
            self._artefact,
            self._stage2,
            checkpoint=checkpoint,
            resumed=progress.skip,
            progress=tell,
            stop=self._stop,
        )
        for person, training in zip(cohort, trainings, strict=True):
            folder = self._folder(person)
            self._keep_times(person, stage2=training.seconds)
            write_json(folder / "stage2.json", {"losses": training.losses, "seconds": training.seconds})
            write_bytes(folder / "personal.safetensors", training.outcome.to_bytes())
        checkpoint.unlink(missing_ok=True)
        progress.say(f"stage 2: {len(cohort)} users in {time.monotonic() - began:.0f} s")

    def _stop(self) -> None:
        if self._wishes():
            raise Cancelled("stopped; the same command goes on from there")

    # -- evaluation ----------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Losses and answers of everyone, in the modes that their result lacks."""
        modes = self._modes()
        cohorts = stage2.cohorts(self._people, self._request.users_together)
        queries = sum(len(person.questions) for person in self._people)
        progress = Progress(queries * len(modes) * _ANSWER)
        engine = GradientEngine(self._base)
        done = 0
        try:
            for cohort in cohorts:
                found = [self._result(person) for person in cohort]
                missing = [m for m in modes if not all(r is not None and m in r.modes for r in found)]
                there = len(modes) - len(missing)
                progress.skip(sum(len(p.questions) for p in cohort) * there * _ANSWER)
                if missing:
                    text = f"answers: {done} of {len(self._people)} users done"
                    self._evaluate_cohort(engine, cohort, missing, progress, text=text)
                done += len(cohort)
        finally:
            engine.close()

    def _modes(self) -> tuple[str, ...]:
        left_out = {"full": (), "stage1": ("personal", "other")}.get(
            self._request.ablation, ("collective", "seed")
        )
        alone = len(self._people) == 1
        return tuple(m for m in MODES if m not in left_out and not (m == "other" and alone))

    def _result(self, person: Person) -> UserResult | None:
        folder = self._folder(person)
        return UserResult.load(folder) if (folder / "result.json").is_file() else None

    def _evaluate_cohort(
        self,
        engine: GradientEngine,
        cohort: Sequence[Person],
        modes: Sequence[str],
        progress: Progress,
        *,
        text: str,
    ) -> None:
        """One mode after another, each kept when it is done."""
        for mode in modes:
            began = time.monotonic()
            results = measure(
                self._base,
                engine,
                self._task,
                cohort,
                decoding=self._request.decoding,
                uses=[
                    {mode: use_of(mode, self._artefact, self._shift(p), self._shift(self._next(p)))}
                    for p in cohort
                ],
                done=lambda answers: progress.advance(answers * _ANSWER, text),
            )
            seconds = (time.monotonic() - began) / len(cohort)
            for person, queries in zip(cohort, results, strict=True):
                self._keep_times(person, evaluation=self._times(person)["evaluation"] + seconds)
                self._keep_result(person, queries)
            self._stop()

    def _keep_result(self, person: Person, queries: Sequence[QueryResult]) -> None:
        result = self._result(person)
        if result is None:
            learned = (self._folder(person) / "personal.safetensors").is_file()
            steps = self._stage2.schedule_for(person).steps if learned else 0
            result = UserResult(person.user_id, len(person.history), steps, tuple(queries))
        result.with_modes(queries).save(self._folder(person))

    def _next(self, person: Person) -> Person:
        """The user whose shift serves as someone else's."""
        at = [p.user_id for p in self._people].index(person.user_id)
        return self._people[(at + 1) % len(self._people)]

    def _shift(self, person: Person) -> ShiftTensors | None:
        path = self._folder(person) / "personal.safetensors"
        if not path.is_file():
            return None
        spec = self._artefact.spec
        try:
            return ShiftTensors.from_bytes(path.read_bytes(), spec, spec.personal_rank)
        except PerfitError as error:
            raise InvalidData(f"{path}: {error}; remove it and run again") from error

    # -- files ---------------------------------------------------------------------------------

    def _folder(self, person: Person) -> Path:
        return user_folder(self._out, person.user_id)

    def _times(self, person: Person) -> dict[str, float]:
        path = self._folder(person) / "seconds.json"
        times: Mapping[str, float] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return {"stage2": times.get("stage2", 0.0), "evaluation": times.get("evaluation", 0.0)}

    def _keep_times(self, person: Person, **seconds: float) -> None:
        write_json(self._folder(person) / "seconds.json", self._times(person) | seconds)


def _stage2_settings(request: LampRun, task: Task, artefact: Artefact) -> stage2.Stage2Settings:
    epochs, batch_size = request.figures or _figures(request, task, artefact)
    rate = _given(request.learning_rate, artefact.learning_rate)
    if request.schedule == Schedule.name:  # which fits to the history what nobody asked for
        return stage2.Stage2Settings(
            epochs, rate, batch_size, request.seed, request.schedule, request.epochs, request.batch_size
        )
    epochs, batch_size = _given(request.epochs, epochs), _given(request.batch_size, batch_size)
    return stage2.Stage2Settings(epochs, rate, batch_size, request.seed, request.schedule)


def _figures(request: LampRun, task: Task, artefact: Artefact) -> tuple[int, int]:
    """(epochs, batch size) that stage 2 starts from.

    The paper's schedule takes Table 9's, and the artefact's for a task that the table lacks. A device
    takes the artefact's; another task's brings its shift and rate, but not how long this task trains.
    """
    row = PRESETS.get(request.preset or task.name)
    on_device = request.schedule == Schedule.name
    takes_artefact = artefact.task.name == task.name if on_device else row is None or not row.from_paper
    found = artefact if takes_artefact or row is None else row
    return found.epochs, found.batch_size


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value
