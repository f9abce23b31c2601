"""One run of a method on one task: what is shared, a state for every user, answers, summary.

    OUT/settings.json                the run's settings; a later one must share them
    OUT/artefact/                    stage 1 of PerFit, unless an artefact was given
    OUT/users/{user_id}/             the user's state (personal.safetensors), result.json
    OUT/run.json, summary.json       written last
    OUT/predictions.json             personal answers in LaMP's schema, with golds.json (`predictions`)

Finished work stays, so the same command continues after a kill at any moment and ends with the same
figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from perfit_cloud.collective.progress import Progress
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import FitContext, Method, QueryRequest, TaskData
from perfit_cloud.lamp.people import People, Person, cohorts, read_people, swap_histories
from perfit_cloud.lamp.predictions import write_predictions
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import MODES, QueryResult, Run, UserFolder, UserResult, completed, write_json
from perfit_cloud.lamp.summary import summarise
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput, PerfitError
from perfit_shared.prompts import as_read, load_prompts, prompts_of
from perfit_shared.tasks import Task, differing_keys

__all__ = ["run_lamp"]

_ANSWER = 1.5  # cost of a query's loss and answer in one mode, in units of a training example


def run_lamp(
    request: LampRequest,
    *,
    base: BaseModel | None = None,
    task: Task | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Run it, or go on with an interrupted run of the same request; a finished one is only read.

    `task`: as the model reads it, where another run of a sweep has decided that.

    Raises Cancelled when `stop` says so (everything done is kept), InvalidInput on flags that cannot
    be or an OUT of another request, InvalidData on data that cannot be read.
    """
    if request.threads > 0:
        import torch

        torch.set_num_threads(request.threads)
    base = base or load_base(request.model, dtype=request.dtype, device=request.device)
    task, say = task or _read_task(request, base), Progress(0).say
    request = replace(request, task=task.name)
    people = read_people(request.data, task, base, users=request.users, examples=request.examples)
    say(base.precision)
    _describe(people, task, say)
    data = TaskData(task, base, people)
    with closing(METHODS[request.method](request, data)) as method:
        seconds = method.prepare(stop)
        run = _LampRun(request, data, method, stop)
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
        self, request: LampRequest, data: TaskData, method: Method[Any], should_stop: Callable[[], bool]
    ) -> None:
        self._request, self._data, self._method = request, data, method
        self._out, self._should_stop = request.out, should_stop
        people = data.people.people
        self._people = people if request.histories == "own" else swap_histories(people)
        after = [*self._people[1:], self._people[0]]
        self._next = {one.user_id: other for one, other in zip(self._people, after, strict=True)}
        self._settings = self._described()

    def _described(self) -> dict[str, Any]:
        """Everything that decides the figures, plain JSON values."""
        request, task, base, people = self._request, self._data.task, self._data.base, self._data.people
        return {
            "task": task.name,
            "model": base.name,
            "fingerprint": base.fingerprint,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "data": people.digest,
            "method": self._method.name,
            **self._method.settings,
            "personal_parameters": self._method.parameters,
            "seed": request.seed,
            "users": len(self._people),
            "examples": request.examples,
            "users_together": request.users_together,
            "histories": request.histories,
            "prompts": prompts_of(task),
            "chat": task.chat,
            "decoding": asdict(request.decoding),
            "answer_tokens": task.answer_tokens,
            "stop": list(task.stop),
            "token_cap": people.token_cap,
            "shortened": people.counts.shortened,
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
            ours = json.loads(json.dumps(self._settings))
            theirs, ours = (completed(settings, self._data.task) for settings in (theirs, ours))
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
        except InvalidData:  # a file is missing or damaged; the run repairs it
            return None
        return run if run.modes == self._modes() else None

    def run(self, stage1_seconds: float) -> Run:
        """`stage1_seconds`: what preparation took, perhaps in an earlier run."""
        if self._method.learns:
            self._fit()
        self._evaluate()
        folders = [self._folder(person) for person in self._people]
        seconds = {"stage1": stage1_seconds}
        for part in ("stage2", "evaluation"):
            seconds[part] = sum(folder.seconds[part] for folder in folders)
        users = tuple(folder.load() for folder in folders)
        run = Run(self._out, self._data.task, self._settings, seconds, users)
        run.save()
        write_predictions(run, self._data.people, model=self._data.base.name)
        write_json(self._out / "summary.json", summarise(run))
        return run

    def _folder(self, person: Person) -> UserFolder:
        return UserFolder(self._out, person.user_id, self._method.state_file)

    def _stop(self) -> None:
        if self._should_stop():
            raise Cancelled("stopped; the same command goes on from there")

    # -- a state for every user ----------------------------------------------------------------

    def _fit(self) -> None:
        """Fit everyone with a history, cohort by cohort; refit a whole cohort where a state is missing."""
        method = self._method
        learners = [person for person in self._people if method.can_fit(person)]
        progress = Progress(sum(map(method.examples, learners)))
        if learners and (how := method.announce(learners)):
            progress.say(how)
        finished = 0
        for cohort in cohorts(learners, method.together):
            if all(self._folder(person).has_state for person in cohort):
                progress.skip(sum(map(method.examples, cohort)))
            else:
                self._fit_cohort(cohort, progress, finished=finished, of=len(learners))
            finished += len(cohort)

    def _fit_cohort(self, cohort: Sequence[Person], progress: Progress, *, finished: int, of: int) -> None:
        began = time.monotonic()

        def done(examples: int, people: int) -> None:
            progress.advance(examples, f"stage 2: {finished + people} of {of} users done")

        work = FitContext(done, progress.skip, self._stop, self._out / "stage2.bin")
        fitted = self._method.fit_cohort(cohort, work)
        for person, one in zip(cohort, fitted, strict=True):
            state = self._method.to_bytes(one.state)
            self._folder(person).save_state(state, losses=one.losses, seconds=one.seconds)
        work.checkpoint.unlink(missing_ok=True)
        progress.say(f"stage 2: {len(cohort)} users in {time.monotonic() - began:.0f} s")

    # -- answers -------------------------------------------------------------------------------

    def _modes(self) -> tuple[str, ...]:
        own = ("personal", "other") if len(self._people) > 1 else ("personal",)
        measured = {*self._method.shared, *(own if self._method.learns else ())}
        return tuple(mode for mode in MODES if mode in measured)

    def _evaluate(self) -> None:
        """Losses and answers of everyone, in the modes that their results lack."""
        modes = self._modes()
        queries = sum(len(person.queries) for person in self._people)
        progress = Progress(queries * len(modes) * _ANSWER)
        finished = 0
        for cohort in cohorts(self._people, self._request.users_together):
            for mode in modes:
                if all(self._folder(person).has_measured(mode) for person in cohort):
                    progress.skip(sum(len(person.queries) for person in cohort) * _ANSWER)
                else:
                    text = f"answers: {finished} of {len(self._people)} users done"
                    self._measure(cohort, mode, progress, text)
                    self._stop()
            finished += len(cohort)

    def _measure(self, cohort: Sequence[Person], mode: str, progress: Progress, text: str) -> None:
        began, task, method = time.monotonic(), self._data.task, self._method
        requests = []
        for person in cohort:
            state = self._state(person, mode)
            for query in person.queries:
                sampling = self._request.decoding.sampling(task, person.user_id, query)
                requests.append(QueryRequest(person.user_id, query, state, sampling))
        scores = method.score(requests)
        answers = method.answer(requests, lambda count: progress.advance(count * _ANSWER, text))
        results = (
            QueryResult(
                one.query.id,
                one.query.gold,
                score.tokens,
                loss={mode: -score.log_likelihood / score.tokens},
                answers={mode: task.parse(answer)},
            )
            for one, score, answer in zip(requests, scores, answers, strict=True)
        )
        own = [tuple(islice(results, len(person.queries))) for person in cohort]
        seconds = (time.monotonic() - began) / len(cohort)
        for person, queries in zip(cohort, own, strict=True):
            folder = self._folder(person)
            folder.add_mode(UserResult(person.user_id, len(person.history), folder.steps, queries), seconds)

    def _state(self, person: Person, mode: str) -> Any:
        """What answers this person in one of results.MODES."""
        if mode in self._method.shared:
            return self._method.shared[mode]
        owner = person if mode == "personal" else self._next[person.user_id]
        folder = self._folder(owner)
        if not folder.has_state:
            return self._method.start
        try:
            return self._method.from_bytes(folder.state_path.read_bytes())
        except PerfitError as error:
            raise InvalidData(f"{folder.state_path}: {error}; remove it and run again") from error
