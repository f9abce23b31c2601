"""What an operator sees: metrics that are true and tell nothing of anybody, and health that is."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step
from tests.support.cloud import SETTINGS, TIMEOUT, Device, Running, failure, generate, personal
from tests.support.doubles import Drip, Played
from tests.support.waiting import wait_for

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.interface import EngineHealth, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.health import HealthMonitor
from perfit_cloud.service.telemetry import Engines, Telemetry
from perfit_shared.errors import ConfigError, Unavailable
from perfit_shared.types import Mode, Sampling
from perfit_shared.wire import personalization_pb2 as pb

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
BASE_USE = ShiftUse(Mode.BASE)
DEPLOY = Path(__file__).parents[2] / "deploy"


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def page(running: Running) -> str:
    with urllib.request.urlopen(f"http://{running.config.metrics_address}/metrics", timeout=TIMEOUT) as reply:
        return str(reply.read().decode())


def value(text: str, series: str) -> float:
    """Of one series, such as `perfit_calls_total{rpc="Score",status="OK"}`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    return float(line.rpartition(" ")[2])


@pytest.fixture
def engines(base: BaseModel, artefact: Artefact) -> Iterator[Engines]:
    device_lock = DeviceLock()
    generation = GenerationEngine(base, {artefact.name: artefact}, SETTINGS, device_lock)
    adaptations = UpdateEngine(base, keep_bytes=2**26, device_lock=device_lock)
    steps = GradientScheduler(adaptations)
    yield Engines(generation, steps, adaptations, device_lock)
    generation.stop()
    steps.close()


def over(engines: Engines) -> dict[str, Any]:
    """The same engines for a server to serve."""
    return {"engine": engines.generation, "steps": engines.scheduler, "engines": engines}


# -- metrics -------------------------------------------------------------------------------------


def test_what_happened_is_counted(run: Callable[..., Running], artefact: Artefact, engines: Engines) -> None:
    running = run(**over(engines), metrics_address=free_address(), requests_minute=20)
    device = running.device()
    message, _ = personal(artefact)
    device.describe()
    answer = list(device.stub.Generate(generate("the cat sat", shift=message), timeout=TIMEOUT))
    pairs = [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in EXAMPLES]
    device.stub.ComputeGradient(pb.ComputeGradientRequest(examples=pairs, shift=message))
    assert failure(lambda: list(device.stub.Generate(generate(""))))[0] == "INVALID_ARGUMENT"
    stream = Stream(device, opening(artefact), examples(EXAMPLES))
    assert stream.ask(step(mine(artefact, 1), [0])).tokens > 0
    text = page(running)
    assert value(text, 'perfit_calls_total{rpc="Describe",status="OK"}') == 1
    assert value(text, 'perfit_calls_total{rpc="Generate",status="INVALID_ARGUMENT"}') == 1
    assert value(text, 'perfit_call_seconds_count{rpc="Generate"}') == 2
    assert value(text, 'perfit_calls_in_flight{rpc="Adapt"}') == 1
    assert value(text, 'perfit_tokens_total{kind="prompt"}') == answer[-1].prompt_tokens
    assert value(text, 'perfit_tokens_total{kind="answer"}') == answer[-1].answer_tokens
    assert value(text, 'perfit_tokens_total{kind="example"}') > 0
    assert value(text, 'perfit_pass_seconds_count{kind="answers"}') >= answer[-1].answer_tokens
    assert value(text, 'perfit_pass_seconds_count{kind="long"}') >= 2  # keeping, and the step
    assert value(text, 'perfit_kept_bytes{where="device"}') > 0
    assert value(text, 'perfit_callers{listener="devices"}') == 1
    assert value(text, 'perfit_waiting{line="gradients"}') == 0
    assert 29 < value(text, 'perfit_certificate_days_left{certificate="server"}') <= 90
    assert value(text, 'perfit_certificate_days_left{certificate="device_ca"}') > 3000
    assert (value(text, "perfit_serving"), value(text, "perfit_draining")) == (1, 0)
    assert f'fingerprint="{engines.generation._base.fingerprint}"' in text  # type: ignore[attr-defined]
    assert "process_resident_memory_bytes" in text
    refusals = [failure(device.describe)[0] for _ in range(3) if not wait_for(lambda: is_refused(device))]
    assert set(refusals) == {"RESOURCE_EXHAUSTED"}
    assert value(page(running), 'perfit_refused_total{limit="requests_minute"}') >= 3
    stream.end()
    assert list(stream.call) == []
    wait_for(lambda: value(page(running), 'perfit_kept_bytes{where="device"}') == 0)
    assert value(page(running), 'perfit_calls_in_flight{rpc="Adapt"}') == 0
    running.server.stop(0)
    assert engines.engine_health()["model"].is_alive
    with pytest.raises(OSError):
        page(running)


