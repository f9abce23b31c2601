"""LoRA's variants and LoFiT in a LaMP run: what each of their papers says of them, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lamp_files import LORA_STAGE_1, TASK, write_files
from tests.support.lamp_requests import task_data
from tests.support.models import build

from perfit_cloud.engine.gradients.session import GradientRequest
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.adapters import AdapterMethod
from perfit_cloud.lamp.methods.added_weights import WeightTraining, mean_loss, paper_schedule
from perfit_cloud.lamp.methods.interface import FitContext, Method, QueryRequest, TaskData
from perfit_cloud.lamp.methods.lofit import HeadOutputs, add_heads, ranked_heads
from perfit_cloud.lamp.methods.lora import COLLECTIVE, PERSONAL, RANK, add_lora
from perfit_cloud.lamp.methods.lora_collective import FILE
from perfit_cloud.lamp.people import Learner, Person
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput, UpdateFailed
from perfit_shared.types import Score

ON_LORA_C = ("oppu", "lora-c+perfit")
LEARNING = ("lora-p", "lofit", *ON_LORA_C)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("lamp"))


@pytest.fixture(scope="module")
def data(folder: Path, base: BaseModel) -> TaskData:
    return task_data(folder, base)


@pytest.fixture
def open_method(folder: Path, data: TaskData, lora_run: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    opened: list[Method[Any]] = []

    def make(name: str, **changes: Any) -> Method[Any]:
        values = {
            **{"epochs": 2, "learning_rate": 1e-2, "batch_size": 4, "lora": lora_run, "lora_layers": "all"},
            **{"layers": (1, 2), "positions": "l3", "personal_rank": 2},
        }
        request = LampRequest(TASK, "tiny", folder, tmp_path / "out", method=name, **(values | changes))
        opened.append(METHODS[name](request.without_unused(), data))
        opened[-1].prepare(lambda: False)
        return opened[-1]

    yield make
    for method in opened:
        method.close()


@pytest.fixture
def context(tmp_path: Path) -> FitContext:
    return FitContext(lambda examples, people: None, lambda examples: None, lambda: None, tmp_path / "unused")


def scores(method: Method[Any], person: Person, state: Any) -> list[Score]:
    sampling = method.request.decoding.sampling(method.data.task, person.user_id, person.queries[0])
    return method.score([QueryRequest(person.user_id, query, state, sampling) for query in person.queries])


def projected(base: BaseModel, block: int, name: str) -> torch.Tensor:
    """The weight that one of attention's projections works as, transposed."""
    projection = getattr(block_list(base.model)[block].self_attn, name)
    with torch.no_grad():
        return projection(torch.eye(base.hidden_size, dtype=base.model.dtype))


# -- what all of them promise --------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNING)
def test_it_starts_where_it_should_learns_and_leaves_the_base_alone(
    name: str, open_method: Callable[..., Any], data: TaskData, context: FitContext
) -> None:
    """OPPU's start is LoRA-C, on the same file; the others' is the base. A mixed call keeps its order."""
    before = {key: value.clone() for key, value in data.base.model.state_dict().items()}
    person = data.people.people[0]
    method, lora_c = open_method(name), open_method("lora-c")
    untouched = scores(lora_c, person, None)
    assert scores(method, person, method.shared["base"]) == untouched
    begins = scores(lora_c, person, lora_c.start) if name in ON_LORA_C else untouched
    assert scores(method, person, method.start) == begins
    assert (begins != untouched) == (name in ON_LORA_C)
    if name in ON_LORA_C:
        assert scores(method, person, method.shared["collective"]) == begins
        collective = method.collective.read()
    fitted = method.fit(person, context)
    after = scores(method, person, fitted.state)
    assert after != begins and fitted.losses[-1] < max(fitted.losses)
    if name in ON_LORA_C:
        assert all(torch.equal(w, collective[n]) for n, w in method.collective.read().items()), "frozen"
    states = [method.shared["base"], fitted.state, method.start, method.shared["base"]]
    mixed = [QueryRequest(person.user_id, person.queries[0], state, None) for state in states]
    expected = [one.log_likelihood for one in (untouched[0], after[0], begins[0], untouched[0])]
    assert [one.log_likelihood for one in method.score(mixed)] == pytest.approx(expected, rel=1e-5)
    now = data.base.model.state_dict()
    assert now.keys() == before.keys(), "no module of the base was replaced"
    assert all(torch.equal(now[key], value) for key, value in before.items()), "bit for bit"


def test_the_loss_is_that_of_perfits_training(open_method: Callable[..., Any], data: TaskData) -> None:
    method, person = open_method("lora-p"), data.people.people[0]
    pairs = [data.encoder.query(query.item).pair for query in person.queries]
    found = scores(method, person, None)
    mean = -sum(one.log_likelihood for one in found) / sum(one.tokens for one in found)
    assert mean_loss(data.base, pairs) == pytest.approx(mean, rel=1e-6)
    schedule = paper_schedule(pairs, epochs=1, batch_size=9, learning_rate=1e-2, seed=0)
    training = WeightTraining(replace(method.added, dropouts=()), pairs, schedule)
    training.step()
    assert training.losses == [pytest.approx(mean, rel=1e-6)]


