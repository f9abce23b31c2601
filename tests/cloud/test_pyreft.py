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
from tests.support.pyreft import FIRST, SECOND, Shifts, change_state, states

from perfit_cloud.model.pyreft import read_checkpoint, write_checkpoint
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.shifts import ShiftTensors


def change_config(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))


# -- the format --------------------------------------------------------------------------------


def test_written_as_pyreft_writes(checkpoint: Path, pyreft_shifts: Shifts) -> None:
    # As pyreft 0.1.0 with pyvene 0.1.8 saved the like; the slow test asks pyreft itself.
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["sorted_keys"] == [
        "layer_1_comp_block_output_unit_pos_nunit_1#0",
        "layer_2_comp_block_output_unit_pos_nunit_1#0",
        "layer_1_comp_block_output_unit_pos_nunit_1#1",
        "layer_2_comp_block_output_unit_pos_nunit_1#1",
    ]
    assert config["representations"][2] == [1, "block_output", "pos", 1, 3, *[None] * 9]
    assert config["intervention_types"] == ["<class 'pyreft.interventions.LoreftIntervention'>"] * 4
    assert config["intervention_dimensions"] == [32] * 4
    state = states(checkpoint)[SECOND]
    assert list(state) == ["weight", "bias", "rotate_layer"]
    assert np.array_equal(state["weight"].numpy(), pyreft_shifts[1].layers[2].source)
    assert np.array_equal(state["rotate_layer"].numpy().T, pyreft_shifts[1].layers[2].rotation)


@pytest.mark.parametrize("count", [1, 2])
def test_read_back_bit_for_bit(tmp_path: Path, pyreft_shifts: Shifts, count: int) -> None:
    write_checkpoint(tmp_path, pyreft_shifts[:count])
    read = read_checkpoint(tmp_path)
    assert [s.digest() for s in read.shifts] == [s.digest() for s in pyreft_shifts[:count]]
    assert (read.ranks, read.layers, read.hidden_size, read.mended) == ((6, 3)[:count], (1, 2), 32, 0.0)


def test_order_of_layers_in_config_is_free(checkpoint: Path, pyreft_shifts: Shifts) -> None:
    def swap(config: dict[str, Any]) -> None:
        rows = config["representations"]
        config["representations"] = [rows[1], rows[3], rows[0], rows[2]]

    change_config(checkpoint, swap)
    assert [s.digest() for s in read_checkpoint(checkpoint).shifts] == [s.digest() for s in pyreft_shifts]


def test_rounded_values_are_taken_and_rotations_mended(checkpoint: Path, pyreft_shifts: Shifts) -> None:
    change_state(checkpoint, SECOND, lambda s: s.update({k: v.bfloat16() for k, v in s.items()}))
    read = read_checkpoint(checkpoint)
    assert 1e-4 < read.mended < 1e-2
    (rotation, source, _), old = read.shifts[1].layers[2], pyreft_shifts[1].layers[2]
    assert np.array_equal(source, torch.tensor(old.source).bfloat16().float().numpy())
    assert np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-6
    assert np.abs(rotation - old.rotation).max() < 2e-3
    # The other files keep every bit.
    assert np.array_equal(read.shifts[1].layers[1].rotation, pyreft_shifts[1].layers[1].rotation)
    assert read.shifts[0].digest() == pyreft_shifts[0].digest()


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
def test_bad_tensors_are_refused_by_file_and_key(checkpoint: Path, what: str) -> None:
    change, message = BAD_STATES[what]
    change_state(checkpoint, SECOND, change)
    with pytest.raises(InvalidData) as caught:
        read_checkpoint(checkpoint)
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
def test_bad_configurations_are_refused(checkpoint: Path, what: str) -> None:
    change, message = BAD_CONFIGS[what]
    change_config(checkpoint, change)
    with pytest.raises(InvalidData) as caught:
        read_checkpoint(checkpoint)
    assert message in str(caught.value)
    assert str(checkpoint) in str(caught.value)


def test_ranks_that_differ_between_layers_are_refused(checkpoint: Path) -> None:
    def halve(state: dict[str, Any]) -> None:
        state.update(
            weight=state["weight"][:3].clone(),
            bias=state["bias"][:3].clone(),
            rotate_layer=state["rotate_layer"][:, :3].clone(),
        )

    change_state(checkpoint, FIRST, halve)
    change_config(checkpoint, cell(0, 4, 3))
    with pytest.raises(InvalidData, match="#0 have different ranks"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"PK\x03\x04", None])
def test_damaged_and_missing_files_are_refused(checkpoint: Path, content: bytes | None) -> None:
    if content is None:
        (checkpoint / SECOND).unlink()
    else:
        (checkpoint / SECOND).write_bytes(content)
    with pytest.raises(InvalidData, match=SECOND):
        read_checkpoint(checkpoint)


class Hostile:
    """What unpickling runs."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_code_in_a_file_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    with (checkpoint / SECOND).open("wb") as file:
        pickle.dump({"weight": Hostile(proof)}, file, protocol=2)
    with pytest.raises(InvalidData, match=SECOND):
        read_checkpoint(checkpoint)
    assert not proof.exists()
    # The file does run when it is read carelessly.
    pickle.loads((checkpoint / SECOND).read_bytes())  # noqa: S301
    assert proof.exists()


def test_weights_of_the_base_model_are_refused(checkpoint: Path) -> None:
    torch.save({}, checkpoint / "pytorch_model.bin")  # what pyreft's trainer leaves when there are none
    read_checkpoint(checkpoint)
    torch.save({"lm_head.weight": torch.ones(2)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(InvalidData, match="weights of the base model"):
        read_checkpoint(checkpoint)


def test_differing_layers_are_not_written(tmp_path: Path, pyreft_shifts: Shifts) -> None:
    with pytest.raises(InvalidInput, match="same layers"):
        write_checkpoint(tmp_path, [pyreft_shifts[0], ShiftTensors({1: pyreft_shifts[1].layers[1]})])
