"""Shifts as pyreft checkpoints: bit for bit both ways, refused when they are none, and run by pyreft."""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import random_shift
from typer.testing import CliRunner

from perfit_cloud.cli.artefact import app
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.pyreft import describe_model, read_checkpoint, to_artefact, write_checkpoint
from perfit_cloud.model.shifts import Group, hooked, open_book, row_index, to_torch
from perfit_shared.errors import InvalidData, InvalidInput, PerfitError
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftSpec, ShiftTensors, read_metadata
from perfit_shared.tasks import task_named

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers" / "pyreft" / "bin" / "python"
SPEC = ShiftSpec((1, 2), "f3+l3", collective_rank=6, personal_rank=3, hidden_size=32)
FIRST = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
SECOND = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#1.bin"
Shifts = tuple[ShiftTensors, ShiftTensors]


@pytest.fixture
def shifts() -> Shifts:
    return random_shift(SPEC, 6, seed=1), random_shift(SPEC, 3, seed=2)


@pytest.fixture
def folder(tmp_path: Path, shifts: Shifts) -> Path:
    """A checkpoint with φ₁ and φ₂."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    write_checkpoint(made, shifts)
    return made


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.bin"))}


def same_states(a: Path, b: Path) -> bool:
    first, second = states(a), states(b)
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(torch.equal(first[name][key], second[name][key]) for key in first[name])
        and all(first[name][key].dtype == second[name][key].dtype for key in first[name])
        for name in first
    )


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_state(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(folder / name, weights_only=True)
    change(state)
    torch.save(state, folder / name)


def run_app(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


# -- the format --------------------------------------------------------------------------------


def test_written_as_pyreft_writes(folder: Path, shifts: Shifts) -> None:
    # As pyreft 0.1.0 with pyvene 0.1.8 saved the like; the slow test asks pyreft itself.
    config = json.loads((folder / "config.json").read_text())
    assert config["sorted_keys"] == [
        "layer_1_comp_block_output_unit_pos_nunit_1#0", "layer_2_comp_block_output_unit_pos_nunit_1#0",
        "layer_1_comp_block_output_unit_pos_nunit_1#1", "layer_2_comp_block_output_unit_pos_nunit_1#1",
    ]  # fmt: skip
    assert config["representations"][2] == [1, "block_output", "pos", 1, 3, *[None] * 9]
    assert config["intervention_types"] == ["<class 'pyreft.interventions.LoreftIntervention'>"] * 4
    assert config["intervention_dimensions"] == [32] * 4
    state = states(folder)[SECOND]
    assert list(state) == ["weight", "bias", "rotate_layer"]
    assert np.array_equal(state["weight"].numpy(), shifts[1].layers[2].source)
    assert np.array_equal(state["rotate_layer"].numpy().T, shifts[1].layers[2].rotation)


@pytest.mark.parametrize("count", [1, 2])
def test_read_back_bit_for_bit(tmp_path: Path, shifts: Shifts, count: int) -> None:
    write_checkpoint(tmp_path, shifts[:count])
    read = read_checkpoint(tmp_path)
    assert [s.digest() for s in read.shifts] == [s.digest() for s in shifts[:count]]
    assert (read.ranks, read.layers, read.hidden_size, read.mended) == ((6, 3)[:count], (1, 2), 32, 0.0)


def test_order_of_layers_in_config_is_free(folder: Path, shifts: Shifts) -> None:
    def swap(config: dict[str, Any]) -> None:
        rows = config["representations"]
        config["representations"] = [rows[1], rows[3], rows[0], rows[2]]

    change_config(folder, swap)
    assert [s.digest() for s in read_checkpoint(folder).shifts] == [s.digest() for s in shifts]


def test_rounded_values_are_taken_and_rotations_mended(folder: Path, shifts: Shifts) -> None:
    change_state(folder, SECOND, lambda s: s.update({k: v.bfloat16() for k, v in s.items()}))
    read = read_checkpoint(folder)
    assert 1e-4 < read.mended < 1e-2
    (rotation, source, _), old = read.shifts[1].layers[2], shifts[1].layers[2]
    assert np.array_equal(source, torch.tensor(old.source).bfloat16().float().numpy())
    assert np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-6
    assert np.abs(rotation - old.rotation).max() < 2e-3
    # The other files keep every bit.
    assert np.array_equal(read.shifts[1].layers[1].rotation, shifts[1].layers[1].rotation)
    assert read.shifts[0].digest() == shifts[0].digest()


# -- what is no checkpoint of ours -------------------------------------------------------------


def stretch(key: str, by: float) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.__setitem__(key, state[key] * by)


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key is missing": (lambda s: s.pop("bias"), "should hold weight, bias and rotate_layer"),
    "one too many": (lambda s: s.update(act=torch.ones(1)), "and nothing else"),
    "no tensor": (lambda s: s.update(bias=[1.0]), "bias should be a float32"),
    "whole numbers": (lambda s: s.update(bias=torch.ones(3, dtype=torch.int64)), "bias should be a float32"),
    "transposed": (lambda s: s.update(rotate_layer=s["rotate_layer"].T), "rotate_layer should have shape"),
    "another rank": (lambda s: s.update(bias=torch.zeros(4)), "bias should have shape (3,), not (4,)"),
    "another width": (lambda s: s.update(weight=torch.zeros(3, 16)), "weight should have shape (3, 32)"),
    "a vector": (lambda s: s.update(weight=torch.zeros(3)), "weight should have shape (3, 32)"),
    "no number": (lambda s: s["weight"].fill_(float("nan")), "weight holds NaN"),
    "huge": (stretch("weight", 1e6), "weight is too large"),
    "not orthonormal": (stretch("rotate_layer", 1.1), "rotate_layer are not orthonormal"),
    "a lost column": (lambda s: s["rotate_layer"][:, 1].zero_(), "rotate_layer are not orthonormal"),
}


@pytest.mark.parametrize("what", BAD_STATES)
def test_bad_tensors_are_refused_by_file_and_key(folder: Path, what: str) -> None:
    change, message = BAD_STATES[what]
    change_state(folder, SECOND, change)
    with pytest.raises(InvalidData) as caught:
        read_checkpoint(folder)
    assert message in str(caught.value)
    assert SECOND in str(caught.value)


def cell(row: int, column: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["representations"][row].__setitem__(column, value)


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda c: c.pop("representations"), "not the configuration"),
    "empty": (
        lambda c: c.update(representations=[], intervention_types=[]),
        "should be a LoreftIntervention",
    ),
    "other formula": (
        lambda c: c["intervention_types"].__setitem__(1, "<class 'pyreft.interventions.DireftIntervention'>"),
        "should be a LoreftIntervention",
    ),
    "serial": (lambda c: c.update(mode="serial"), "parallel mode"),
    "layer in words": (cell(0, 0, "one"), "representation 0: its layer"),
    "component": (cell(1, 1, "mlp_output"), "representation 1: its component should be block_output"),
    "several tokens at once": (cell(1, 3, 2), "its max_number_of_units should be 1"),
    "linked": (cell(2, 9, 0), "representation 2: it has a intervention_link_key"),
    "only some layers twice": (
        lambda c: (c["representations"].pop(), c["intervention_types"].pop()),
        "one intervention, or every layer two",
    ),
    "three at a layer": (
        lambda c: (
            c["representations"].extend(c["representations"][:2]),
            c["intervention_types"].extend(c["intervention_types"][:2]),
        ),
        "one intervention, or every layer two",
    ),
    "another rank than the file": (cell(0, 4, 7), "weight should have shape (7, d), not (6, 32)"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configurations_are_refused(folder: Path, what: str) -> None:
    change, message = BAD_CONFIGS[what]
    change_config(folder, change)
    with pytest.raises(InvalidData) as caught:
        read_checkpoint(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_ranks_that_differ_between_layers_are_refused(folder: Path) -> None:
    def halve(state: dict[str, Any]) -> None:
        state.update(
            weight=state["weight"][:3].clone(), bias=state["bias"][:3].clone(),
            rotate_layer=state["rotate_layer"][:, :3].clone(),
        )  # fmt: skip

    change_state(folder, FIRST, halve)
    change_config(folder, cell(0, 4, 3))
    with pytest.raises(InvalidData, match="#0 have different ranks"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"PK\x03\x04", None])
def test_damaged_and_missing_files_are_refused(folder: Path, content: bytes | None) -> None:
    if content is None:
        (folder / SECOND).unlink()
    else:
        (folder / SECOND).write_bytes(content)
    with pytest.raises(InvalidData, match=SECOND):
        read_checkpoint(folder)


class Hostile:
    """What unpickling runs."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_code_in_a_file_is_not_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    with (folder / SECOND).open("wb") as file:
        pickle.dump({"weight": Hostile(proof)}, file, protocol=2)
    with pytest.raises(InvalidData, match=SECOND):
        read_checkpoint(folder)
    assert not proof.exists()
    # The file does run when it is read carelessly.
    pickle.loads((folder / SECOND).read_bytes())  # noqa: S301
    assert proof.exists()