def test_a_loss_that_is_no_number_names_the_user(
    open_method: Callable[..., Any], data: TaskData, context: FitContext
) -> None:
    method = open_method("lora-p")
    method.start = {name: torch.full_like(weights, torch.nan) for name, weights in method.start.items()}
    with pytest.raises(UpdateFailed, match=r"user 12: .* lower learning rate"):
        method.fit(data.people.people[0], context)


# -- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_changes_q_and_v_by_rank_r(dtype: str) -> None:
    base = build("llama", dtype)
    collective, personal = add_lora(base, [replace(COLLECTIVE, layers=(1, 2)), PERSONAL], seed=3)
    assert {p.dtype for p in (*personal.parameters.values(), *collective.parameters.values())} == {
        torch.float32
    }
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for added, on, blocks in ((personal, {"q_proj", "v_proj"}, range(4)), (collective, names, (1, 2))):
        added.write({name: w + ("lora_B" in name) * torch.randn(w.shape) for name, w in added.read().items()})
        for block in range(4):
            for name in names:
                change = projected(added.base, block, name).float() - projected(base, block, name).float()
                expected = block in blocks and name in on - {"o_proj"}
                assert bool(change.abs().sum()) == expected, (block, name)
                if dtype == "float32":
                    assert torch.linalg.matrix_rank(change, rtol=1e-4) == RANK * expected
        added.write({name: w * ("lora_A" in name) for name, w in added.read().items()})
    again = add_lora(base, [PERSONAL], seed=3)[0].read()
    assert any(not torch.equal(again[n], w) for n, w in personal.read().items()), "a seed each"


@pytest.mark.parametrize(
    ("sizes", "lora_c", "lora_p"),
    [((16, 2048, 32, 8), "1.18M", "0.85M"), ((32, 4096, 32, 8), "4.72M", "3.41M")],
    ids=["Llama-3 1B", "Llama-3 8B"],
)
def test_parameters_are_table_13s(sizes: tuple[int, int, int, int], lora_c: str, lora_p: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    config = AutoConfig.for_model(
        "llama", intermediate_size=64, vocab_size=64, **dict(zip(names, sizes, strict=True))
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    adapters = add_lora(BaseModel("llama", "f", model, None), [COLLECTIVE, PERSONAL], seed=0)
    assert [f"{each.count / 1e6:.2f}M" for each in adapters] == [lora_c, lora_p]


@pytest.mark.parametrize(
    "make", [partial(add_lora, adapters=[PERSONAL], seed=0), partial(add_heads, biased=1, seed=0)]
)
def test_a_family_without_such_projections_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="family gpt2"):
        make(build("gpt2"))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "blocks"), [("all", 4), ("perfit", 2)])
def test_a_shift_learns_on_the_frozen_lora(
    layers: str, blocks: int, open_method: Callable[..., Any], data: TaskData
) -> None:
    """Its cached partial passes run the LoRA too, and φ₂ lies on the given blocks."""
    changes = {} if layers == "all" else {"lora": None, **LORA_STAGE_1}
    method, person = open_method("lora-c+perfit", lora_layers=layers, **changes), data.people.people[0]
    assert len(method.collective.parameters) == blocks * 3 * 2
    assert method.artefact.spec.layers == (1, 2) and method.parameters == method.settings[
        "personal_rank"
    ] * 2 * (2 * 32 + 1)
    own = replace(person, queries=person.queries[:1])
    pair = data.encoder.query(own.queries[0].item).pair
    with method._trainer.open([pair], method.artefact) as session:
        ((loss, _),) = method._trainer.losses([GradientRequest(session, range(1), method.artefact.seed)])
    (found,) = scores(method, own, method.start)
    assert loss == pytest.approx(-found.log_likelihood / found.tokens, rel=1e-5)
    assert found != scores(method, own, method.shared["base"])[0]


# -- the collective adapter and the rates ----------------------------------------------------------


