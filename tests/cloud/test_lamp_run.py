"""A LaMP run end to end on a tiny random model and invented files: both stages, resume, ablations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files
from tests.support.lamp_requests import small_request

from perfit_cloud.collective.data import read_items
from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.lamp.measure import Decoding
from perfit_cloud.lamp.people import Learner, read_people, swap_histories
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import Run, UserFolder
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.lamp.sweep import run_sweep, sweep_requests
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput, ShiftMismatch
from perfit_shared.presets import spaced_layers
from perfit_shared.tasks import TASKS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("lamp"))


@pytest.fixture(scope="module")
def request_for(data: Path, model_folder: Callable[[str], Path]) -> Callable[..., LampRequest]:
    def make(out: Path, **changes: Any) -> LampRequest:
        return small_request(model_folder("llama"), **({"data": data, "out": out} | changes))

    return make


@pytest.fixture(scope="module")
def base(load: Callable[[str], BaseModel]) -> BaseModel:
    return load("llama")


@pytest.fixture(scope="module")
def full(
    request_for: Callable[..., LampRequest], base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """An undisturbed run."""
    return run_lamp(request_for(tmp_path_factory.mktemp("full")), base=base)


NO_STAGE_1 = {"collective_epochs": None, "collective_learning_rate": None}


def figures(run: Run) -> dict[str, Any]:
    """The summary without its clock."""
    summary = json.loads((run.folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k != "seconds"}


def tensors(run: Run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.folder.glob("users/*/personal.safetensors")}


def test_a_run_leaves_everything(full: Run, data: Path) -> None:
    summary = json.loads((full.folder / "summary.json").read_text())
    modes = {"base", "collective", "seed", "personal", "other"}
    assert summary["task"] == TASK and set(summary["loss"]) == modes
    assert set(summary["metrics"]) == {"rouge_1", "rouge_l"}
    assert all(set(values) == modes for values in summary["metrics"].values())
    assert [u["user_id"] for u in summary["users"]] == ["12", "13", "14", "15", "16"]
    assert set(summary["seconds"]) == {"preparation", "fit", "answers"}
    assert all(value > 0 for value in summary["seconds"].values())
    assert summary["loss"]["personal"] < summary["loss"]["collective"], "everyone has a habit to learn"
    assert summary["loss"]["personal"] < summary["loss"]["other"], "and it is their own"
    assert len(tensors(full)) == len(set(tensors(full).values())) == 5
    # Whose words answers share with golds, by mode and over all queries alike.
    shares = [summary["text_metrics"][name] for name in ("matter", "wording", "other_overlap")]
    assert sum(share["personal"] for share in shares) == pytest.approx(1)
    assert shares[1]["personal"] > 0, "everyone's headlines hold their own word"
    assert {"meteor", "chrf", "length_ratio", "edit_distance"} < set(summary["text_metrics"])


def test_predictions_are_in_lamps_schema(full: Run, data: Path) -> None:
    golds = json.loads((data / "user_top_100_history_label.json").read_text())["golds"]
    for name in ("predictions", "predictions/base", "predictions/other"):
        found = json.loads((full.folder / f"{name}.json").read_text())
        assert found["task"] == "LaMP_4" and set(found) == {"task", "golds", "model"}
        assert sorted(g["id"] for g in found["golds"]) == sorted(g["id"] for g in golds)
        assert all(set(g) == {"id", "output"} and "\n" not in g["output"] for g in found["golds"])
    personal, base = (
        json.loads((full.folder / f"predictions/{mode}.json").read_text())["golds"]
        for mode in ("personal", "base")
    )
    assert personal != base


def test_a_finished_run_is_only_read(
    full: Run, request_for: Callable[..., LampRequest], base: BaseModel
) -> None:
    before = {p: p.stat().st_mtime_ns for p in full.folder.rglob("*") if p.is_file()}
    again = run_lamp(request_for(full.folder), base=base)
    assert again.users == full.users
    assert before == {p: p.stat().st_mtime_ns for p in full.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"seed": 1}, {"users": 3}, {"histories": "other"}])
def test_an_out_of_another_run_is_refused(
    full: Run, request_for: Callable[..., LampRequest], base: BaseModel, changes: dict[str, Any]
) -> None:
    request = request_for(full.folder, artefact=full.folder / "artefact", **NO_STAGE_1, **changes)
    with pytest.raises(InvalidInput, match=r"holds a run with other .* use another --out"):
        run_lamp(request, base=base)


@pytest.mark.slow
def test_stopped_anywhere_and_resumed_gives_the_same_figures(
    full: Run, request_for: Callable[..., LampRequest], base: BaseModel, tmp_path: Path
) -> None:
    """Stopped after every few steps of both stages; what a run without interruption gives comes out."""
    request, stops = request_for(tmp_path / "again"), 0
    while True:
        asked = iter(range(3))
        try:
            run = run_lamp(request, base=base, stop=lambda asked=asked: next(asked, None) is None)  # type: ignore[misc]
            break
        except Cancelled:
            stops += 1
    assert stops >= 8
    assert tensors(run) == tensors(full)
    assert figures(run) == figures(full)


def test_a_users_history_reaches_nobody_else(
    full: Run, request_for: Callable[..., LampRequest], base: BaseModel, data: Path, tmp_path: Path
) -> None:
    """FACTS: a widely copied baseline trains user i on the data of users 0…i. Another history of user
    12, of the same shapes, may change what 12 becomes, and nobody else's tensors by a bit."""
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    users = json.loads((changed / "user_top_100_history.json").read_text())
    for entry in users[0]["profile"]:
        entry["title"] = entry["title"].replace("1", "2")  # as many tokens
    (changed / "user_top_100_history.json").write_text(json.dumps(users))
    task = TASKS[TASK]
    lengths = [
        Learner.of(read_people(folder, task, base).people[0], Encoder(base, task)).lengths
        for folder in (data, changed)
    ]
    assert lengths[0] == lengths[1], "or the passes would have other shapes"
    request = request_for(tmp_path / "out", data=changed, artefact=full.folder / "artefact", **NO_STAGE_1)
    theirs, ours = tensors(run_lamp(request, base=base)), tensors(full)
    assert theirs["12"] != ours["12"]
    assert {k: v for k, v in theirs.items() if k != "12"} == {k: v for k, v in ours.items() if k != "12"}