def is_refused(device: Device) -> bool:
    try:
        device.describe()
    except Exception:
        return True
    return False


def test_answers_under_way_hold_tokens_of_the_cache(run: Callable[..., Running], engines: Engines) -> None:
    running = run(**over(engines), metrics_address=free_address())
    stream = running.device().stub.Generate(generate("the cat", max_new_tokens=200), timeout=TIMEOUT)
    next(stream)
    assert value(page(running), "perfit_cache_tokens") >= 200
    stream.cancel()
    wait_for(lambda: value(page(running), "perfit_cache_tokens") == 0)


def test_nothing_in_it_is_anybody_s(
    run: Callable[..., Running], artefact: Artefact, engines: Engines
) -> None:
    running = run(**over(engines), metrics_address=free_address())
    device = running.device()
    message, _ = personal(artefact)
    request = generate("zebracanary cat", shift=message, stop=["quaggastop"])
    list(device.stub.Generate(request, timeout=TIMEOUT))
    failure(lambda: device.stub.FetchSeed(pb.FetchSeedRequest(artefact="okapicanary")))
    for path in ("perfit.v1.Personalization/Zebracanary", "zebracanary/x", "perfit.v1.Identity/quaggastop"):
        failure(lambda p=path: device.channel.unary_unary(f"/{p}")(b""))  # type: ignore[misc]
    text = page(running)
    for canary in ("zebra", "quagga", "okapi", device.identity, device.identity[:8], "127.0.0.1"):
        assert canary.lower() not in text.lower()
    labels = set(re.findall(r'(\w+)="', text)) - {"le"}
    assert labels == {
        "rpc",
        "status",
        "kind",
        "line",
        "listener",
        "certificate",
        "engine",
        "state",
        "where",
        "version",
        "fingerprint",
        "artefacts",
        "limit",
    }
    # A method that is none is counted, under no name of its caller's.
    assert value(text, 'perfit_calls_total{rpc="unknown",status="UNIMPLEMENTED"}') == 3
    assert value(text, 'perfit_refused_total{limit="method"}') == 3


def test_metrics_are_off_by_default_and_a_taken_port_is_one_clear_error(run: Callable[..., Running]) -> None:
    running = run()
    assert running.config.metrics_address == ""
    assert running.server._stop_metrics is None
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match=r"cannot listen on .* for metrics"),
    ):
        run(metrics_address=f"127.0.0.1:{taken.getsockname()[1]}")


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    alerts = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + [
        rule["expr"] for group in alerts["groups"] for rule in group["rules"]
    ]


def test_dashboard_and_alerts_name_metrics_that_there_are(
    run: Callable[..., Running], engines: Engines
) -> None:
    running = run(**over(engines), metrics_address=free_address())
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", page(running), re.M))
    there = set(kinds) | {f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram"}
    wanted = {name for text in expressions() for name in re.findall(r"\b(?:perfit|process)_\w+", text)}
    assert len(wanted) > 15
    assert wanted - there == set()


# -- health --------------------------------------------------------------------------------------


def health_of(device: Device, service: str = "perfit.v1.Personalization") -> int:
    check = health_pb2_grpc.HealthStub(device.channel).Check
    return int(check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT).status)


@pytest.mark.parametrize(
    "ill", [EngineHealth(1, 3, 9.0, is_alive=True), EngineHealth(0, 0, 0.0, is_alive=False)]
)
def test_health_follows_the_engines(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, ill: EngineHealth
) -> None:
    """A cloud whose engine hung went on saying SERVING."""
    well, other = Played(), Played()
    running = run(engines=Engines(other, well, other, other), stuck_seconds=1)
    device = running.device()
    assert health_of(device) == SERVING
    with caplog.at_level(logging.WARNING):
        well.now = ill
        wait_for(lambda: health_of(device) == NOT_SERVING)
        assert health_of(device, "") == NOT_SERVING
        assert health_of(device, "perfit.v1.Identity") == SERVING
        assert "health says NOT_SERVING: updates (" in caplog.text
        assert running.server.telemetry.registry.get_sample_value("perfit_serving") == 0
        well.now = EngineHealth(1, 0, 0.5, is_alive=True)
        wait_for(lambda: health_of(device) == SERVING)
    assert running.server.telemetry.registry.get_sample_value("perfit_serving") == 1


def probes(address: str) -> tuple[int, int]:
    """What /ready and /live say."""

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=TIMEOUT) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    return status("/ready"), status("/live")


