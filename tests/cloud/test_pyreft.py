"""Shifts as pyreft checkpoints: bit for bit both ways, and refused when they are none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import random_shift

from perfit_cloud.model.pyreft import read_checkpoint, write_checkpoint
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.shifts import ShiftSpec, ShiftTensors

SPEC = ShiftSpec((1, 2), "f3+l3", collective_rank=6, personal_rank=3, hidden_size=32)
FIRST = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
SECOND = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#1.bin"
Shifts = tuple[ShiftTensors, ShiftTensors]


def random_shifts() -> Shifts:
    """φ₁ and φ₂."""
    return random_shift(SPEC, 6, seed=1), random_shift(SPEC, 3, seed=2)


def written(folder: Path) -> Path:
    """A checkpoint with φ₁ and φ₂."""
    folder.mkdir()
    write_checkpoint(folder, random_shifts())
    return folder


@pytest.fixture
def shifts() -> Shifts:
    return random_shifts()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "checkpoint")


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


# -- the format --------------------------------------------------------------------------------


def test_written_as_pyreft_writes(folder: Path, shifts: Shifts) -> None:
    # As pyreft 0.1.0 with pyvene 0.1.8 saved the like; the slow test asks pyreft itself.
    config = json.loads((folder / "config.json").read_text())
    assert config["sorted_keys"] == [
        "layer_1_comp_block_output_unit_pos_nunit_1#0",
        "layer_2_comp_block_output_unit_pos_nunit_1#0",
        "layer_1_comp_block_output_unit_pos_nunit_1#1",
        "layer_2_comp_block_output_unit_pos_nunit_1#1",
    ]
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
            weight=state["weight"][:3].clone(),
            bias=state["bias"][:3].clone(),
            rotate_layer=state["rotate_layer"][:, :3].clone(),
        )

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
