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

from perfit_cloud.cli import start_up
from perfit_cloud.cli.roles import opened_identity
from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model import packed
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.service.settings import ServerParts
from perfit_shared.types import Mode, Sampling


@pytest.fixture(scope="module")
def base(model_folder: Callable[[str], Path]) -> BaseModel:
    return load_base(str(model_folder("llama")), dtype="bfloat16")


@pytest.fixture(autouse=True)
def _can_pack() -> None:
    if not packed.packed_bytes(build("llama", "bfloat16").model):
        pytest.skip("PyTorch cannot pack bfloat16 on this processor")


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
    assert len(multiplied) == 1 + 3 * len(linear_layers(model))  # and the trial's


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
        settings = replace(SMALL, pack_weights=packs)
        engine = build_engine(base, {artefact.name: artefact}, settings, name="own")
        del multiplied[:]  # the trial's
        answers.append([*engine.submit([0, 5, 6, 7, 8], use, Sampling(12))])
        engine.stop()
        assert bool(multiplied) == packs
    texts = ["".join(chunk.text for chunk in answer) for answer in answers]
    assert texts[0] == texts[1]
    lasts = [replace(answer[-1], text="") for answer in answers]  # how it ended, and the counts
    assert lasts[0] == lasts[1] and lasts[0].answer_tokens > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_bfloat16_is_packed(dtype: str, multiplied: list[Any]) -> None:
    base = build("llama", dtype)
    assert packed.packed_bytes(base.model) == 0
    packed.pack_linear_layers(base.share_weights())
    assert not multiplied


def test_what_is_added_is_a_copy_of_each_weight(base: BaseModel) -> None:
    expected = sum(2 * layer.weight.numel() for layer in linear_layers(base.model))
    assert packed.packed_bytes(base.model) == expected
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


@pytest.mark.parametrize(
    ("changed", "packs"),
    [
        ({}, True),
        ({"dtype": "float32"}, False),
        ({"roles": ("enrolment", "updates")}, False),
        ({"memory_bytes": 7 * 100_000}, False),  # more than an eighth of the ceiling
        ({"memory_bytes": 9 * 100_000}, True),
    ],
)
def test_a_server_packs_where_there_is_room_and_somebody_to_answer(
    changed: dict[str, Any],
    packs: bool,
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """And the plan of the memory knows of it."""
    planned: list[int] = []

    def plan_memory(config: CloudConfig, *args: Any, process: int, **more: Any) -> Any:
        planned.append(process)
        return plan(replace(config, memory_bytes=0), *args, process=process, **more)

    plan = start_up.plan_memory
    monkeypatch.setattr(start_up, "plan_memory", plan_memory)
    monkeypatch.setattr(start_up, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(start_up, "packed_bytes", lambda model: 100_000 * bool(packed.packed_bytes(model)))
    parts = loaded(CloudConfig(state=tmp_path, **({"dtype": "bfloat16"} | changed)), model_folder)
    assert parts.generation.settings.pack_weights == packs  # type: ignore[attr-defined]
    assert planned == [101_000 if packs else 1000]


def test_a_ceiling_without_room_for_packed_weights_is_planned_without_them(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start_up, "resident_bytes", lambda: 2**27)
    monkeypatch.setattr(start_up, "packed_bytes", lambda _: 2**29)
    monkeypatch.setattr(start_up, "_MOST_PACKED", 1.0)
    parts = loaded(CloudConfig(state=tmp_path, dtype="bfloat16", memory_bytes=2**30), model_folder)
    assert not parts.generation.settings.pack_weights  # type: ignore[attr-defined]
    assert parts.memory.process == 2**27


def loaded(config: CloudConfig, model_folder: Callable[[str], Path]) -> ServerParts:
    """As a server starts, stopped."""
    artefact = config.state / "artefact"
    random_artefact(load_base(str(model_folder("llama")))).save(artefact)
    config = replace(
        config, model=str(model_folder("llama")), artefacts=(str(artefact),), state=config.state / "state"
    )
    with opened_identity(config, lambda close: close()) as authenticator:
        parts, _ = start_up.load_parts(config, authenticator)
    parts.generation.stop()
    parts.scheduler.close()
    return parts
