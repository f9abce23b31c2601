"""Fixtures of the service: its authority, engines on a tiny model, servers over them, and streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, opening
from tests.support.ask_calls import ask_threads
from tests.support.authority import open_authority
from tests.support.cloud import SETTINGS, Device, Running, own_keys
from tests.support.fleet import Fleet
from tests.support.hostile import Honest
from tests.support.lamp_files import LORA_STAGE_1, TASK, write_files
from tests.support.lamp_requests import task_data
from tests.support.pyreft import Shifts, random_shifts, written
from tests.support.waiting import wait_for

from local_postgres import Cluster
from perfit_cloud.cli.roles import sealing_keys
from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.memory import plan_memory
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_cloud.service.server import CloudServer
from perfit_cloud.service.settings import ServerParts

if TYPE_CHECKING:  # it needs psycopg
    from perfit_cloud.service.identity.postgres_store import PostgresStore


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


@pytest.fixture
def database(cluster: Cluster) -> str:
    """An empty one of its own."""
    return cluster.database()


@pytest.fixture
def open_postgres() -> Iterator[Callable[[str], PostgresStore]]:
    """Opens the store behind a connection string, again at every call; all are closed at the end."""
    from perfit_cloud.service.identity.postgres_store import PostgresStore

    with ExitStack() as stores:
        yield lambda conninfo: stores.enter_context(closing(PostgresStore(conninfo)))


@pytest.fixture
def fleet(
    tmp_path: Path,
    database: str,
    base: BaseModel,
    artefact: Artefact,
    generation: GenerationEngine,
    step_queue: GradientScheduler,
) -> Iterator[Fleet]:
    def parts(config: CloudConfig, authenticator: Authenticator) -> ServerParts:
        catalog = Catalog.build(config, base, [artefact], authenticator.cloud_id)
        return ServerParts(
            authenticator=authenticator,
            issuer=None,
            catalog=catalog,
            generation=generation,
            scheduler=step_queue,
            memory=plan_memory(config, catalog, process=0, continuous=True, machine=2**34),
            roles=config.roles,
            sealing_keys=sealing_keys(authenticator, config),
        )

    made = Fleet(tmp_path, database, parts)
    yield made
    made.close()


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
def lora_run(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of lora-c on invented LaMP files: a collective LoRA on all blocks."""
    data, out = write_files(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("lora")
    request = LampRequest(TASK, "tiny", data, out, method="lora-c", batch_size=4, **LORA_STAGE_1)
    METHODS["lora-c"](request, task_data(data, base)).prepare(lambda: False)
    return out


@pytest.fixture
def method_request(
    tmp_path: Path, base: BaseModel, make_artefact: Callable[..., Artefact], lora_run: Path
) -> Callable[..., LampRequest]:
    """Of a method by its name; those that take an artefact or a collective LoRA are given one."""

    def make(method: str = "perfit", **changes: Any) -> LampRequest:
        values: dict[str, Any] = {
            "task": TASK,
            "model": "tiny",
            "data": write_files(tmp_path / "data"),
            "out": tmp_path / "out",
            "epochs": 2,
            "learning_rate": 1e-2,
            "batch_size": 4,
            "users_together": 2,
            "lora": lora_run,
        }
        if "artefact" in METHODS[method].options:
            make_artefact(base).save(tmp_path / "artefact")
            values["artefact"] = tmp_path / "artefact"
        else:
            values |= {"layers": (1,), "positions": "l2", "collective_rank": 2, "personal_rank": 1}
        return LampRequest(method=method, **(values | changes)).without_unused()

    return make


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
        sealing_keys: Callable[[Authority], ReplicaKeys] = own_keys,
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
        memory = plan_memory(config, catalog, process=0, continuous=True, machine=2**34)
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
            sealing_keys=sealing_keys(authority) if config.front_address else None,
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