def test_only_an_engine_makes_a_supervisor_restart(caplog: pytest.LogCaptureFixture) -> None:
    """While the database was away every replica was killed, and none could start without it."""
    engine, is_deaf, telemetry, address = Played(), False, Telemetry(), free_address()
    stop_page = telemetry.serve(address)
    monitor = HealthMonitor(
        Engines(engine, engine, engine, engine), telemetry, stuck_seconds=1, is_deaf=lambda: is_deaf
    )
    try:
        assert probes(address) == (503, 200), "it starts"
        monitor.start()
        assert probes(address) == (200, 200)
        is_deaf = True
        wait_for(lambda: probes(address) == (503, 200))
        assert telemetry.registry.get_sample_value("perfit_serving") == 0
        assert "NOT_SERVING: the list of devices (away)" in caplog.text
        engine.now = EngineHealth(1, 3, 9.0, is_alive=True)
        wait_for(lambda: probes(address) == (503, 503))  # deaf and stuck
        is_deaf = False
        wait_for(lambda: "NOT_SERVING: answers (stuck), updates (stuck), model (stuck)\n" in caplog.text)
        assert probes(address) == (503, 503)
        engine.now = EngineHealth(1, 0, 0.5, is_alive=True)
        wait_for(lambda: probes(address) == (200, 200))
    finally:
        monitor.stop()
        stop_page()


def test_health_is_told_when_there_is_no_room_for_calls(run: Callable[..., Running]) -> None:
    """A cloud with all hands full is not ill: whoever restarts it for that makes it worse."""
    drip = Drip()
    running = run(engine=drip, calls=1)
    stream = running.device().stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    other = running.device()
    assert failure(other.describe)[0] == "RESOURCE_EXHAUSTED"
    assert health_of(other) == SERVING
    stream.cancel()


@contextmanager
def held_up(engine: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine's method `name` stands still; gives what is set when it does."""
    go, entered, real = threading.Event(), threading.Event(), getattr(engine, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go.wait(TIMEOUT)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, name, slow)
        yield entered
        go.set()


def test_a_pass_that_hangs_is_seen(
    engines: Engines, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation: Any = engines.generation
    with held_up(generation, "_forward", monkeypatch) as entered:
        answer = generation.submit(base.encode("the cat"), BASE_USE, Sampling(3))
        assert entered.wait(TIMEOUT)
        time.sleep(0.3)
        engine_health = engines.engine_health()
        assert engine_health["answers"].running + engine_health["answers"].waiting == 1
        assert (
            engine_health["answers"].stalled_seconds >= 0.3,
            engine_health["model"].stalled_seconds >= 0.3,
        ) == (True, True)
        assert engine_health["updates"].stalled_seconds == 0
    list(answer)
    wait_for(lambda: engines.engine_health()["model"].running == 0)
    assert engines.engine_health()["answers"] == EngineHealth(0, 0, 0.0, is_alive=True)


def test_scores_that_wait_are_counted_apart(
    engines: Engines, base: BaseModel, artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait in the queue of the gradients, and were counted as updates."""
    steps: Any = engines.scheduler
    telemetry = Telemetry()
    telemetry.watch(engines)

    def waiting(engine: str) -> float | None:
        return telemetry.registry.get_sample_value(
            "perfit_engine_work", {"engine": engine, "state": "waiting"}
        )

    pairs = [(base.encode(prompt), base.encode_target(target)) for prompt, target in EXAMPLES]
    with steps.open(pairs, artefact) as session, steps.open_stateless(pairs, BASE_USE) as scored:
        with held_up(engines.updates, "run_pass", monkeypatch) as entered:
            step = steps.submit(GradientRequest(session, [0], mine(artefact, 1)))
            assert entered.wait(TIMEOUT)
            scores = [steps.score(scored.whole) for _ in range(2)]
            assert (waiting("updates"), waiting("scores")) == (1, 2)
        assert len([future.result(TIMEOUT) for future in (step, *scores)]) == 3
    wait_for(lambda: (waiting("updates"), waiting("scores")) == (0, 0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_update_that_hangs_and_a_worker_that_died_are_seen(
    engines: Engines, base: BaseModel, artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: Any = engines.scheduler
    pairs = [(base.encode(prompt), base.encode_target(target)) for prompt, target in EXAMPLES]
    session = steps.open(pairs, artefact)
    with held_up(engines.updates, "run_pass", monkeypatch) as entered:
        future = steps.submit(GradientRequest(session, [0], mine(artefact, 1)))
        assert entered.wait(TIMEOUT)
        time.sleep(0.3)
        assert engines.engine_health()["updates"].stalled_seconds >= 0.3
    future.result(TIMEOUT)
    wait_for(lambda: engines.engine_health()["updates"] == EngineHealth(0, 0, 0.0, is_alive=True))
    session.close()

    def die() -> bool:
        raise MemoryError

    monkeypatch.setattr(steps, "_round", die)
    with pytest.raises(Unavailable):  # at once, or when the one round that had begun is over
        for _ in range(2):
            steps.submit(GradientRequest(steps.open(pairs, artefact), [0], mine(artefact, 1))).result(TIMEOUT)
    assert not engines.engine_health()["updates"].is_alive