def test_an_interrupted_stage_1_ends_with_the_same_bits_and_is_reused(
    folder: Path, data: TaskData, lora_run: Path, tmp_path: Path
) -> None:
    request = LampRequest(TASK, "tiny", folder, tmp_path, method="lora-c", batch_size=4, **LORA_STAGE_1)
    calls = iter(range(100))
    with pytest.raises(Cancelled):
        METHODS["lora-c"](request, data).prepare(lambda: next(calls) == 4)
    assert not (tmp_path / FILE).exists()
    other = replace(data, base=replace(data.base, fingerprint="another"))
    with pytest.raises(Cancelled):  # at its first step: another model's training is no start
        METHODS["lora-c"](replace(request, collective_epochs=3), other).prepare(lambda: True)
    resumed = METHODS["lora-c"](request, data)
    seconds = resumed.prepare(lambda: False)
    undisturbed = METHODS["lora-c"](replace(request, out=lora_run), data)
    undisturbed.prepare(lambda: pytest.fail("it was trained again"))
    assert resumed.settings == undisturbed.settings and seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with pytest.raises(InvalidInput, match="other epochs"):
        METHODS["lora-c"](replace(request, collective_epochs=1), data).prepare(lambda: False)
    with pytest.raises(InvalidInput, match="no stage 1 to train"):
        replace(request, lora=lora_run)
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(InvalidData, match="not a collective LoRA"):
        METHODS["lora-c"](request, data).prepare(lambda: False)


# -- LoFiT ---------------------------------------------------------------------------------------


def test_lofit_moves_the_chosen_heads_alone(base: BaseModel) -> None:
    scalings, biases = add_heads(base, biased=2, seed=0)
    start = biases.read()
    assert start["heads"].tolist() == [[-1, -1]] * 2 and biases.count == 2 * 8
    biases.write({**start, "heads": torch.tensor([[1, 3], [2, 0]])})
    given: dict[int, list[torch.Tensor]] = {}
    for tree in (base.model, biases.base.model):
        for block, module in enumerate(block_list(tree)):
            output = module.self_attn.o_proj
            output = output.projection if isinstance(output, HeadOutputs) else output
            output.register_forward_pre_hook(
                lambda _module, args, block=block: given.setdefault(block, []).append(args[0])
            )
        with torch.no_grad():
            tree(torch.arange(12)[None])
        for module in block_list(tree):
            for one in module.modules():
                one._forward_pre_hooks.clear()
    moved = {block: (one - two).view(12, 4, 8).abs().amax((0, 2)) for block, (one, two) in given.items()}
    assert not moved[0].any() and moved[1].nonzero().tolist() == [[3]], "the first that is chosen, alone"
    bias = biases.read()["bias"][0]
    torch.testing.assert_close((given[1][1] - given[1][0]).view(12, 4, 8)[:, 3], bias.expand(12, 8))
    ranked = ranked_heads(torch.tensor([[[0.1, 0.1], [3.0, 0.0]], [[0.0, 0.0], [2.0, 2.5]]]))
    assert ranked.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]
    assert scalings.count == 4 * 32


@pytest.mark.slow
def test_lofit_takes_as_many_heads_as_there_are_and_drops_the_scalings(
    open_method: Callable[..., Any], data: TaskData, context: FitContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = data.people.people[0]
    method = open_method("lofit")
    assert method.settings["heads"] == method.settings["ranked_heads"] == 16, "4 blocks of 4"
    heads = {}
    for l1 in (0.0, 10.0):
        monkeypatch.setattr("perfit_cloud.lamp.methods.lofit._BIASED", 3)
        monkeypatch.setattr("perfit_cloud.lamp.methods.lofit._L1", l1)
        few = open_method("lofit")
        fitted = few.fit(person, context)
        steps = few.schedule(Learner.of(person, data.encoder).history, 1e-2).steps
        assert len(fitted.losses) == 2 * steps
        assert fitted.state["heads"].shape == (3, 2) and few.parameters == 3 * 8
        assert not few.scaling.read()["scaling"].any()
        heads[l1] = fitted.state["heads"].tolist()
    assert heads[0.0] != heads[10.0], "the penalty has a say in which are chosen"


# -- a run ---------------------------------------------------------------------------------------


def test_a_run_counts_parameters_and_seconds(
    folder: Path, base: BaseModel, lora_run: Path, tmp_path: Path
) -> None:
    request = LampRequest(
        TASK, "tiny", folder, tmp_path, method="oppu", lora=lora_run, learning_rate=1e-2, users=2, epochs=2
    )
    run = run_lamp(request, base=base)
    assert run.modes == ("base", "collective", "personal", "other")
    settings = run.summary()["settings"]
    q, k = 8 * (32 + 32), 8 * (32 + 16)
    assert (settings["personal_parameters"], settings["collective_parameters"]) == (
        4 * (q + k),
        4 * (q + 2 * k),
    )
    assert all(value > 0 for value in run.summary()["seconds"].values())
    states = list(tmp_path.glob("users/*/adapter.safetensors"))
    written = {path: path.stat().st_mtime_ns for path in states}
    states[0].unlink()
    (tmp_path / "summary.json").unlink()
    again = run_lamp(request, base=base)
    assert again.users == run.users, "the same from the same"
    assert states[1].stat().st_mtime_ns == written[states[1]], "who is fitted is not fitted again"
    assert json.loads((tmp_path / "summary.json").read_text())["loss"].keys() == set(run.modes)
    assert issubclass(METHODS["oppu"], AdapterMethod) and METHODS["reft"] is METHODS["perfit_stage2_sum"]
