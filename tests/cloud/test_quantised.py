"""Folders of quantised weights: loaded where transformers unpacks them here, refused by name where not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.as_alone import assert_as_alone
from tests.support.gguf_files import gguf_model
from tests.support.gradients import OF_TOKENIZER, assert_equal, autograd, person
from tests.support.models import tiny_tokenizer

from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.base import load_base
from perfit_shared.errors import InvalidData
from perfit_shared.types import Mode

BLOCK = 16
LARGEST = 448  # of float8_e4m3fn


@pytest.fixture
def quantised(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A copy of the tiny Llama whose configuration says how it is quantised."""

    def make(how: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(model_folder("llama"), tmp_path / how["quant_method"]))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
        return folder

    return make


def to_float8(folder: Path) -> dict[str, torch.Tensor]:
    """Write the projections in blocks of float8 with a scale each; returns what they hold."""
    weights, held = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights[name].shape
        blocks = weights[name].view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / LARGEST
        wide = scales[:, None, :, None]
        weights[name] = (blocks / wide).to(torch.float8_e4m3fn).reshape(rows, columns)
        weights[f"{name}_scale_inv"] = scales
        held[name] = (weights[name].float().view_as(blocks) * wide).reshape(rows, columns)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_is_unpacked(dtype: str, quantised: Any, make_artefact: Any) -> None:
    """And then answers and is differentiated as any model is."""
    folder = quantised(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    )
    held = to_float8(folder)
    base = load_base(str(folder), dtype=dtype)
    weights = dict(base.model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert len(held) == 28 and all(
        torch.allclose(weights[name].float(), wanted, rtol=1e-2, atol=1e-4) for name, wanted in held.items()
    )
    if dtype == "bfloat16":
        return
    assert_as_alone(base, make_artefact(base))


@pytest.mark.parametrize(
    ("how", "package"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "gptqmodel"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_wants_a_package_is_refused_before_weights_are_read(
    how: dict[str, Any], package: str, quantised: Any
) -> None:
    if util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed here")
    folder = quantised(how)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InvalidData, match=package) as caught:
        load_base(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_four_bits_of_bitsandbytes_answer_and_are_differentiated(tmp_path: Path, make_artefact: Any) -> None:
    """Of a model that is wide enough for its blocks of 64."""
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, folder = tmp_path / "plain", tmp_path / "bits"
    gguf_model("llama", "F32", hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(plain)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four, dtype=torch.float32)
    packed.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base = load_base(str(folder), dtype="float32")
    artefact = make_artefact(base)
    gradients, mine = GradientEngine(base), person(artefact, 3)
    try:
        got = gradients.gradient(OF_TOKENIZER, ShiftUse(Mode.PERSONAL, artefact, mine))
    finally:
        gradients.close()
    assert_equal(got, autograd(base, artefact, mine, OF_TOKENIZER), 1e-3)