@pytest.mark.slow
def test_ablations(
    request_for: Callable[..., LampRequest], make_artefact: Any, base: BaseModel, tmp_path: Path
) -> None:
    # Not one that was trained: where stage 1 does not help, it is the identity, as in stage 2 alone.
    make_artefact(base, positions="f2+l3", layers=(1, 2), ranks=(4, 2)).save(tmp_path / "artefact")
    request = request_for(
        tmp_path,
        **NO_STAGE_1,
        artefact=tmp_path / "artefact",
        users=2,
        layers=None,
        positions=None,
        collective_rank=None,
        personal_rank=2,
    )
    runs = {run.folder.name: run for run in run_sweep(request, "ablations")}
    assert set(runs) == {"full", "stage1", "stage2", "stage2_sum"}
    assert runs["stage1"].modes == ("base", "collective", "seed") and not tensors(runs["stage1"])
    assert runs["stage2"].modes == ("base", "personal", "other")
    losses = {name: run.users[0].loss(run.modes[-1]) for name, run in runs.items()}
    assert runs["full"].users[0].loss("seed") == losses["stage1"]
    assert len(set(losses.values())) == 4
    # From the identity, the base is where stage 2 alone starts.
    assert runs["stage2"].users[0].loss("base") == runs["full"].users[0].loss("base")


def test_a_collective_shift_of_another_task_serves(
    full: Run, request_for: Callable[..., LampRequest], base: BaseModel, tmp_path: Path
) -> None:
    artefact = Artefact.load(full.folder / "artefact")
    replace(artefact, name="chat", task=TASKS["chat"]).save(tmp_path / "chat")
    run = run_lamp(
        request_for(tmp_path / "out", artefact=tmp_path / "chat", users=1, **NO_STAGE_1), base=base
    )
    assert (run.task.name, run.settings["artefact_task"]) == (TASK, "chat")
    assert run.modes == ("base", "collective", "seed", "personal"), "a single user has nobody else"
    other = replace(artefact, fingerprint="0" * 64)
    other.save(tmp_path / "other")
    with pytest.raises(ShiftMismatch, match="another base model"):
        run_lamp(request_for(tmp_path / "no", artefact=tmp_path / "other", **NO_STAGE_1), base=base)
    with pytest.raises(InvalidInput, match="other layers"):
        run_lamp(
            request_for(tmp_path / "no", artefact=tmp_path / "chat", layers=(0,), **NO_STAGE_1), base=base
        )


