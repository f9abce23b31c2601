"""What every method of a LaMP run promises, and what a run does with one that it has never seen."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files
from tests.support.lamp_requests import task_data
from tests.support.models import random_shift

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.collective.personal import scores_by_start
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import FitContext, Fitted, Method, QueryRequest, TaskData
from perfit_cloud.lamp.people import Learner, Person
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import UserFolder
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Cancelled, InvalidInput
from perfit_shared.starts import choose_start
from perfit_shared.types import Score

NAMES = [name for name, method in METHODS.items() if method.name == name]
LEARNING = [name for name in NAMES if METHODS[name].learns]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: BaseModel) -> TaskData:
    folder = write_files(tmp_path_factory.mktemp("lamp"))
    return task_data(folder, base)


@pytest.fixture
def open_method(
    method_request: Callable[..., LampRequest], data: TaskData
) -> Iterator[Callable[[str], Method[Any]]]:
    opened = []

    def make(name: str) -> Method[Any]:
        method = METHODS[name](method_request(name), data)
        opened.append(method)
        method.prepare(lambda: False)
        return method

    yield make
    for method in opened:
        method.close()


@pytest.fixture
def context(tmp_path: Path) -> FitContext:
    return FitContext(
        lambda examples, people: None, lambda examples: None, lambda: None, tmp_path / "checkpoint"
    )


def disguised(person: Person) -> Person:
    """The same person with another habit, token for token as long."""
    history = tuple({**item, "title": item["title"].replace("1", "2")} for item in person.history)
    return replace(person, history=history)


# -- what every method promises ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_who_was_fitted_before_leaves_no_trace(
    name: str, open_method: Callable[[str], Method[Any]], data: TaskData, context: FitContext
) -> None:
    """FACTS: a widely copied baseline trains user i on the data of users 0…i."""
    first, second, third = data.people.people[:3]
    alone = open_method(name)
    expected = alone.to_bytes(alone.fit(third, context).state)
    later = open_method(name)
    states = [later.to_bytes(later.fit(person, context).state) for person in (first, second, third)]
    assert states[2] == expected
    assert len(set(states)) == 3, "or methods that learn nothing would pass too"


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_who_is_fitted_beside_leaves_no_trace(
    name: str, open_method: Callable[[str], Method[Any]], data: TaskData, context: FitContext
) -> None:
    method = open_method(name)
    first, second = data.people.people[:2]
    ours, theirs = (
        [method.to_bytes(one.state) for one in method.fit_cohort([who, second], context)]
        for who in (first, disguised(first))
    )
    assert ours[0] != theirs[0] and ours[1] == theirs[1]


@pytest.mark.parametrize("name", LEARNING)
def test_a_state_survives_its_bytes(
    name: str, open_method: Callable[[str], Method[Any]], data: TaskData, context: FitContext
) -> None:
    method, person = open_method(name), data.people.people[0]
    state = method.fit(person, context).state
    written = method.to_bytes(state)
    read = method.from_bytes(written)
    assert method.to_bytes(read) == written
    assert method.parameters >= 0 and METHODS["perfit_stage1"].parameters == 0
    sampling = request_sampling(data, person)
    before, after = ([QueryRequest(person.user_id, person.queries[0], s, sampling)] for s in (state, read))
    assert method.answer(before, lambda count: None) == method.answer(after, lambda count: None)
    assert method.score(before) == method.score(after)


def request_sampling(data: TaskData, person: Person) -> Any:
    request = LampRequest(TASK, "m", Path(), Path())
    return request.decoding.sampling(data.task, person.user_id, person.queries[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_answers_come_in_the_order_asked(
    name: str, open_method: Callable[[str], Method[Any]], data: TaskData
) -> None:
    method = open_method(name)
    requests = [
        QueryRequest(person.user_id, query, method.start, request_sampling(data, person))
        for person in data.people.people[:3]
        for query in person.queries
    ]
    told: list[int] = []
    answers, scores = method.answer(requests, told.append), method.score(requests)
    assert sum(told) == len(answers) == len(scores) == len(requests)
    for one, answer, score in zip(requests, answers, scores, strict=True):
        assert method.answer([one], lambda count: None) == [answer]
        assert method.score([one])[0].log_likelihood == pytest.approx(score.log_likelihood, abs=1e-4)
    golds = [one.query.gold for one in requests]
    assert method.score(requests, golds) == scores, "gold answers are scored where none are given"
    assert method.score(requests, golds[1:] + golds[:1]) != scores


def test_options_of_other_methods_are_named_and_change_nothing(
    method_request: Callable[..., LampRequest],
    base: BaseModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = run_lamp(method_request("perfit_stage2", users=2), base=base)
    request = replace(method_request("perfit_stage2", users=2), collective_users=3, strength=2.0)
    capsys.readouterr()
    assert run_lamp(request, base=base).users == plain.users
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "perfit_stage2 does not use: collective users, strength"
    with pytest.raises(InvalidInput, match="collective learning rate: an artefact is given"):
        method_request(collective_learning_rate=1e-3)


@pytest.mark.slow
def test_tokens_of_a_cohort_at_most_are_held(
    method_request: Callable[..., LampRequest], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ids, a history takes many times the memory of its text: a run held those of all users."""
    made: list[weakref.ref[Learner]] = []
    held: list[int] = []
    of = Learner.of

    def remembered(person: Person, encoder: Encoder) -> Learner:
        learner = of(person, encoder)
        made.append(weakref.ref(learner))
        held.append(sum(ref() is not None for ref in made))
        return learner

    monkeypatch.setattr(Learner, "of", remembered)
    run = run_lamp(method_request(), base=base)
    # Each is made once for its schedule and once to train.
    assert len(run.users) == 5 and len(made) == 10 and max(held) == 2


