"""Seeds of communities on a tiny model: planted groups are found, small ones dissolved, runs go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.collective import StopAfter, small_request
from typer.testing import CliRunner

from perfit_cloud.cli.main import app
from perfit_cloud.collective import community_run
from perfit_cloud.collective.clustering import assign
from perfit_cloud.collective.communities import FILE, LEAST_PEOPLE
from perfit_cloud.collective.community_run import CommunitiesRequest, add_communities
from perfit_cloud.collective.data import Corpus, read_items
from perfit_cloud.collective.personal import scores_by_start
from perfit_cloud.collective.privacy import Budget
from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput
from perfit_shared.shifts import ShiftTensors
from perfit_shared.starts import choose_start
from perfit_shared.types import Score

_NEVER = 10**6
_TITLES = ("the cat sat", "red dog ran")  # what everybody of a planted group writes


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 people of two groups by turns, 8 items each."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    people = [
        {
            "user_id": f"{user:02d}",
            "query": [],
            "profile": [
                {
                    "id": f"{user}-{i}",
                    "date": f"2020-01-{i + 1:02d}",
                    "text": " ".join(rng.choice(["cat", "dog", "mat", "door"], 5)),
                    "title": _TITLES[user % 2],
                }
                for i in range(8)
            ],
        }
        for user in range(26)
    ]
    (folder / "user_others.json").write_text(json.dumps(people))
    (folder / "task.json").write_text(json.dumps({"template": "{text} so", "answer": " {title}"}))
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("llama"))


@pytest.fixture(scope="module")
def base(model: str) -> BaseModel:
    return load_base(model, dtype="float32")


@pytest.fixture(scope="module")
def stage1(planted: Path, model: str, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "out"
    train_collective(small_request(planted, model, out, epochs=1), base=base)
    return out


@pytest.fixture
def request_for(planted: Path, model: str, stage1: Path, tmp_path: Path) -> Callable[..., CommunitiesRequest]:
    def make(**changes: Any) -> CommunitiesRequest:
        request = CommunitiesRequest(stage1, planted, model, tmp_path / "out", 2, dtype="float32")
        return replace(request, **changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(
    planted: Path, model: str, stage1: Path, base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """The artefact with two communities, and how often it asked whether to stop."""
    out, never = tmp_path_factory.mktemp("two") / "out", StopAfter(_NEVER)
    add_communities(CommunitiesRequest(stage1, planted, model, out, 2), base=base, stop=never)
    return out, _NEVER - never.left


@pytest.fixture(scope="module")
def two(undisturbed: tuple[Path, int]) -> Path:
    return undisturbed[0]


def test_planted_groups_are_found_and_pick_their_own_seed(
    two: Path, stage1: Path, base: BaseModel, planted: Path
) -> None:
    artefact, before = Artefact.load(two), Artefact.load(stage1)
    told = artefact.card["communities"]
    assert sum(told["sizes"]) == before.card["data"]["users"] - before.card["data"]["validation_users"]
    assert len(told["sizes"]) == 2 and min(told["sizes"]) >= LEAST_PEOPLE
    assert (artefact.version, artefact.seed.digest()) == (before.version, before.seed.digest())
    encoded = [base.encode_pair("cat mat dog so", f" {title}") for title in _TITLES]
    engine = UpdateEngine(base, keep_bytes=2**26)
    try:
        chosen = [choose_start(scores_by_start(engine, artefact, [pair] * 4)) for pair in encoded]
    finally:
        engine.close()
    assert sorted(chosen) == [1, 2]
    held_out = told["held_out"]
    assert held_out["chosen"] < held_out["seed"] and held_out["picked_a_community"] == held_out["people"]
    page = (two / "CARD.md").read_text()
    assert page.count("**Communities.**") == 1 and "of 7 people or more" in page
    assert page.startswith((stage1 / "CARD.md").read_text().rstrip())


def test_a_part_of_the_people_leaves_out_those_whom_the_artefact_holds_out(
    request_for: Any,
    stage1: Path,
    planted: Path,
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were drawn anew among that part, and so were people whom the artefact had learned from."""
    seen: list[Corpus] = []

    def stop_there(artefact: Artefact, corpus: Corpus, *_: object, **__: object) -> None:
        seen.append(corpus)
        raise Cancelled("seen")

    monkeypatch.setattr(community_run, "with_communities", stop_there)
    small = tmp_path / "small"
    shutil.copytree(stage1, small)
    card = json.loads((small / "artefact.json").read_text())
    card["card"]["data"]["users"] = 20  # as if stage 1 had read so many
    (small / "artefact.json").write_text(json.dumps(card))
    for changes in ({}, {"users": 14}, {"artefact": small}):
        with pytest.raises(Cancelled, match="seen"):
            add_communities(request_for(**changes), base=base)
    whole, part, of_small = seen
    assert part.validated == whole.validated and len(part.train) == 14 < len(whole.train)
    assert not part.train.keys() & part.validated.keys()
    theirs = read_items(planted, Artefact.load(stage1).task).first_users(20, 0)
    assert of_small.train.keys() | of_small.validated.keys() == theirs.users.keys()


