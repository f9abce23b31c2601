"""Shifts as a pyreft 0.1.0 checkpoint, and back.

config.json     what is intervened on, and in which order
intkey_layer_{l}_comp_block_output_unit_pos_nunit_1#{k}.bin
                a LoReFT intervention: weight (r, d) is our W, bias (r) our b, rotate_layer (d, r) our Rᵀ

Interventions of one layer run in the order of config.json: #0 is φ₁ and #1 is φ₂, so that pyreft
computes φ₂(φ₁(x)) too. All arrays are float32 and keep every bit. The folder says nothing about
positions: pyreft gets them with each batch. Nor does it say whether the first and the last tokens
share weights, as ours do.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import open_model
from perfit_shared.errors import InvalidData, InvalidInput, InvalidTensors, ShiftMismatch
from perfit_shared.files import write_whole
from perfit_shared.presets import preset_for, preset_name
from perfit_shared.shifts import NORM_CAP, LayerShift, ShiftTensors, read_metadata
from perfit_shared.tasks import Task

__all__ = [
    "Checkpoint",
    "ModelFacts",
    "describe_model",
    "personal_file",
    "read_checkpoint",
    "read_personal",
    "to_artefact",
    "write_checkpoint",
]

_CONFIG = "config.json"
_LOREFT = "<class 'pyreft.interventions.LoreftIntervention'>"
# A representation in config.json is a list, its names those of pyvene's RepresentationConfig.
_FIELDS = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
_FIXED = {"component": "block_output", "unit": "pos", "max_number_of_units": 1}  # of any φ of ours
_FREE = ("layer", "low_rank_dimension", *_FIXED)
_MOST = 2  # interventions of one layer: φ₁ and φ₂
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those that float32 holds exactly
# ‖RRᵀ − I‖ (Frobenius) at r = 32, d = 4096, as in ShiftTensors.check. Torch's Householder product
# stays under 3e-6 in float32; rounding R to bfloat16 gives 1.2e-3, and products with TF32 less.
_EXACT, _ROUNDED = 5e-6, 5e-3


@dataclass(frozen=True)
class Checkpoint:
    """What a pyreft folder holds. Every layer has the same interventions, in the order they run."""

    folder: Path
    shifts: tuple[ShiftTensors, ...]  # one or two, each of one rank
    ranks: tuple[int, ...]  # of each
    hidden_size: int
    mended: float  # largest ‖RRᵀ − I‖ (Frobenius) of a rotation made orthonormal again; 0: none was

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(self.shifts[0].layers))

    def check_model(self, model: ModelFacts) -> None:
        """Raise InvalidData unless the model has its layers and its hidden size."""
        if self.hidden_size != model.hidden_size:
            raise InvalidData(
                f"{self.folder} is for hidden size {self.hidden_size}, {model.name} has {model.hidden_size}"
            )
        if self.layers[-1] >= model.blocks:
            raise InvalidData(
                f"{self.folder / _CONFIG} has layer {self.layers[-1]}, {model.name} has blocks "
                f"0 to {model.blocks - 1}"
            )


@dataclass(frozen=True)
class ModelFacts:
    """What an artefact says about its base model."""

    name: str
    fingerprint: str
    blocks: int
    hidden_size: int


def describe_model(name_or_folder: str) -> ModelFacts:
    """Without loading its weights. Raises InvalidData when there is no usable model."""
    files = open_model(name_or_folder)
    try:
        with files.reading():
            config = files.config().get_text_config()
        blocks, hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        return ModelFacts(Path(name_or_folder).name, files.fingerprint(), blocks, hidden_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidData(f"{name_or_folder} holds no causal LM") from error


# -- writing -----------------------------------------------------------------------------------


def write_checkpoint(folder: Path, shifts: Sequence[ShiftTensors]) -> None:
    """Write one or two shifts over the same layers, in the order in which they are to run.

    config.json comes last and atomically, so a half-written folder is none. Raises InvalidInput on
    other numbers of shifts or differing layers.
    """
    if not 1 <= len(shifts) <= _MOST or any(set(s.layers) != set(shifts[0].layers) for s in shifts):
        raise InvalidInput("a checkpoint takes one or two shifts of the same layers")
    keys, representations = [], []
    for k, shift in enumerate(shifts):
        for layer, tensors in sorted(shift.layers.items()):
            keys.append(_key(layer, k))
            values = {"layer": layer, "low_rank_dimension": len(tensors.bias), **_FIXED}
            representations.append([values.get(field) for field in _FIELDS])
            torch.save(_state(tensors), folder / _file(keys[-1]))
    count, hidden_size = len(keys), len(next(iter(shifts[0].layers.values())).rotation[0])
    config = {
        "intervention_constant_sources": [True] * count,
        "intervention_dimensions": [hidden_size] * count,
        "intervention_types": [_LOREFT] * count,
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": keys,
        "transformers_version": "4.45.1",
    }
    write_whole(folder / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _key(layer: int, k: int) -> str:
    return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{k}"


def _file(key: str) -> str:
    return f"intkey_{key}.bin"


def _state(tensors: LayerShift) -> OrderedDict[str, Tensor]:
    """The state dict of pyreft's LoreftIntervention, keys in its order."""
    return OrderedDict(
        weight=torch.tensor(tensors.source),
        bias=torch.tensor(tensors.bias),
        rotate_layer=torch.tensor(tensors.rotation).T.contiguous(),
    )