# -- what a run does with a method ---------------------------------------------------------------


class Notebook(Method[tuple[str, ...]]):
    """Keeps the titles of a history, and answers with them. Knows no shift."""

    name = "notebook"
    state_file = "titles.json"
    together = 2
    fitted: list[str]  # user ids; a test sets it

    @property
    def parameters(self) -> int:
        return 7

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"pages": 3}

    def prepare(self, stop: Callable[[], bool]) -> float:
        return 2.5

    @property
    def start(self) -> tuple[str, ...]:
        return ()

    @property
    def shared(self) -> Mapping[str, tuple[str, ...]]:
        return {"base": ("nothing",)}

    def fit(self, person: Person, context: FitContext) -> Fitted[tuple[str, ...]]:
        context.stop()
        self.fitted.append(person.user_id)
        context.done(len(person.history), 1)
        return Fitted(tuple(item["title"] for item in person.history), (1.0, 0.5), seconds=0.25)

    def answer(
        self, requests: Sequence[QueryRequest[tuple[str, ...]]], done: Callable[[int], None]
    ) -> list[str]:
        done(len(requests))
        return [" | ".join(one.state) for one in requests]

    def score(
        self, requests: Sequence[QueryRequest[tuple[str, ...]]], answers: Sequence[str] | None = None
    ) -> list[Score]:
        return [Score(-2.0 * (one.query.gold.split()[0] not in " ".join(one.state)), 2) for one in requests]

    def to_bytes(self, state: tuple[str, ...]) -> bytes:
        return json.dumps(state).encode()

    def from_bytes(self, data: bytes) -> tuple[str, ...]:
        return tuple(json.loads(data))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    monkeypatch.setitem(METHODS, "perfit", Notebook)  # type: ignore[call-overload]
    monkeypatch.setattr(Notebook, "fitted", [], raising=False)
    return Notebook


def small_request(tmp_path: Path, **changes: Any) -> LampRequest:
    return LampRequest(TASK, "tiny", write_files(tmp_path / "data"), tmp_path / "out", **changes)


