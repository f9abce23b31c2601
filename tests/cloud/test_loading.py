"""What is loaded is whole: no weight is left random, and what is no model is refused with what to do."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from perfit_cloud.cli.main import app
from perfit_cloud.model.base import load_base, open_model
from perfit_shared.errors import InvalidData

Weights = dict[str, torch.Tensor]
MLP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def change(folder: Path, how: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    made = how(weights)
    save_file(made or weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path | str) -> str:
    with pytest.raises(InvalidData) as caught:
        load_base(str(folder))
    return str(caught.value)


def test_missing_weights_are_refused_by_name(folder: Path) -> None:
    change(folder, lambda weights: weights.pop(MLP) is None)
    assert f"1 weights ({MLP}) are not in the checkpoint and would be random" in refused(folder)


def test_a_block_without_its_mlp_is_refused(folder: Path) -> None:
    change(folder, lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k})
    assert "3 weights (model.layers.1.mlp.down_proj.weight" in refused(folder)


@pytest.mark.parametrize(
    ("prefix", "advice"), [("base_model.model.", "merge_and_unload"), ("module.", "DataParallel")]
)
def test_names_of_a_wrapper_are_refused_with_what_to_do(folder: Path, prefix: str, advice: str) -> None:
    change(folder, lambda w: {prefix + k: v for k, v in w.items()})
    message = refused(folder)
    assert prefix in message and advice in message


def test_keys_none_of_which_fits_are_refused(folder: Path) -> None:
    change(folder, lambda w: {"other." + k: v for k, v in w.items()})
    assert "none of the checkpoint's weights fits" in refused(folder)


def test_weights_of_another_shape_are_refused_by_name(folder: Path) -> None:
    change(folder, lambda w: w.update({MLP: torch.zeros(3, 4)}))
    message = refused(folder)
    assert f"{MLP} [3, 4] where the model has [64, 32]" in message


@pytest.mark.parametrize(
    "key", ["model.layers.4.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.bias"]
)
def test_what_belongs_to_the_decoder_and_has_no_place_is_refused(folder: Path, key: str) -> None:
    change(folder, lambda w: w.update({key: torch.zeros(32)}))
    message = refused(folder)
    assert key in message and "belong to the decoder" in message


def test_other_parts_of_a_checkpoint_are_listed_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(
        folder,
        lambda w: w.update(
            {
                "vision_tower.patch.weight": torch.zeros(3),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            }
        ),
    )
    with caplog.at_level(logging.WARNING):
        load_base(str(folder))
    said = [record.message for record in caplog.records if "vision_tower" in record.message]
    assert len(said) == 1 and "inv_freq" not in said[0]


def test_tied_weights_are_not_missing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    change(folder, lambda w: w.pop("lm_head.weight") is None)
    base = load_base(str(folder))
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight


def test_the_fingerprint_is_of_what_is_loaded(folder: Path) -> None:
    """Not of other weight files that lie beside."""
    before = open_model(str(folder)).fingerprint()
    save_file({"x": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert open_model(str(folder)).fingerprint() == before
    change(folder, lambda w: w[MLP].add_(1) is None)
    assert open_model(str(folder)).fingerprint() != before


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "--set", "hardening=off", "--state"],
        ["collective", "train", "--task", "news_headline", "--data", "nowhere.jsonl", "--out"],
        ["lamp", "run", "--task", "news_headline", "--data", "nowhere", "--out"],
    ],
)
def test_every_command_refuses(command: list[str], folder: Path, tmp_path: Path) -> None:
    """They load in one place; data is made where a command reads it first."""
    change(folder, lambda weights: weights.pop(MLP) is None)
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps({"text": f"the cat {i}", "title": "sat"}) + "\n" for i in range(6)))
    command = [
        str(data) if part == "nowhere.jsonl" else str(tmp_path) if part == "nowhere" else part
        for part in command
    ]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--model", str(folder)])
    assert result.exit_code != 0
    assert isinstance(result.exception, InvalidData), result.exception
    assert MLP in str(result.exception)


# -- what is no model --------------------------------------------------------------------------------


def test_a_lora_folder_says_what_to_do(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/llama"}))
    message = refused(folder)
    assert "LoRA adapter for meta/llama" in message and "merge_and_unload" in message
    (folder / "config.json").unlink()
    assert "LoRA adapter" in refused(folder)


def test_a_file_and_an_empty_folder_say_what_to_name(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "name the folder" in refused(tmp_path / "weights.bin")
