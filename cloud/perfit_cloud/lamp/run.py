"""One run of a method on one task: what is shared, a state for every user, answers, summary.

    OUT/settings.json                the run's settings; a later one must share them
    OUT/artefact/                    stage 1 of PerFit, unless an artefact was given
    OUT/users/{user_id}/             the user's state (personal.safetensors), result.json (`cohorts`)
    OUT/drift.json                   with --drift (`drift`)
    OUT/run.json, summary.json       written last
    OUT/predictions.json             personal answers in LaMP's schema, with golds.json (`predictions`)

Finished work stays, so the same command continues after a kill at any moment and ends with the same
figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from perfit_cloud.collective.progress import Progress
from perfit_cloud.lamp.cohorts import STOPPED, CohortWork
from perfit_cloud.lamp.drift import DriftTrial
from perfit_cloud.lamp.drift_results import drift_of
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import Method, TaskData
from perfit_cloud.lamp.people import People, Person, cohorts, read_people
from perfit_cloud.lamp.predictions import write_predictions
from perfit_cloud.lamp.ray_workers import RayCluster, RayWorkers
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import MODES, Run, completed, write_json
from perfit_cloud.lamp.settings import check_out, settings_of_all
from perfit_cloud.lamp.shared_answers import SharedAnswers
from perfit_cloud.lamp.summary import summarise
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput
from perfit_shared.presets import value_or
from perfit_shared.prompts import as_read, load_prompts, prompts_of
from perfit_shared.tasks import Task, differing_keys

__all__ = ["run_lamp"]

_BUT_FOR_WORDS = " (but it asks in the artefact's words)"
_ANSWER = 1.5  # cost of a query's loss and answer in one mode, in units of a training example


def run_lamp(
    request: LampRequest,
    *,
    base: BaseModel | None = None,
    task: Task | None = None,
    stop: Callable[[], bool] = lambda: False,
    ray: RayCluster | None = None,
) -> Run:
    """Run it, or go on with an interrupted run of the same request; a finished one is only read.

    `task`: as the model reads it, where another run of a sweep has decided that. `ray`: fit and measure
    people there instead of in this process, with the same figures.

    Raises Cancelled when `stop` says so (everything done is kept), InvalidInput on flags that cannot
    be or an OUT of another request, InvalidData on data that cannot be read.
    """
    if request.threads > 0:
        import torch

        torch.set_num_threads(request.threads)
    say = Progress(0).say
    asked = request
    if request.unused:
        names = ", ".join(name.replace("_", " ") for name in request.unused)
        say(f"{request.method} does not use: {names}" + _BUT_FOR_WORDS * ("artefact" in request.unused))
        request = request.without_unused()
    base = base or load_base(
        request.model, dtype=request.dtype, device=request.device, placement=request.placement
    )
    task = task or _read_task(asked, base)
    task = replace(task, frequency_penalty=value_or(request.frequency_penalty, task.frequency_penalty))
    request = replace(request, task=task.name)
    people = read_people(
        request.data, task, base, users=request.users, examples=request.examples, queries=request.queries
    )
    if request.histories == "other" and len(people.people) < 2:
        raise InvalidInput("another user's history wants a second user")
    say(base.precision)
    _describe(people, task, say)
    data = TaskData(task, base, people)
    check_out(request.out, task, settings_of_all(request, data))  # before hours of stage 1
    with closing(METHODS[request.method](request, data)) as method:
        seconds = method.prepare(stop)
        run = _LampRun(request, data, method, stop, ray)
        return run.finished() or run.run(seconds)


def _read_task(request: LampRequest, base: BaseModel) -> Task:
    """The artefact's, where one of this task is given and no prompts are asked for; else the folder's."""
    say, task = Progress(0).say, None
    if request.artefact is not None and request.prompts is None:
        theirs = Artefact.load(request.artefact).task
        task = theirs if request.task in (None, theirs.name) else None
    if task is not None and (others := differing_keys(request.data, task)):
        say(f"the artefact's task is run; {request.data / 'task.json'} differs in {', '.join(others)}")
    if task is not None and request.chat is None:
        return task
    task = task or load_prompts(request.data, request.task, request.prompts)
    task, how = as_read(task, has_template=base.has_chat_template, chat=request.chat, prompts=request.prompts)
    say(how)
    return task


def _describe(people: People, task: Task, say: Callable[[str], None]) -> None:
    histories = sum(len(person.history) for person in people.people)
    golds = [query.gold for person in people.people for query in person.queries]
    counts = people.counts
    say(
        f"{len(people.people)} users, {histories} past examples, {len(golds)} queries; left out: "
        f"{counts.dropped_empty} with an empty field, {counts.dropped_long} with an answer too long, "
        f"{counts.without_queries} users without queries; {counts.shortened} prompts cut to fit "
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


class _LampRun:
    """One run with everything loaded."""

    def __init__(
        self,
        request: LampRequest,
        data: TaskData,
        method: Method[Any],
        should_stop: Callable[[], bool],
        ray: RayCluster | None,
    ) -> None:
        self._request, self._data, self._method, self._ray = request, data, method, ray
        self._out, self._should_stop = request.out, should_stop
        self._work = CohortWork(request, data, method, self._stop)
        self._people, self._folder = self._work.people, self._work.folder
        self._settings = self._described()
        self._known = SharedAnswers.of(request.reuse, self._settings)

    def _described(self) -> dict[str, Any]:
        """Everything that decides the figures, and what follows from it; plain JSON values."""
        people = self._data.people
        return {
            **settings_of_all(self._request, self._data),
            **self._method.settings,
            "personal_parameters": self._method.parameters,
            "asked": people.asked,
            "token_cap": people.token_cap,
            "shortened": people.counts.shortened,
        }

    def finished(self) -> Run | None:
        """The run that OUT holds, if it is this one and finished.

        Raises InvalidInput when OUT holds another one, finished or not.
        """
        task = self._data.task
        follows = {"personal_parameters", "asked", "token_cap", "shortened"}  # the rest decides them
        deciding = {k: v for k, v in completed(self._settings, task).items() if k not in follows}
        if not check_out(self._out, task, deciding):
            write_json(self._out / "settings.json", self._settings)
        if not (self._out / "summary.json").is_file():
            return None
        try:
            run = Run.load(self._out)
        except InvalidData:  # a file is missing or damaged; the run repairs it
            return None
        drifting = set(self._modes()) - {"base", "other"} if self._request.drift else set()
        complete = set(self._modes()) <= set(run.modes) and drifting <= (drift_of(run) or {}).keys()
        return run if complete else None

    def run(self, prepared: float) -> Run:
        """`prepared`: the seconds that preparation took, perhaps in an earlier run."""
        with self._workers() as workers:
            own = {"personal", "other"}.intersection(self._modes())
            if self._method.learns and (own or self._request.drift):
                self._fit(workers)
            self._evaluate(workers)
        if self._request.drift:
            self._measure_drift()
        folders = [self._folder(person) for person in self._people]
        seconds = {"preparation": prepared}
        for part in ("fit", "answers"):
            seconds[part] = sum(folder.seconds[part] for folder in folders)
        users = tuple(folder.load() for folder in folders)
        run = Run(self._out, self._data.task, self._settings, seconds, users)
        run.save()
        write_predictions(run, self._data.people, model=self._data.base.name)
        write_json(self._out / "summary.json", summarise(run))
        return run

    def _stop(self) -> None:
        if self._should_stop():
            raise Cancelled(STOPPED)

    @contextmanager
    def _workers(self) -> Iterator[RayWorkers | None]:
        """None: this process does it itself."""
        if self._ray is None:
            yield None
            return
        with closing(RayWorkers(self._ray, self._request, self._data.task, self._should_stop)) as workers:
            Progress(0).say(f"{workers.count} workers, each with the model, by Ray ({self._ray.address})")
            yield workers

    # -- a state for every user ----------------------------------------------------------------

    def _fit(self, workers: RayWorkers | None) -> None:
        """Fit everyone with a history, cohort by cohort; refit a whole cohort where a state is missing."""
        method = self._method
        learners = [person for person in self._people if method.can_fit(person)]
        progress = Progress(sum(map(method.examples, learners)))
        if learners and (how := method.announce(learners)):
            progress.say(how)
        missing, finished = [], 0
        for cohort in cohorts(learners, method.together):
            if all(self._folder(person).has_state for person in cohort):
                progress.skip(sum(map(method.examples, cohort)))
                finished += len(cohort)
            else:
                missing.append(cohort)
        for cohort in missing if workers is None else ():
            self._fit_cohort(cohort, progress, finished=finished, of=len(learners))
            finished += len(cohort)
        for fitted in () if workers is None else workers.fit(missing):
            finished += len(fitted)
            progress.advance(sum(map(method.examples, fitted)), f"{finished} of {len(learners)} users fitted")

    def _fit_cohort(self, cohort: Sequence[Person], progress: Progress, *, finished: int, of: int) -> None:
        began = time.monotonic()

        def done(examples: int, people: int) -> None:
            progress.advance(examples, f"{finished + people} of {of} users fitted")

        self._work.fit(cohort, done, progress.skip)
        progress.say(f"{len(cohort)} users fitted in {time.monotonic() - began:.0f} s")

    # -- answers -------------------------------------------------------------------------------

    def _modes(self) -> tuple[str, ...]:
        swapped = self._request.histories != "own"  # somebody else's state may then be one's own
        own = ("personal",) if swapped or len(self._people) < 2 else ("personal", "other")
        measured = {*self._method.shared, *(own if self._method.learns else ())}
        asked = measured.intersection(value_or(self._request.modes, MODES))
        if not asked:
            raise InvalidInput(f"{self._method.name} has other modes: {', '.join(sorted(measured))}")
        return tuple(mode for mode in MODES if mode in asked)

    def _evaluate(self, workers: RayWorkers | None) -> None:
        """Losses and answers of everyone, in the modes that their results lack."""
        modes, users = self._modes(), len(self._people)
        progress = Progress(sum(len(person.queries) for person in self._people) * len(modes) * _ANSWER)
        missing, finished = [], 0
        for cohort in cohorts(self._people, self._request.users_together):
            self._take_known(cohort, modes)
            lacking = [m for m in modes if not all(self._folder(one).has_measured(m) for one in cohort)]
            queries = sum(len(person.queries) for person in cohort)
            progress.skip(queries * (len(modes) - len(lacking)) * _ANSWER)
            if lacking:
                missing.append((cohort, lacking))
            else:
                finished += len(cohort)
        for cohort, lacking in missing if workers is None else ():
            advance = partial(_advance, progress, f"answers: {finished} of {users} users done")
            for mode in lacking:
                self._work.measure(cohort, mode, advance)
                self._stop()
            finished += len(cohort)
        for measured, modes_done in () if workers is None else workers.measure(missing):
            finished += len(measured)
            queries = sum(len(person.queries) for person in measured) * len(modes_done)
            _advance(progress, f"answers: {finished} of {users} users done", queries)

    def _take_known(self, cohort: Sequence[Person], modes: Sequence[str]) -> None:
        """Save what another run has measured of this one's, before anybody measures it again."""
        for mode in modes if self._known.results is not None else ():
            if mode in self._method.shared:
                for person in cohort:
                    known = self._known.result(person.user_id, mode)
                    if known is not None:
                        self._work.take_known(person, mode, known)

    def _measure_drift(self) -> None:
        trial, people = DriftTrial(self._method, self._data, self._out), self._people
        progress = Progress(len(people))
        trial.measure_shared()
        for done, person in enumerate(people if self._method.learns else ()):
            self._stop()
            trial.measure(person.user_id, partial(self._work.state, person, "personal"))
            progress.advance(1, f"drift: {done + 1} of {len(people)} users done")


def _advance(progress: Progress, text: str, queries: int) -> None:
    progress.advance(queries * _ANSWER, text)