def test_a_run_takes_any_method(notebook: type[Notebook], base: BaseModel, tmp_path: Path) -> None:
    request = small_request(tmp_path)
    run = run_lamp(request, base=base)
    users = json.loads((request.data / "user_top_100_history.json").read_text())
    titles = {str(user["user_id"]): sorted(item["title"] for item in user["profile"]) for user in users}
    assert sorted(notebook.fitted) == sorted(titles)
    for user in run.users:
        folder = UserFolder(run.folder, user.user_id, "titles.json")
        state = json.loads(folder.state_path.read_text())
        assert sorted(state) == titles[user.user_id], "their own, and nobody else's"
        assert user.steps == 2
    assert run.modes == ("base", "personal", "other")
    one, two = run.users[:2]
    assert one.queries[0].answers["other"] == two.queries[0].answers["personal"]
    assert {query.answers["base"] for user in run.users for query in user.queries} == {"nothing"}
    assert one.loss("personal") == 0 and one.loss("base") == 1
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {k: summary["settings"][k] for k in ("method", "personal_parameters", "pages")} == {
        "method": "notebook",
        "personal_parameters": 7,
        "pages": 3,
    }
    assert summary["seconds"]["preparation"] == 2.5 and summary["seconds"]["fit"] == 5 * 0.25


def test_who_is_fitted_is_not_fitted_again(notebook: type[Notebook], base: BaseModel, tmp_path: Path) -> None:
    request, calls = small_request(tmp_path), iter(range(100))
    with pytest.raises(Cancelled):
        run_lamp(request, base=base, stop=lambda: next(calls) == 2)
    assert len(notebook.fitted) == 2
    run = run_lamp(request, base=base)
    assert len(notebook.fitted) == 5 and len(run.users) == 5


def test_another_method_is_refused_before_it_prepares(
    notebook: type[Notebook], base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stage 1 took hours, and left its files in the other's folder."""
    request = small_request(tmp_path, users=1)
    run_lamp(request, base=base)
    monkeypatch.setattr(Notebook, "prepare", lambda *_: pytest.fail("prepared"))
    with pytest.raises(InvalidInput, match="holds a run with other data, seed, users; use another --out"):
        run_lamp(replace(request, seed=1, users=2), base=base)
    with pytest.raises(InvalidInput, match="holds a run with other method"):
        run_lamp(replace(request, method="rag"), base=base)


def test_a_method_gives_the_model_back(
    method_request: Callable[..., LampRequest], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(METHODS["perfit"], "close", lambda self: closed.append(self.name))
    run_lamp(method_request(users=1), base=base)
    assert closed == ["perfit"]


# -- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["device", "paper"])
def test_on_a_device_s_schedule_people_start_where_their_devices_would(
    schedule: str, method_request: Callable[..., LampRequest], data: TaskData, context: FitContext
) -> None:
    """Those with too few examples for an update stay there."""
    request = method_request(schedule=schedule)
    assert request.artefact is not None
    artefact = Artefact.load(request.artefact)
    spec = artefact.spec
    communities = tuple(random_shift(spec, spec.personal_rank, seed, size=0.5) for seed in (5, 6, 7))
    replace(artefact, communities=communities).save(request.artefact)
    method = METHODS[request.method](request, data)
    method.prepare(lambda: False)
    engine = UpdateEngine(data.base, keep_bytes=2**26)
    try:
        people = [
            replace(person, history=person.history[:n])
            for person, n in zip(data.people.people[:3], (2, 4, 9), strict=True)
        ]
        chosen = [
            choose_start(scores_by_start(engine, method.artefact, Learner.of(each, data.encoder).history))
            for each in people
        ]
        assert chosen[0] == 0 < max(chosen), "or the plain seed for everybody would pass too"
        on_device = schedule == "device"
        assert [method.can_fit(each) for each in people] == [not on_device, True, True]
        fitted = method.fit_cohort(people[1:], context)
    finally:
        method.close()
        engine.close()
    few, enough = fitted
    if on_device:
        assert few.state.personal.digest() == method.artefact.starts[chosen[1]].digest()
        assert not few.losses and enough.losses
    else:
        assert few.losses and enough.losses
