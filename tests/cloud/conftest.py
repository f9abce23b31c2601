"""Fixtures of the service: its authority, engines on a tiny model, servers over them, and streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, opening
from tests.support.ask_calls import ask_threads
from tests.support.authority import open_authority
from tests.support.cloud import SETTINGS, Device, Running
from tests.support.hostile import Honest
from tests.support.pyreft import Shifts, random_shifts, written
from tests.support.waiting import wait_for

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.memory import plan_memory
from perfit_cloud.service.server import CloudServer
from perfit_cloud.service.settings import ServerParts


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
def adaptations(base: BaseModel) -> UpdateEngine:
    return UpdateEngine(base, keep_bytes=2**26)


@pytest.fixture(scope="module")
def step_queue(adaptations: UpdateEngine) -> Iterator[GradientScheduler]:
    queue = GradientScheduler(adaptations)
    yield queue
    queue.close()


@pytest.fixture
def run(
    tmp_path: Path,
    base: BaseModel,
    artefact: Artefact,
    generation: GenerationEngine,
    step_queue: GradientScheduler,
) -> Iterator[Callable[..., Running]]:
    """Start a server; keyword arguments change its configuration or put a stand-in for an engine.

    `serves_only`: it enrols nobody, and the keys of the authorities are not in its state folder; `authority`
    is then another process's.
    """
    started: list[Running] = []
    opened: list[Authenticator] = []

    def start(
        *,
        serves_only: bool = False,
        engine: Any = None,
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
        catalog = Catalog.build(config, base, [artefact], authority.cloud_id)
        memory = plan_memory(config, catalog, process=0, continuous=True)
        authenticator: Authenticator = authority
        if serves_only:
            authority.write_serving_files(config.state, ["localhost", "127.0.0.1"])
            for name in ("server_ca.pem", "device_ca.pem"):
                (config.state / name).unlink()
            authenticator = Authenticator.open(config.state)
            opened.append(authenticator)
        parts = ServerParts(
            authenticator=authenticator,
            issuer=None if serves_only else authority,
            catalog=catalog,
            generation=engine or generation,
            scheduler=steps or step_queue,
            memory=memory,
            engines=engines,
            ended=ended,
        )
        server = CloudServer(config, parts)
        server.start()
        started.append(Running(config, authority, server))
        return started[-1]

    yield start
    for running in started:
        for channel in running.channels:
            channel.close()
        running.server.stop(0)
        running.authority.close()
    for authenticator in opened:
        authenticator.close()


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


@pytest.fixture
def honest(artefact: Artefact) -> Iterator[Callable[[Running], Honest]]:
    """Start an honest device beside a hostile one."""
    made: list[Honest] = []

    def start(running: Running) -> Honest:
        made.append(Honest(running, artefact))
        return made[-1]

    yield start
    for each in made:
        each.end()


@pytest.fixture
def no_ask_threads_stay() -> Iterator[None]:
    """However a stream ended, its threads end."""
    yield
    wait_for(lambda: ask_threads() == 0, what="the threads of Ask streams ended")


@pytest.fixture
def pyreft_shifts() -> Shifts:
    """φ₁ and φ₂."""
    return random_shifts()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A pyreft checkpoint with `pyreft_shifts`."""
    return written(tmp_path / "checkpoint")
