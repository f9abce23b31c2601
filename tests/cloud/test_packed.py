"""Linear layers with packed weights: the same answers, and gradients as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.engine_subject import SMALL
from tests.support.models import build, random_artefact, random_shift
from torch import nn

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model import packed
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.types import Mode, Sampling


@pytest.fixture(scope="module")
def base(model_folder: Callable[[str], Path]) -> BaseModel:
    return load_base(str(model_folder("llama")), dtype="bfloat16")


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """Shapes of what packed weights multiply from here on."""
    seen: list[torch.Size] = []
    product = packed._product

    def counted(rows: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(rows.shape)
        return product(rows, *more)

    monkeypatch.setattr(packed, "_product", counted)
    yield seen


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is nn.Linear]


def test_packed_products_are_pytorch_s_own_within_rounding(base: BaseModel, multiplied: list[Any]) -> None:
    model = base.share_weights()
    packed.pack_linear_layers(model)
    draw = torch.Generator().manual_seed(1)
    for layer, plain in zip(linear_layers(model), linear_layers(base.model), strict=True):
        for count in (1, 2, 33):
            rows = torch.randn(1, count, layer.in_features, generator=draw).to(torch.bfloat16)
            with torch.no_grad():
                torch.testing.assert_close(layer(rows), plain(rows), rtol=2**-7, atol=2**-7)
    assert len(multiplied) == 1 + 3 * len(linear_layers(model))  # and the trial


def test_the_model_that_it_shares_weights_with_is_left_alone(base: BaseModel, multiplied: list[Any]) -> None:
    packed.pack_linear_layers(base.share_weights())
    del multiplied[:]
    with torch.no_grad():
        base.model(torch.tensor([[0, 5, 6]]))
    assert not multiplied


def test_gradients_flow_as_before(base: BaseModel) -> None:
    model = base.share_weights()
    packed.pack_linear_layers(model)
    found = []
    for each in (model, base.model):
        layer = linear_layers(each)[0]
        rows = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
        rows = rows.to(torch.bfloat16).requires_grad_()
        layer(rows).float().square().sum().backward()
        found.append(rows.grad)
    assert found[0] is not None
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_an_engine_packs_unless_it_is_told_not_to_and_answers_alike(
    base: BaseModel, multiplied: list[Any]
) -> None:
    artefact = random_artefact(base)
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, artefact.spec.personal_rank, 4))
    answers = []
    for packs in (True, False):
        del multiplied[:]
        settings = replace(SMALL, pack_weights=packs)
        engine = build_engine(base, {artefact.name: artefact}, settings, name="own")
        answers.append([*engine.submit([0, 5, 6, 7, 8], use, Sampling(12))])
        engine.stop()
        assert bool(multiplied) == packs
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_bfloat16_is_packed(dtype: str, multiplied: list[Any]) -> None:
    base = build("llama", dtype)
    assert packed.packed_bytes(base.model) == 0
    packed.pack_linear_layers(base.share_weights())
    assert not multiplied


def test_what_is_added_is_a_copy_of_each_weight(base: BaseModel) -> None:
    expected = sum(2 * layer.weight.numel() for layer in linear_layers(base.model))
    assert packed.packed_bytes(base.model) == expected > 0
    model = base.share_weights()
    packed.pack_linear_layers(model)
    assert packed.packed_bytes(model) == 0, "none is packed twice"


@pytest.mark.parametrize("fault", ["raises", "is another"])
def test_where_pytorch_packs_otherwise_its_own_products_stay(
    fault: str, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(rows: torch.Tensor, *_: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no such operator")
        return rows.new_zeros(())

    monkeypatch.setattr(packed, "_product", product)
    model = base.share_weights()
    packed.pack_linear_layers(model)
    with torch.no_grad():
        ids = torch.tensor([[0, 5, 6]])
        torch.testing.assert_close(model(ids).logits, base.model(ids).logits, rtol=0, atol=0)