@pytest.mark.parametrize(
    ("count", "blocks", "layers"),
    [
        (1, 32, (15,)),
        (2, 32, (7, 23)),
        (4, 32, (3, 11, 19, 27)),
        (3, 30, (4, 14, 24)),
        (5, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_layers_lie_about_the_middle(count: int, blocks: int, layers: tuple[int, ...]) -> None:
    """Fig. 6: symmetric about block 15 of 32, the model's blocks over their number apart."""
    assert spaced_layers(count, blocks) == layers


def test_groups_of_collective_users_are_disjoint_and_equal(data: Path) -> None:
    """Table 15: five random groups, who is tested stays the same."""
    items = read_items(data, TASKS[TASK])
    groups = [set(items.group(number, seed=3).users) for number in range(5)]
    assert [len(group) for group in groups] == [len(items.users) // 5] * 5
    assert len(set().union(*groups)) == sum(map(len, groups)), "nobody is in two"
    assert groups != [set(items.group(number, seed=4).users) for number in range(5)]
    with pytest.raises(InvalidInput, match="groups 0 to 4"):
        items.group(5, seed=3)
    with pytest.raises(InvalidInput, match="groups 0 to 4"):
        items.first_users(4, 0).group(0, 0)


@pytest.mark.slow
def test_a_sweep_of_groups_trains_stage_1_on_each(
    request_for: Callable[..., LampRequest], base: BaseModel, tmp_path: Path
) -> None:
    runs = run_sweep(request_for(tmp_path, users=1, epochs=1), "groups=0,1")
    assert [run.settings["collective_group"] for run in runs] == [0, 1]
    users = [json.loads((run.folder / "artefact" / "artefact.json").read_text())["card"] for run in runs]
    assert [card["data"]["users"] for card in users] == [2, 2], "a fifth of twelve"
    # The same artefacts, as other tasks' collective shifts: Table 16.
    other = replace(Artefact.load(runs[1].folder / "artefact"), name="chat", task=TASKS["chat"])
    other.save(tmp_path / "chat")
    given = {**NO_STAGE_1, "artefact": runs[0].folder / "artefact"}
    request = request_for(tmp_path / "foreign", users=1, epochs=1, **given)
    foreign = run_sweep(request, f"artefacts={tmp_path / 'chat'}")
    assert [(run.folder.name, run.settings["artefact_task"]) for run in foreign] == [
        ("own", TASK),
        ("1-chat", "chat"),
    ]


def test_other_histories_swap_and_keep_the_queries(data: Path, base: BaseModel, full: Run) -> None:
    people = read_people(data, TASKS[TASK], base).people
    swapped = swap_histories(people)
    assert [p.history for p in swapped] == [*(p.history for p in people[1:]), people[0].history]
    assert [p.queries for p in swapped] == [p.queries for p in people]


@pytest.mark.slow
def test_short_histories_keep_their_latest(
    full: Run, request_for: Callable[..., LampRequest], data: Path, base: BaseModel, tmp_path: Path
) -> None:
    whole = read_people(data, TASKS[TASK], base).people
    short = read_people(data, TASKS[TASK], base, examples=3).people
    assert [person.history for person in short] == [person.history[-3:] for person in whole]
    assert [person.queries for person in short] == [person.queries for person in whole]
    request = request_for(tmp_path, artefact=full.folder / "artefact", users=2, **NO_STAGE_1)
    runs = run_sweep(request, "examples=2,3")
    assert [run.settings["examples"] for run in runs] == [None, 2, 3]
    assert [run.users[0].examples for run in runs] == [len(whole[0].history), 2, 3]
    assert len({run.users[0].loss("personal") for run in runs}) == 3
    assert len({run.users[0].loss("seed") for run in runs}) == 1, "one stage 1 for all"


def test_sweeps_name_their_runs(request_for: Callable[..., LampRequest], tmp_path: Path) -> None:
    request = request_for(tmp_path, layers=None, collective_rank=None, personal_rank=None)
    assert [r.layers for r in sweep_requests(request, "layers", blocks=3)] == [(0,), (1,), (2,)]
    grid = sweep_requests(request, "ranks=2,4", blocks=3)
    assert [(r.collective_rank, r.personal_rank) for r in grid] == [(2, 2), (2, 4), (4, 2), (4, 4)]
    assert [r.seed for r in sweep_requests(request, "seeds", blocks=3)] == [0, 1, 2]
    few = sweep_requests(request, "collective-users", blocks=3)
    assert [r.collective_users for r in few] == [10, 100]
    assert len({r.out for r in grid}) == 4
    assert [r.collective_group for r in sweep_requests(request, "groups", blocks=3)] == [0, 1, 2, 3, 4]
    counts = sweep_requests(request, "layer-counts", blocks=6)
    assert [r.layers for r in counts] == [(2,), (1, 4), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)]
    for wrong in ("depth", "layers=a", "ablations=2", "ranks=-1", "artefacts", "groups=5", "layer-counts=9"):
        with pytest.raises(InvalidInput):
            sweep_requests(request, wrong, blocks=3)
    for both, sweep in (
        ({"layers": (1,)}, "layers"),
        ({"seed": 2}, "seeds"),
        ({"personal_rank": 2}, "ranks"),
        ({"layers": (1,)}, "layer-counts=2"),
        ({"collective_group": 0}, "groups"),
    ):
        with pytest.raises(InvalidInput, match="leave one out"):
            sweep_requests(replace(request, **both), sweep, blocks=3)
    assert len(sweep_requests(replace(request, method="oppu"), "groups", blocks=3)) == 5
    for method, sweep in (("lora-p", "groups"), ("none", "layers"), ("rag", "ranks=2,4")):
        with pytest.raises(InvalidInput, match=f"equal runs: {method} does not use"):
            sweep_requests(replace(request, method=method), sweep, blocks=3)


@pytest.mark.slow
def test_sweeps_keep_what_they_do_not_sweep(
    full: Run, request_for: Callable[..., LampRequest], tmp_path: Path
) -> None:
    """A review found both of these to end in an IndexError."""
    alone = request_for(tmp_path / "a", method="perfit_stage2", users=1, epochs=1, **NO_STAGE_1)
    assert [run.settings["seed"] for run in run_sweep(alone, "seeds=0,1")] == [0, 1]
    few = request_for(tmp_path / "b", users=1, epochs=1, collective_epochs=None)
    runs = run_sweep(few, "collective-users=2,5")
    assert len({run.settings["artefact"] for run in runs}) == 2


def test_a_damaged_result_is_made_again(
    full: Run, request_for: Callable[..., LampRequest], base: BaseModel, tmp_path: Path
) -> None:
    shutil.copytree(full.folder, tmp_path / "copy")
    damaged = tmp_path / "copy" / "users" / "13" / "result.json"
    damaged.write_text("{")
    with pytest.raises(InvalidData, match="remove it and run again"):
        run_lamp(request_for(tmp_path / "copy"), base=base)
    damaged.unlink()
    assert figures(run_lamp(request_for(tmp_path / "copy"), base=base)) == figures(full)


def test_folders_of_users_are_distinct(tmp_path: Path) -> None:
    """A review found two ids with one folder, and a name too long for a file system."""
    ids = ["7", "éa", "ບ", "Ann", "ann", "a/b", "a%2fb", "..", "", "ບ" * 100, "ບ" * 101]
    folders = [UserFolder(tmp_path, name).path for name in ids]
    assert len({str(folder).lower() for folder in folders}) == len(ids)
    assert all(folder.parent == tmp_path / "users" for folder in folders)
    for folder in folders:
        folder.mkdir(parents=True)


def test_draws_depend_on_the_query_alone(full: Run, data: Path, base: BaseModel) -> None:
    people = read_people(data, TASKS[TASK], base).people
    seeds = {
        Decoding(seed=seed).sampling(TASKS[TASK], p.user_id, q).seed
        for seed in (0, 1)
        for p in people
        for q in p.queries
    }
    assert len(seeds) == 2 * sum(len(p.queries) for p in people)


def test_what_cannot_be_is_said(
    request_for: Callable[..., LampRequest], base: BaseModel, data: Path, tmp_path: Path
) -> None:
    for changes in (
        {"method": "mine"},
        {"histories": "mine"},
        {"users": 0},
        {"epochs": 0},
        {"learning_rate": 20.0},
        {"batch_size": 0},
        {"keep_bytes": -1},
        {"frequency_penalty": 3.0},
        {"frequency_penalty": float("nan")},
        {"modes": ()},
        {"modes": ("personal", "mine")},
        {"artefact": tmp_path},
    ):
        with pytest.raises(InvalidInput):
            request_for(tmp_path, **changes)
    with pytest.raises(InvalidInput, match="temperature"):
        Decoding(temperature=-1)
    with pytest.raises(InvalidData, match="lamp prepare"):
        run_lamp(request_for(tmp_path / "b", data=tmp_path), base=base)
