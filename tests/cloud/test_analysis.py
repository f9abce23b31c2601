"""δ-vectors and their spectrum: on a tiny random model and invented files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.lamp_files import write_files
from tests.support.models import random_shift

from perfit_cloud.analysis import deltas
from perfit_cloud.analysis.cross_term import cross_term, measure_cross_terms
from perfit_cloud.analysis.prompts import Prompts
from perfit_cloud.analysis.queries import QueryOptions, asking_users, count_questions, find_users
from perfit_cloud.analysis.recommend import recommend
from perfit_cloud.analysis.spectrum import BlockStatistics, coordinates, spectrum, statistics_of
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of
from perfit_cloud.model.interventions import Phi, phi, to_torch
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput, ShiftMismatch
from perfit_shared.tasks import Task, load_task

OPTIONS = QueryOptions(retrieved=2)
FAMILIES = ("llama", "gemma2", "gpt2")  # rotary, windows with soft caps, learned positions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("lamp") / "news_headline")


@pytest.fixture(scope="module")
def task(data: Path) -> Task:
    return load_task(data, "news_headline").resolved(False)


def residuals(base: BaseModel, ids: list[int]) -> torch.Tensor:
    """(blocks, d) at the last token of one sequence: `output_hidden_states`, its last one before the norm."""
    last: list[torch.Tensor] = []
    hook = block_list(base.model)[-1].register_forward_hook(lambda _m, _a, out: last.append(hidden_of(out)))
    with torch.no_grad():
        states = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.stack([state[0, -1] for state in (*states[1:-1], last[0])])


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_one_pass_a_sequence(
    family: str, data: Path, task: Task, load: Callable[[str], BaseModel], tmp_path: Path
) -> None:
    base = load(family)
    prompts, settings = Prompts(base, task), settings_for(base, task)
    users = list(asking_users(find_users(data), task, OPTIONS))
    deltas.write_deltas(tmp_path, users, prompts, base, settings, progress=quiet())
    found = deltas.open_deltas(tmp_path, settings, base)
    assert found.vectors.shape == (5, base.blocks, base.hidden_size) and found.control is not None
    lengths = set()
    for row, user in enumerate(users):
        changes, controls = [], []
        for index, question in enumerate(user.questions):
            prompt = prompts.encode(question)
            assert prompt is not None
            lengths |= {len(prompt.alone), len(prompt.with_history)}
            random = prompts.random_prefix(len(prompt.history), settings.seed, user.number, index)
            alone = residuals(base, prompt.alone)
            changes.append(residuals(base, prompt.with_history) - alone)
            controls.append(residuals(base, prompt.with_prefix(random)) - alone)
        for one, of_row in ((changes, found.vectors[row]), (controls, found.control[row])):
            naive = torch.stack(one).mean(0).numpy()
            assert np.abs(naive - of_row).max() <= 2e-5 * np.abs(naive).max()
    assert len(lengths) > 3, "passes of mixed lengths"
    assert not np.allclose(found.vectors, found.control), "a history is more than its length"


def test_histories_are_the_nearest_entries_and_never_the_query_itself(
    data: Path, task: Task, load: Callable[[str], BaseModel]
) -> None:
    others = data / "user_others.json"  # whose profiles begin with their queries
    for user in asking_users(others, task, OPTIONS):
        for question in user.questions:
            entries = question.history.splitlines()
            assert len(entries) == 2 and all(e.startswith("article: ") and " title: " in e for e in entries)
            asked = question.prompt.removesuffix(" so")
            assert not any(entry.startswith(f"article: {asked} title: ") for entry in entries)
    assert count_questions(others, task, OPTIONS) == sum(
        len(user.questions) for user in asking_users(others, task, OPTIONS)
    )
    alone = replace(OPTIONS, most=1)
    assert [len(user.questions) for user in asking_users(others, task, alone, users=3)] == [1, 1, 1]
    records = json.loads((data / "user_top_100_history.json").read_text())
    for record in records:
        record["query"] = []
    records[0]["profile"] = records[0]["profile"][:1]  # nothing is left to put before it
    path = data.parent / "without.json"
    path.write_text(json.dumps(records))
    found = list(asking_users(path, task, replace(OPTIONS, most=4)))
    assert [user.number for user in found] == [1, 2, 3, 4] and all(len(user.questions) == 4 for user in found)


@pytest.mark.parametrize("cap", [256, 30])
def test_a_query_keeps_its_tokens_and_the_control_has_the_history_s_length(
    cap: int, data: Path, task: Task, load: Callable[[str], BaseModel]
) -> None:
    base = load("llama")
    prompts = Prompts(base, task)
    prompts.cap = cap
    special, seen = {0, 1, 2}, 0
    for user in asking_users(find_users(data), task, OPTIONS):
        for question in user.questions:
            prompt = prompts.encode(question)
            if prompt is None:
                assert len(base.encode(question.prompt)) >= cap
                continue
            assert prompt.alone == base.encode(question.prompt) and prompt.at == 1, "<s> stays in front"
            assert (
                len(prompt.with_history) <= cap
                and prompt.with_history[-len(prompt.alone) + 1 :] == prompt.alone[1:]
            )
            random = prompts.random_prefix(len(prompt.history), 0, user.number)
            assert len(prompt.with_prefix(random)) == len(prompt.with_history) and not special & set(random)
            assert cap == 30 or base.decode(prompt.with_history).endswith(
                f"{question.history}\n{question.prompt}"
            )
            seen += 1
    assert seen


# -- files -------------------------------------------------------------------------------------------


def quiet() -> Any:
    from perfit_cloud.collective.progress import Progress

    return Progress(0, shown=False)


def settings_for(base: BaseModel, task: Task) -> deltas.DeltaSettings:
    return deltas.DeltaSettings(
        base.fingerprint, "float32", task.to_json(), "x/y.json", "00", 2, 32, None, True, 64, 0
    )


def test_stopped_anywhere_and_resumed_gives_the_same_bytes_and_holds_a_window_at_most(
    data: Path, task: Task, load: Callable[[str], BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama")
    prompts, settings = Prompts(base, task), settings_for(base, task)
    monkeypatch.setattr(deltas, "_WINDOW_USERS", 2)
    sizes: list[int] = []
    compute = deltas._compute
    monkeypatch.setattr(deltas, "_compute", lambda w, *rest: sizes.append(len(w)) or compute(w, *rest))

    def write(folder: Path, stop: Callable[[], bool] = lambda: False) -> None:
        users = asking_users(find_users(data), task, OPTIONS)
        deltas.write_deltas(folder, users, prompts, base, settings, progress=quiet(), stop=stop)

    write(tmp_path / "whole")
    assert sizes == [2, 2, 1], "users are computed and written a window at a time"
    calls: Iterator[bool] = iter([False, True])
    with pytest.raises(Cancelled, match="2 users"):
        write(tmp_path / "parts", lambda: next(calls))
    with (tmp_path / "parts/deltas.f32").open("ab") as file:  # a kill between appending and recording
        file.write(b"half a row")
    write(tmp_path / "parts")
    for name in ("deltas.f32", "control.f32", "numbers.i64", "progress.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    done = len(sizes)
    write(tmp_path / "parts")
    assert len(sizes) == done, "what is finished is not computed again"
    with pytest.raises(InvalidInput, match="other seed"):
        deltas.open_deltas(tmp_path / "parts", replace(settings, seed=1), base)
    (tmp_path / "whole/progress.json").write_text("{")
    with pytest.raises(InvalidData, match="damaged"):
        write(tmp_path / "whole")


# -- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "width"), [(30, 60), (4000, 12)]
)  # by SVD, and by the Gram matrix in chunks
def test_rank_of_a_known_spectrum(rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    energies = np.array([70.0, 10, 6, 5, 4, 3, 2])
    left, right = (np.linalg.qr(rng.normal(size=(n, 7)))[0] for n in (rows, width))
    made = (left * np.sqrt(energies)) @ right.T
    found = spectrum(made.astype(np.float32))
    assert found.energies[:7] == pytest.approx(energies, rel=1e-4)
    assert [found.rank(share) for share in (0.7, 0.8, 0.85, 0.9, 0.95, 1 - 1e-9)] == [1, 2, 3, 4, 5, 7]
    assert np.abs(found.directions[:5] @ right[:, :5]) == pytest.approx(np.eye(5), abs=1e-4)
    assert found.mean @ found.directions[0] >= 0
    # All that is shared is gone once the mean is taken out.
    shared = made + 100 * right[:, 6]
    plain, centred = (spectrum(shared.astype(np.float32), centred=c) for c in (False, True))
    assert plain.rank(0.9) == 1 and centred.rank(0.9) > 1
    first = coordinates(shared.astype(np.float32), plain.directions[:1])
    assert first.mean() == pytest.approx(100, rel=0.05)
    assert spectrum(np.zeros((3, 4), np.float32)).rank(0.9) == 0


def test_the_cross_term(
    load: Callable[[str], BaseModel], make_artefact: Callable[..., Artefact], data: Path
) -> None:
    base = load("llama")
    artefact = make_artefact(base)
    one, other = (to_torch(random_shift(artefact.spec, 3, seed), torch.device("cpu"))[1] for seed in (1, 2))
    x = torch.randn(1, 5, base.hidden_size, generator=torch.Generator().manual_seed(0))
    moved, plain = phi(x, one), phi(x, other)
    literal = ((phi(moved, other) - moved) - (plain - x)).norm(dim=-1) / (moved - x).norm(dim=-1)
    assert torch.allclose(cross_term(x, one, other), literal, rtol=1e-3) and literal.min() > 0.01
    still = Phi(other.rotation, other.rotation, torch.zeros_like(other.bias))
    assert not cross_term(x, one, still).any(), "a personal shift that does nothing"
    assert not cross_term(x, still, one).any(), "a collective shift that does nothing"

    prompts, users = (
        Prompts(base, artefact.task),
        list(asking_users(find_users(data), artefact.task, OPTIONS)),
    )
    personal = {user.user_id: random_shift(artefact.spec, 3, 7) for user in users[1:]}
    terms = measure_cross_terms(base, artefact, personal, users, prompts)
    assert [(t.block, t.users) for t in terms] == [(1, 5), (2, 5)]
    assert all(0 < t.median <= t.high for t in terms), "trained shifts of four of five people"
    (seed_alone,) = {t.high for t in measure_cross_terms(base, artefact, {}, users[:1], prompts)}
    assert seed_alone == 0, "a seed that is the identity"
    with pytest.raises(ShiftMismatch, match="another model"):
        measure_cross_terms(base, replace(artefact, fingerprint="x"), {}, users, prompts)


def test_a_recommendation_takes_strong_low_ranks_and_says_what_it_cannot_know() -> None:
    def block(number: int, strength: float, rank: int) -> BlockStatistics:
        ranks = {"0.8": 1, "0.85": 1, "0.9": rank, "0.95": 2 * rank}
        return BlockStatistics(number, ranks, ranks, strength, 1.0, 0.5, 1.0)

    blocks = [
        block(0, 1, 30),
        block(1, 5, 6),
        block(2, 9, 5),
        block(3, 8, 7),
        block(4, 2, 40),
        block(5, 99, 1),
    ]
    found = recommend(blocks, users=1000, hidden_size=64)
    assert found.layers == (1, 2, 3), "not the last block, however good it looks"
    assert (found.collective_rank, found.personal_rank, found.positions) == (8, 16, "l7")
    assert "alidation decides" in found.reason and "more of them may show more" not in found.reason
    random = [replace(b, control_norm=2.0) for b in blocks]
    assert "2.00 to 2.00 times as far" in recommend(random, users=1000, hidden_size=64).reason
    assert "Random tokens" not in found.reason
    assert "20 users bound every rank" in recommend(blocks, users=20, hidden_size=64).reason
    assert recommend(blocks[:1], users=9, hidden_size=32).personal_rank == 32


def test_statistics_of_identical_users() -> None:
    row = np.arange(1, 5, dtype=np.float32)
    found, _ = statistics_of(3, np.tile(row, (6, 1)), np.zeros((6, 4), np.float32))
    assert set(found.ranks.values()) == {1} and found.shared == pytest.approx(1)
    assert found.first_mean == pytest.approx(np.linalg.norm(row)) == found.norm
    assert found.control_norm == found.control_shared == 0