def test_stage_1_adds_them_itself_and_one_community_is_none(
    planted: Path, model: str, base: BaseModel, stage1: Path, two: Path, tmp_path: Path
) -> None:
    made = small_request(planted, model, tmp_path / "out", epochs=1, communities=2)
    found = train_collective(made, base=base)
    digests = [seed.digest() for seed in Artefact.load(two).communities]
    assert [seed.digest() for seed in Artefact.load(tmp_path / "out").communities] == digests
    assert "**Communities.**" in (tmp_path / "out/CARD.md").read_text()
    assert found.version == Artefact.load(stage1).version  # as without communities
    plain = train_collective(replace(made, communities=1, force=True), base=base)
    assert plain.starts == (plain.seed,) and "communities" not in plain.card
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in stage1.iterdir()}  # none is left of those that were replaced


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 30, 50], ids=["clustering", "a round", "the last seeds"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    request_for: Any, base: BaseModel, undisturbed: tuple[Path, int], steps: int
) -> None:
    whole, all_steps = undisturbed
    request, rest = request_for(), StopAfter(_NEVER)
    with pytest.raises(Cancelled, match="the same command"):
        add_communities(request, base=base, stop=StopAfter(steps))
    assert not (request.out / "artefact.json").exists()
    found = add_communities(request, base=base, stop=rest)
    # Clustering alone begins anew.
    assert _NEVER - rest.left == (all_steps if steps == 3 else all_steps - steps)
    assert [s.digest() for s in found.communities] == [s.digest() for s in Artefact.load(whole).communities]
    assert not (request.out / FILE).exists()


def test_what_cannot_be_is_refused(request_for: Any, base: BaseModel, planted: Path, model: str) -> None:
    for count, words in ((1, "from 2 to 16"), (17, "from 2 to 16"), (4, "need 28 people")):
        with pytest.raises(InvalidInput, match=words):
            add_communities(request_for(communities=count), base=base)
    private: CollectiveRequest = small_request(
        planted, model, request_for().out, communities=2, validation=planted, budget=Budget(8.0)
    )
    with pytest.raises(InvalidInput, match="drawn by seed 0"):
        add_communities(request_for(seed=9), base=base)
    with pytest.raises(InvalidInput, match="beyond the privacy budget"):
        train_collective(private, base=base)
    request = request_for()
    with pytest.raises(Cancelled):
        add_communities(request, base=base, stop=StopAfter(30))
    with pytest.raises(InvalidInput, match="other arguments or data"):
        add_communities(replace(request, examples=4), base=base)
    (request.out / FILE).write_bytes(b"\0" * 20)
    with pytest.raises(InvalidData, match="damaged"):
        add_communities(request, base=base)


def test_an_artefact_keeps_them_and_sees_what_was_altered(two: Path, tmp_path: Path) -> None:
    whole = Artefact.load(two)
    whole.save(tmp_path)
    again = Artefact.load(tmp_path)
    assert [seed.digest() for seed in again.starts] == [seed.digest() for seed in whole.starts]
    nan = ShiftTensors.from_named({name: array * np.float32("nan") for name, array in whole.seed.named()})
    file = tmp_path / "community-2.safetensors"
    for data in (whole.seed.to_bytes(), nan.to_bytes(), b"", None):
        file.write_bytes(data) if data is not None else file.unlink()
        with pytest.raises(InvalidData, match="not a usable artefact"):
            Artefact.load(tmp_path)
    values = json.loads((tmp_path / "artefact.json").read_text())
    (tmp_path / "artefact.json").write_text(json.dumps(values | {"communities": ["0"] * 10_000}))
    with pytest.raises(InvalidData, match="more than 16 communities"):
        Artefact.load(tmp_path)
    with pytest.raises(InvalidData, match="more than 16"):
        replace(whole, communities=(whole.seed,) * 17)


def test_small_clusters_are_dissolved_and_their_people_go_where_it_costs_least() -> None:
    costs = np.array([[0, 9, 5]] * 5 + [[9, 0, 1]] * 5 + [[9, 2, 0]] * 2, dtype=float)
    assert assign(costs, least=2) == [0] * 5 + [1] * 5 + [2] * 2
    assert assign(costs, least=3) == [0] * 5 + [1] * 7
    assert set(assign(costs, least=12)) == {1}


@pytest.mark.parametrize(
    ("losses", "count", "chosen"),
    [((2.0, 1.0, 3.0), 3, 1), ((2.0, 1.0), 2, 0), ((1.0, 1.0), 9, 0), ((1.0, 0.9), 30, 1)],
    ids=["the lowest", "too few", "equal", "the latest only"],
)
def test_a_start_is_chosen_by_the_loss_of_the_latest_examples(
    losses: tuple[float, ...], count: int, chosen: int
) -> None:
    far = [Score(-100.0 * n, 1) for n in range(len(losses))] * (count > 20)
    assert choose_start([[*far, *[Score(-loss * 4, 4)] * count] for loss in losses]) == chosen


def test_the_command_says_what_came_of_it(planted: Path, model: str, stage1: Path, tmp_path: Path) -> None:
    words = ["collective", "communities", "--artefact", str(stage1), "--data", str(planted), "--model", model]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a"), "--communities", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["communities"]["sizes"]) == 2
