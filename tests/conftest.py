"""Tiny random models of each family, built once a session; nothing is downloaded."""

from __future__ import annotations

import hmac
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Tensors this small lose more to waking threads than they gain; on a busy machine a hundred times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start serve in float32 on every processor, as the tests' own do (`_plain_precision`).
os.environ["PERFIT_CLOUD_DTYPE"] = "float32"

import pytest

from perfit_shared.grpc_environment import prepare_grpc
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from tests.support.models import FAMILIES, random_shift, tiny_config, tiny_tokenizer

prepare_grpc()  # gRPC is imported by the tests' own modules

if TYPE_CHECKING:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import BaseModel

BRIEF = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    # A shell that starts us in the background makes us ignore Ctrl-C, and with us every command
    # that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not BRIEF.is_dir():
        skip = pytest.mark.skip(reason="the data folder `shared` does not lie beside this checkout")
        for item in items:
            if "brief" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def brief() -> Path:
    """The folder with data and models beside the checkout; mark such tests with `brief`."""
    return BRIEF


@pytest.fixture(scope="session", autouse=True)
def _plain_precision() -> Iterator[None]:
    """What a test does not say is float32, also where the processor is fast in bfloat16."""
    from perfit_cloud.model import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_features", list)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of a family, made on first use."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            import torch
            from transformers import AutoModelForCausalLM

            tokenizer = tiny_tokenizer()
            torch.manual_seed(list(FAMILIES).index(family))
            model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer)))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def load(model_folder: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """The loaded tiny model of a family, once a session."""
    from perfit_cloud.model.base import load_base

    loaded: dict[str, BaseModel] = {}

    def make(family: str) -> BaseModel:
        if family not in loaded:
            loaded[family] = load_base(str(model_folder(family)))
        return loaded[family]

    return make


@pytest.fixture(scope="session")
def make_artefact() -> Callable[..., Artefact]:
    """An artefact with random, effective tensors for a base model."""
    from perfit_cloud.model.artefacts import Artefact
    from perfit_shared.tasks import Task

    def make(
        base: BaseModel,
        name: str = "news_headline",
        *,
        positions: str = "f3+l3",
        layers: tuple[int, ...] = (1, 2),
        seed: int = 0,
        ranks: tuple[int, int] = (6, 3),
    ) -> Artefact:
        spec = ShiftSpec(layers, positions, *ranks, hidden_size=base.hidden_size)
        return Artefact(
            name=name,
            spec=spec,
            task=Task(name, "{text} so", " {title}", "rouge_1"),
            fingerprint=base.fingerprint,
            collective=random_shift(spec, ranks[0], seed),
            seed=ShiftTensors.identity(spec, ranks[1], seed),
            learning_rate=5e-3,
            epochs=2,
            batch_size=4,
        )

    return make


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What is compared in constant time from here on."""
    pairs: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        pairs.append((bytes(one), bytes(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    return pairs