# -- reading -----------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder that pyreft's `save` or `write_checkpoint` wrote.

    Rotations that float32 arithmetic explains stay bit for bit; those that were rounded to bfloat16
    are replaced by the nearest orthonormal ones. Raises InvalidData naming file and key for anything
    malformed, and for interventions that are no φ of ours.
    """
    ranks = _representations(folder)
    _check_base_untouched(folder)
    shifts, mended, hidden_size = [], 0.0, 0
    for k, by_layer in enumerate(ranks):
        layers = {}
        for layer, rank in sorted(by_layer.items()):
            path = folder / _file(_key(layer, k))
            tensors = _layer_shift(path, rank, hidden_size)
            hidden_size = tensors.rotation.shape[1]
            layers[layer], off = _orthonormal(tensors, path)
            mended = max(mended, off)
        shifts.append(ShiftTensors(layers))
        if len({len(t.bias) for t in layers.values()}) > 1:
            raise InvalidData(
                f"{folder / _CONFIG}: the interventions #{k} have different ranks at different layers; "
                "a shift has one rank"
            )
    sizes = tuple(len(next(iter(shift.layers.values())).bias) for shift in shifts)
    return Checkpoint(folder, tuple(shifts), sizes, hidden_size, mended)


def _representations(folder: Path) -> list[dict[int, int | None]]:
    """By #k, the rank that config.json gives each layer, None where it gives none."""
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        rows = [dict(zip(_FIELDS, row, strict=False)) for row in config["representations"]]
        types = list(config["intervention_types"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidData(f"{path} is not the configuration of a pyreft checkpoint") from error
    if not rows or types != [_LOREFT] * len(rows) or config.get("mode") != "parallel":
        raise InvalidData(f"{path}: every intervention should be a LoreftIntervention, in parallel mode")
    found: list[dict[int, int | None]] = []
    for i, row in enumerate(rows):
        layer, rank = _check_row(row, f"{path}: representation {i}")
        k = sum(layer in by_layer for by_layer in found)
        if k == len(found):
            found.append({})
        found[k][layer] = rank
    if len(found) > _MOST or any(by_layer.keys() != found[0].keys() for by_layer in found):
        raise InvalidData(f"{path}: every layer should have one intervention, or every layer two")
    return found


def _check_row(row: Mapping[str, Any], where: str) -> tuple[int, int | None]:
    """(layer, rank) of a representation that is a plain φ on a block's output."""
    layer, rank = row.get("layer"), row.get("low_rank_dimension")
    if type(layer) is not int or not 0 <= layer < 10_000:
        raise InvalidData(f"{where}: its layer should be a block's number")
    if rank is not None and type(rank) is not int:
        raise InvalidData(f"{where}: its low_rank_dimension should be a whole number")
    for field, value in _FIXED.items():
        if row.get(field) != value:
            raise InvalidData(f"{where}: its {field} should be {value}")
    for field in set(row) - set(_FREE):
        if row[field] is not None:
            raise InvalidData(f"{where}: it has a {field}, which shifts have not")
    return layer, rank


def _check_base_untouched(folder: Path) -> None:
    """pyreft may save trained weights of the base model beside the interventions."""
    path = folder / "pytorch_model.bin"
    if path.exists() and _load(path):
        raise InvalidData(f"{path} changes weights of the base model, which perfit leaves as it is")


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidData(f"{path} is missing") from error
    except Exception as error:  # torch may raise anything on a damaged file
        raise InvalidData(f"{path} is not a file of tensors") from error
    if not isinstance(state, dict):
        raise InvalidData(f"{path} holds no state dict")
    return state


def _layer_shift(path: Path, rank: int | None, hidden_size: int) -> LayerShift:
    """One file's tensors; a rank of None and a hidden size of 0 are any."""
    state = _load(path)
    if set(state) != {"weight", "bias", "rotate_layer"}:
        raise InvalidData(f"{path}: it should hold weight, bias and rotate_layer, and nothing else")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise InvalidData(f"{path}: {key} should be a float32, bfloat16 or float16 tensor")
        # A view may name far more numbers than the file holds.
        if tensor.numel() * tensor.itemsize > min(tensor.untyped_storage().nbytes(), path.stat().st_size):
            raise InvalidData(f"{path}: {key} claims more numbers than the file holds")
    weight = state["weight"]
    r, d = tuple(weight.shape) if weight.dim() == 2 else (0, 0)
    if not 0 < r <= d or r != (rank or r) or d != (hidden_size or d):
        wanted = f"({rank or 'r'}, {hidden_size or 'd'})"
        raise InvalidData(f"{path}: weight should have shape {wanted}, not {tuple(weight.shape)}")
    arrays = {}
    for key, shape in (("weight", (r, d)), ("bias", (r,)), ("rotate_layer", (d, r))):
        if tuple(state[key].shape) != shape:
            raise InvalidData(f"{path}: {key} should have shape {shape}, not {tuple(state[key].shape)}")
        array = arrays[key] = state[key].detach().float().numpy()
        if not np.isfinite(array).all():
            raise InvalidData(f"{path}: {key} holds NaN or infinity")
        if float(np.linalg.norm(array.astype(np.float64))) > NORM_CAP:
            raise InvalidData(f"{path}: {key} is too large to be a shift's")
    rotation = np.ascontiguousarray(arrays["rotate_layer"].T)
    return LayerShift(rotation, np.ascontiguousarray(arrays["weight"]), arrays["bias"])


def _orthonormal(tensors: LayerShift, path: Path) -> tuple[LayerShift, float]:
    """The same with orthonormal rows in R, and how far they were off; 0 if R was left alone."""
    wide = tensors.rotation.astype(np.float64)
    rank, hidden_size = wide.shape
    off = float(np.linalg.norm(wide @ wide.T - np.eye(rank)))
    scale = math.sqrt(4096 / hidden_size) * max(1.0, rank / 32)
    if off <= _EXACT * scale:
        return tensors, 0.0
    if off > _ROUNDED * scale:
        raise InvalidData(
            f"{path}: the columns of rotate_layer are not orthonormal (off by {off:.2g}, which no rounding "
            "explains; weight decay on torch's orthogonal parametrization is a way to lose them)"
        )
    left, _, right = np.linalg.svd(wide, full_matrices=False)
    mended = np.ascontiguousarray(left @ right, dtype=np.float32)  # the nearest, by Frobenius norm
    return tensors._replace(rotation=mended), off


# -- artefacts and personal shifts -------------------------------------------------------------


def to_artefact(
    read: Checkpoint,
    *,
    model: ModelFacts,
    task: Task,
    positions: str,
    which: str | None = None,
    personal_rank: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Artefact:
    """An artefact of the checkpoint, with the task's preset for what None is given for.

    `which`: "collective", "personal" or "both"; a shift that the checkpoint lacks is the identity.
    Raises InvalidInput when that cannot be, InvalidData when the checkpoint does not fit the model.
    """
    read.check_model(model)
    which = which or ("both" if len(read.shifts) == _MOST else "collective")
    if (which == "both") != (len(read.shifts) == _MOST):
        raise InvalidInput(
            f"{read.folder} has {len(read.shifts)} interventions a layer, so it is not {which}"
        )
    preset = preset_for(preset_name(task.name))
    spec = preset.spec(
        blocks=model.blocks,
        hidden_size=model.hidden_size,
        layers=read.layers,
        positions=positions,
        collective_rank=None if which == "personal" else read.ranks[0],
        personal_rank=personal_rank if which == "collective" else read.ranks[-1],
    )
    collective, seed = read.shifts[0], read.shifts[-1]
    if which == "personal":
        collective = ShiftTensors.identity(spec, spec.collective_rank)
    if which == "collective":
        seed = ShiftTensors.identity(spec, spec.personal_rank)
    return Artefact(
        name=task.name,
        spec=spec,
        task=task,
        fingerprint=model.fingerprint,
        collective=collective,
        seed=seed,
        batch_size=preset.batch_size,
        learning_rate=preset.learning_rate if learning_rate is None else learning_rate,
        epochs=preset.epochs if epochs is None else epochs,
        card={"model": model.name, "imported": {"format": "pyreft", "shift": which, "mended": read.mended}},
    )


def personal_file(read: Checkpoint, artefact: Artefact) -> bytes:
    """The checkpoint's personal shift as a shift file of the artefact.

    Raises ShiftMismatch when its spec is another, or when it runs after another collective shift.
    """
    if len(read.shifts) == _MOST and read.shifts[0].digest() != artefact.collective.digest():
        raise ShiftMismatch(f"{read.folder} was trained over another collective shift than {artefact.name}'s")
    personal = read.shifts[-1]
    try:
        personal.check(artefact.spec, artefact.spec.personal_rank)
    except InvalidTensors as error:
        raise ShiftMismatch(f"{read.folder} does not fit the artefact {artefact.name}: {error}") from error
    return personal.to_bytes(
        metadata={"artefact": artefact.name, "version": artefact.version, "task": artefact.task.name}
    )


def read_personal(path: Path, artefact: Artefact) -> ShiftTensors:
    """An exported personal shift, or one of a `lamp run`, which says nothing of its artefact.

    Raises InvalidData, InvalidTensors, or ShiftMismatch when it is another artefact's.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path}: cannot be read ({error.strerror})") from error
    try:
        version = read_metadata(data).get("version")
    except InvalidTensors:
        version = artefact.version
    if version != artefact.version:
        raise ShiftMismatch(f"{path} was trained for another artefact than {artefact.name} as it is here")
    try:
        return ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    except InvalidTensors as error:
        raise InvalidTensors(f"{path}: {error}") from error