def test_weights_of_the_base_model_are_refused(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")  # what pyreft's trainer leaves when there are none
    read_checkpoint(folder)
    torch.save({"lm_head.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(InvalidData, match="weights of the base model"):
        read_checkpoint(folder)


def test_differing_layers_are_not_written(tmp_path: Path, shifts: Shifts) -> None:
    with pytest.raises(InvalidInput, match="same layers"):
        write_checkpoint(tmp_path, [shifts[0], ShiftTensors({1: shifts[1].layers[1]})])


# -- artefacts, and the commands ---------------------------------------------------------------


@pytest.fixture
def artefact(
    load: Callable[[str], BaseModel], make_artefact: Callable[..., Artefact], tmp_path: Path
) -> Artefact:
    made = make_artefact(load("llama"))
    made.save(tmp_path / "artefact")
    return made


def test_import_then_export_and_back(
    tmp_path: Path, artefact: Artefact, model_folder: Callable[[str], Path]
) -> None:
    run_app("export", "--format", "pyreft", "--artefact", tmp_path / "artefact", "--out", tmp_path / "a")
    told = run_app(
        "import", "--format", "pyreft", "--checkpoint", tmp_path / "a", "--model", model_folder("llama"),
        "--task", "news_headline", "--positions", "f3+l3", "--out", tmp_path / "made", "--json",
    )  # fmt: skip
    made = Artefact.load(tmp_path / "made")
    assert (made.spec, made.fingerprint) == (artefact.spec, artefact.fingerprint)
    assert made.collective.digest() == artefact.collective.digest()
    assert made.seed.digest() == artefact.seed.digest()
    assert json.loads(told)["version"] == made.version
    run_app("export", "--artefact", tmp_path / "made", "--out", tmp_path / "b")
    assert same_states(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_one_shift_alone(tmp_path: Path, artefact: Artefact, model_folder: Callable[[str], Path]) -> None:
    for which, its in (("collective", artefact.collective), ("personal", artefact.seed)):
        out = tmp_path / which
        run_app("export", "--artefact", tmp_path / "artefact", "--out", out, "--shift", which)
        assert [s.digest() for s in read_checkpoint(out).shifts] == [its.digest()]
        run_app(
            "import", "--checkpoint", out, "--model", model_folder("llama"), "--task", "news_headline",
            "--positions", "l2", "--shift", which, "--out", tmp_path / f"{which}.artefact",
        )  # fmt: skip
        made = Artefact.load(tmp_path / f"{which}.artefact")
        kept, lacking = (
            (made.collective, made.seed) if which == "collective" else (made.seed, made.collective)
        )
        assert kept.digest() == its.digest()
        # What the checkpoint lacks changes nothing.
        assert all(np.array_equal(s.source, s.rotation) and not s.bias.any() for s in lacking.layers.values())


def test_a_users_shift_to_pyreft_and_back(tmp_path: Path, artefact: Artefact) -> None:
    mine = random_shift(artefact.spec, 3, seed=9)
    (tmp_path / "mine").write_bytes(mine.to_bytes())
    given = ("--artefact", tmp_path / "artefact")
    run_app("export", *given, "--personal", tmp_path / "mine", "--out", tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    run_app("import", *given, "--checkpoint", tmp_path / "p", "--out", tmp_path / "back")
    back = (tmp_path / "back").read_bytes()
    assert ShiftTensors.from_bytes(back, artefact.spec, 3).digest() == mine.digest()
    assert read_metadata(back)["version"] == artefact.version
    assert (tmp_path / "back").stat().st_mode & 0o077 == 0
    # That file names its artefact, so another one's export refuses it.
    other = Artefact.load(tmp_path / "artefact")
    object.__setattr__(other, "seed", mine)
    other.save(tmp_path / "other")
    with pytest.raises(PerfitError, match="another artefact"):
        run_app(
            "export", "--artefact", tmp_path / "other", "--personal", tmp_path / "back",
            "--out", tmp_path / "q",
        )  # fmt: skip


def test_a_users_shift_over_another_collective_shift_is_refused(
    tmp_path: Path, artefact: Artefact, folder: Path
) -> None:
    with pytest.raises(PerfitError, match="another collective shift"):
        run_app(
            "import", "--artefact", tmp_path / "artefact", "--checkpoint", folder, "--out", tmp_path / "x"
        )


def test_mending_is_told(tmp_path: Path, folder: Path, model_folder: Callable[[str], Path]) -> None:
    change_state(folder, FIRST, lambda s: s.update(rotate_layer=s["rotate_layer"].bfloat16()))
    told = run_app(
        "import", "--checkpoint", folder, "--model", model_folder("llama"), "--task", "news_headline",
        "--positions", "l2", "--out", tmp_path / "made",
    )  # fmt: skip
    assert "replaced by the nearest orthonormal ones" in told
    assert Artefact.load(tmp_path / "made").card["imported"]["mended"] > 1e-4


def test_a_model_that_cannot_carry_it_is_refused(
    tmp_path: Path, shifts: Shifts, model_folder: Callable[[str], Path]
) -> None:
    model, task = describe_model(str(model_folder("llama"))), task_named("news_headline")
    write_checkpoint(tmp_path, [ShiftTensors({9: shifts[0].layers[1]})])
    with pytest.raises(InvalidData, match=r"config.json has layer 9, .* has blocks 0 to 3"):
        to_artefact(read_checkpoint(tmp_path), model=model, task=task, positions="l2")
    narrow = ShiftSpec((1,), "l3", 2, 2, hidden_size=16)
    write_checkpoint(tmp_path, [random_shift(narrow, 2, seed=0)])
    with pytest.raises(InvalidData, match="hidden size 16"):
        to_artefact(read_checkpoint(tmp_path), model=model, task=task, positions="l2")


def test_positions_are_not_guessed(tmp_path: Path, folder: Path, model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidInput, match="--positions"):
        run_app(
            "import", "--checkpoint", folder, "--model", model_folder("llama"), "--task", "news_headline",
            "--out", tmp_path / "made",
        )  # fmt: skip
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(tmp_path: Path, artefact: Artefact, folder: Path) -> None:
    before = states(folder)
    with pytest.raises(InvalidInput, match="no empty folder"):
        run_app("export", "--artefact", tmp_path / "artefact", "--out", folder)
    assert states(folder).keys() == before.keys()


# -- pyreft itself -----------------------------------------------------------------------------


def peer(*words: str | Path) -> None:
    if not PEER.is_file():
        pytest.skip("no environment with pyreft; `make peers` builds it")
    script = ROOT / "scripts" / "peers" / "run_pyreft.py"
    subprocess.run([str(PEER), "-W", "ignore", str(script), *map(str, words)], check=True)


def questions(base: BaseModel, positions: str, path: Path) -> list[list[int]]:
    """Prompts of 2 to 40 tokens, written with their locations for pyreft."""
    rng = np.random.default_rng(3)
    vocabulary = base.model.config.vocab_size
    prompts = [rng.integers(3, vocabulary, length).tolist() for length in (2, 5, 9, 17, 40)]
    locations = [Positions.parse(positions).indices(len(prompt)) for prompt in prompts]
    path.write_text(json.dumps({"prompts": prompts, "locations": locations}))
    return prompts


def our_logits(
    base: BaseModel, prompt: list[int], positions: str, shifts: tuple[ShiftTensors, ...]
) -> np.ndarray:
    groups = []
    if shifts:
        index, valid = row_index([Positions.parse(positions).indices(len(prompt))], base.device)
        first, *rest = (to_torch(shift, base.device) for shift in shifts)
        groups = [Group(index, valid, first, rest[0] if rest else None)]
    with torch.no_grad(), hooked(base.model, range(base.blocks)), open_book(groups):
        return base.model(torch.tensor([prompt])).logits[0].float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("newslm", marks=pytest.mark.brief)])
def test_pyreft_gives_our_logits(
    name: str, tmp_path: Path, model_folder: Callable[[str], Path], brief: Path
) -> None:
    folder = brief / "models" / name if name == "newslm" else model_folder(name)
    base = load_base(str(folder), dtype="float32")
    spec = ShiftSpec((1, 2), "f7+l7", 6, 3, base.hidden_size)
    pair = (random_shift(spec, 6, seed=1, size=0.1), random_shift(spec, 3, seed=2, size=0.1))
    prompts = questions(base, spec.positions, tmp_path / "input.json")
    seen = []
    for shifts in ((), pair[:1], pair):
        flags: list[str | Path] = []
        if shifts:
            checkpoint = tmp_path / f"checkpoint{len(shifts)}"
            checkpoint.mkdir()
            write_checkpoint(checkpoint, shifts)
            flags = ["--checkpoint", checkpoint]
        out = tmp_path / f"{len(shifts)}.npz"
        peer("logits", "--model", folder, *flags, "--input", tmp_path / "input.json", "--out", out)
        theirs = dict(np.load(out))
        seen.append(theirs)
        for i, prompt in enumerate(prompts):
            ours = our_logits(base, prompt, spec.positions, shifts)
            assert np.abs(ours - theirs[str(i)]).max() < 1e-4, (len(shifts), len(prompt))
    # The shifts do something, each of them, and their order matters.
    swapped = our_logits(base, prompts[-1], spec.positions, pair[::-1])
    assert np.abs(swapped - seen[-1][str(len(prompts) - 1)]).max() > 1e-2
    for before, after in pairwise(seen):
        assert all(np.abs(before[i] - after[i]).max() > 1e-2 for i in before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_that_pyreft_trained(
    dtype: str, tmp_path: Path, load: Callable[[str], BaseModel], model_folder: Callable[[str], Path]
) -> None:
    folder, base, trained = model_folder("llama"), load("llama"), tmp_path / "trained"
    prompts = questions(base, "f7+l7", tmp_path / "input.json")
    peer(
        "train", "--model", folder, "--input", tmp_path / "input.json", "--out", trained,
        "--layers", "1", "2", "--ranks", "6", "3", "--dtype", dtype,
    )  # fmt: skip
    read = read_checkpoint(trained)
    assert (read.ranks, read.mended) == ((6, 3), 0.0)
    again = tmp_path / "again"
    again.mkdir()
    write_checkpoint(again, read.shifts)
    if dtype == "float32":
        assert same_states(trained, again)
        assert json.loads((trained / "config.json").read_text()) == json.loads(
            (again / "config.json").read_text()
        )
    else:  # values are, dtypes are not: ours are always float32
        old, new = states(trained), states(again)
        assert all(torch.equal(old[name][key].float(), new[name][key]) for name in old for key in old[name])
    peer(
        "logits", "--model", folder, "--checkpoint", trained, "--input", tmp_path / "input.json",
        "--out", tmp_path / "theirs.npz",
    )  # fmt: skip
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    for i, prompt in enumerate(prompts):
        assert np.abs(our_logits(base, prompt, "f7+l7", read.shifts) - theirs[str(i)]).max() < 1e-4
