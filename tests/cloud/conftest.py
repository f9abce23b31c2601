"""Fixtures of the service: its authority, engines on a tiny model, servers over them, and streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cloud.serving import SETTINGS, Device, Running
from tests.cloud.test_authority import open_authority
from tests.cloud.test_service_adapt import EXAMPLES, Stream, examples, opening

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.batch import GradientEngine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.memory import plan_memory
from perfit_cloud.service.server import CloudServer


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return open_authority(tmp_path / "state")


@pytest.fixture
def wrong_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the machine's clock ahead, or back."""
    real = time.time

    def set_to(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return set_to


@pytest.fixture
def clock(wrong_clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass."""
    real = time.monotonic

    def forward(seconds: float) -> None:
        wrong_clock(seconds)
        monkeypatch.setattr(time, "monotonic", lambda: real() + seconds)

    return forward


@pytest.fixture(scope="module")
def base(load: Callable[[str], BaseModel]) -> BaseModel:
    return load("llama")


@pytest.fixture(scope="module")
def artefact(base: BaseModel, make_artefact: Callable[..., Artefact]) -> Artefact:
    return make_artefact(base)


@pytest.fixture(scope="module")
def generation(base: BaseModel, artefact: Artefact) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(base, {artefact.name: artefact}, SETTINGS)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def gradients(base: BaseModel) -> Iterator[GradientEngine]:
    engine = GradientEngine(base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def step_queue(base: BaseModel) -> Iterator[GradientScheduler]:
    queue = GradientScheduler(UpdateEngine(base, keep_bytes=2**26))
    yield queue
    queue.close()


@pytest.fixture
def run(
    tmp_path: Path,
    base: BaseModel,
    artefact: Artefact,
    generation: GenerationEngine,
    gradients: GradientEngine,
    step_queue: GradientScheduler,
) -> Iterator[Callable[..., Running]]:
    """Start a server; keyword arguments change its configuration or put a stand-in for an engine."""
    started: list[Running] = []

    def start(
        *,
        engine: Any = None,
        gradient_engine: Any = None,
        steps: Any = None,
        engines: Any = None,
        ended: Callable[[], None] = lambda: None,
        **change: Any,
    ) -> Running:
        settings: dict[str, Any] = {
            "state": tmp_path / f"state{len(started)}",
            "address": "127.0.0.1:0",
            "enrol_address": "127.0.0.1:0",
            "drain_seconds": 2,
            "cache_tokens": SETTINGS.cache_tokens,
        }
        config = CloudConfig(**{**settings, **change})
        authority = Authority(
            config.state, certificate_seconds=config.certificate_seconds, lapse_seconds=config.lapse_seconds
        )
        served = Catalog.build(config, base, [artefact], authority.cloud_id)
        memory = plan_memory(config, served, process=0, continuous=True)
        server = CloudServer(
            config,
            authority=authority,
            served=served,
            generation=engine or generation,
            gradients=gradient_engine or gradients,
            steps=steps or step_queue,
            memory=memory,
            engines=engines,
            ended=ended,
        )
        server.start()
        started.append(Running(config, authority, server))
        return started[-1]

    yield start
    for running in started:
        for channel in running.channels:
            channel.close()
        running.server.stop(0)
        running.authority.close()


@pytest.fixture
def stream(artefact: Artefact) -> Iterator[Callable[..., Stream]]:
    """A stream whose examples are sent."""
    made: list[Stream] = []

    def start(device: Device, pairs: Sequence[tuple[str, str]] = EXAMPLES) -> Stream:
        made.append(Stream(device, opening(artefact), examples(pairs)))
        return made[-1]

    yield start
    for each in made:
        each.end()
        each.call.cancel()
