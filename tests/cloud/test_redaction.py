"""No word, number or identity of a caller in logs, errors, metadata or metrics: every RPC, every failure.

Once over mutual TLS, and once sealed: errors are not sealed, so a front that ends TLS reads them.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest
from tests.support.authority import csr_of, new_key
from tests.support.cloud import TIMEOUT, Device, Running, failure, generate
from tests.support.models import random_shift
from tests.support.processes import fork

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.state_folder import Addresses
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.sealed_channel import SealedChannel
from perfit_device.cloud.sealing import Sealer, Sealing
from perfit_shared.errors import Busy, Cancelled, PerfitError, TooSlow, Unavailable
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc

WORD = "zebracanary"
NUMBER = 61.80339  # in tensors and sampling
# Itself, and a million times itself as a double and as a float. No clock shows so many digits by chance.
MARKS = (WORD, WORD[::-1], "61.8033", "61803390", "61803392")


class Caller:
    """A device whose every request is full of canaries."""

    def __init__(self, device: Device, artefact: Artefact) -> None:
        self.device, self.artefact, self.stub = device, artefact, device.stub

    def shift(self, *, value: float = NUMBER, **change: Any) -> pb.Shift:
        spec = self.artefact.spec
        layers = dict(random_shift(spec, spec.personal_rank, 3).layers)
        first = spec.layers[0]
        bias = np.full_like(layers[first].bias, value)
        layers[first] = LayerShift(layers[first].rotation, layers[first].source, bias)
        fields = {
            "mode": pb.SHIFT_MODE_PERSONAL,
            "artefact": self.artefact.name,
            "version": self.artefact.version,
            "personal": ShiftTensors(layers).to_bytes(),
        }
        return pb.Shift(**fields | change)

    def generate(self, text: str = f"the cat {WORD}", **change: Any) -> list[pb.GenerateResponse]:
        sampling = {"stop": [WORD], "max_new_tokens": 4, **change.pop("sampling", {})}
        request = generate(text, change.pop("shift", None) or self.shift(), **sampling)
        if "prompt" in change:
            request.prompt.CopyFrom(change["prompt"])
        return list(self.stub.Generate(request, timeout=TIMEOUT))

    def score(self, **change: Any) -> pb.ScoreResponse:
        candidates = [pb.Candidate(prompt=pb.Prompt(text=WORD), answer=change.get("answer", f" {WORD}"))]
        return self.stub.Score(pb.ScoreRequest(candidates=candidates, shift=self.shift()), timeout=TIMEOUT)

    def gradient(self, shift: pb.Shift | None = None) -> pb.ComputeGradientResponse:
        examples = [pb.Example(prompt=pb.Prompt(text=f"the {WORD}"), target=f" {WORD}")]
        request = pb.ComputeGradientRequest(examples=examples, shift=shift or self.shift())
        return self.stub.ComputeGradient(request, timeout=TIMEOUT)

    def ask(self, *questions: pb.Question, shift: pb.Shift | None = None) -> list[pb.AskResponse]:
        requests = [pb.AskRequest(shift=shift or self.shift())]
        requests += [pb.AskRequest(question=question) for question in questions or (self.question(),)]
        return list(self.stub.Ask(iter(requests), timeout=TIMEOUT))

    @staticmethod
    def question(**change: Any) -> pb.Question:
        sampling = pb.Sampling(max_new_tokens=4, stop=[WORD], **change)
        return pb.Question(number=1, prompt=pb.Prompt(text=f"the {WORD}"), sampling=sampling)

    def adapt(
        self, rows: Sequence[int] = (0,), target: str = f" {WORD}", **change: Any
    ) -> list[pb.AdaptResponse]:
        opening = {"artefact": self.artefact.name, "version": self.artefact.version}
        pairs = [pb.Example(prompt=pb.Prompt(text=f"the {WORD} cat"), target=target)]
        step = pb.AdaptStep(personal=change.pop("shift", self.shift()).personal, rows=rows)
        requests = [
            pb.AdaptRequest(open=pb.AdaptOpen(**opening | change)),
            pb.AdaptRequest(examples=pb.AdaptExamples(examples=pairs)),
            pb.AdaptRequest(step=step),
        ]
        return list(self.stub.Adapt(iter(requests), timeout=TIMEOUT))

    def raw(self, method: str, data: bytes) -> list[bytes]:
        """A call with bytes of one's own."""
        path = f"/perfit.v1.Personalization/{method}"
        call = self.device.channel.stream_stream(path, request_serializer=bytes, response_deserializer=bytes)
        return list(call(iter([data]), timeout=TIMEOUT))


class Heard:
    """All that a server has said so far, to anybody."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        self._caplog, self._capfd, self.errors = caplog, capfd, ""
        caplog.set_level(logging.WARNING)
        for name in ("perfit_cloud", "perfit_shared"):
            caplog.set_level(logging.DEBUG, logger=name)

    def fails(self, call: Callable[[], object]) -> str:
        """Its status; the rest of what the caller is told is kept."""
        status, metadata, message = failure(call)
        self.errors += f"{metadata} {message}\n"
        return status

    def check(self, running: Running, *devices: Device) -> None:
        said = self.errors + self._caplog.text + "".join(self._capfd.readouterr())
        said += generate_latest(running.server.telemetry.registry).decode()
        assert "perfit_" in said  # the metrics are there
        for mark in (*MARKS, *(device.identity for device in devices)):
            assert mark not in said


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Heard:
    return Heard(caplog, capfd)


@pytest.fixture(params=["mutual TLS", "sealed"])
def caller(
    request: pytest.FixtureRequest, run: Callable[..., Running], artefact: Artefact
) -> tuple[Caller, Running]:
    if request.param == "mutual TLS":
        running = run()
        return Caller(running.device(), artefact), running
    running = run(front_address="127.0.0.1:0")
    return Caller(sealing_device(running), artefact), running


def sealing_device(running: Running) -> Device:
    """One whose every call is sealed. What it is told of an error, the front is told."""
    enrolment = running.enrolled(running.front_address)
    clear = mutual_channel(enrolment, enrolment.address)
    running.channels.append(clear)

    def keys() -> Any:
        return pb_grpc.PersonalizationStub(clear).Describe(pb.DescribeRequest(), timeout=TIMEOUT).sealing_keys

    sealed = SealedChannel(clear, Sealer(enrolment, Sealing(), keys))
    return Device(enrolment.identity.key, enrolment.certificate, sealed)


def test_calls_that_go_well(caller: tuple[Caller, Running], heard: Heard) -> None:
    c, running = caller
    c.device.describe()
    c.stub.FetchSeed(pb.FetchSeedRequest(artefact=c.artefact.name), timeout=TIMEOUT)
    c.generate(sampling={"temperature": 0.9, "seed": 6180339})
    c.score()
    c.gradient()
    assert not any(response.HasField("failure") for response in c.ask())
    c.adapt()
    heard.check(running, c.device)


def test_what_is_refused(
    caller: tuple[Caller, Running], base: BaseModel, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, running = caller
    invalid, mismatch = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
    huge, nan = c.shift(value=1e6 * NUMBER), c.shift(value=float("nan"))
    chat = pb.Chat(messages=[pb.ChatMessage(role=WORD, content=WORD)])
    pieces = [pb.Candidate(prompt=pb.Prompt(text=WORD), answer=" ")]
    calls: list[tuple[str, Callable[[], object]]] = [
        (invalid, lambda: c.generate(f" {WORD}" * 2000)),
        (invalid, lambda: c.generate("", prompt=pb.Prompt(chat=chat))),
        (invalid, lambda: c.generate(sampling={"temperature": 1e6 * NUMBER})),
        (invalid, lambda: c.generate(sampling={"top_p": NUMBER})),
        (invalid, lambda: c.generate(sampling={"stop": [WORD * 9]})),
        (invalid, lambda: c.generate(shift=huge)),
        (invalid, lambda: c.generate(shift=nan)),
        (invalid, lambda: c.generate(shift=c.shift(personal=WORD.encode() * 99))),
        (invalid, lambda: c.gradient(nan)),
        (invalid, lambda: c.score(answer=f" {WORD}" * 2000)),
        (invalid, lambda: c.stub.Score(pb.ScoreRequest(candidates=pieces, shift=c.shift()), timeout=TIMEOUT)),
        (invalid, lambda: c.ask(shift=nan)),
        (invalid, lambda: c.adapt(rows=[618])),
        (invalid, lambda: c.adapt(target=f" {WORD}" * 2000)),
        (invalid, lambda: c.adapt(shift=nan)),
        (mismatch, lambda: c.generate(shift=c.shift(version=WORD))),
        (mismatch, lambda: c.adapt(version=WORD)),
        *(
            (invalid, lambda method=method: c.raw(method, b"\xff" + WORD.encode()))
            for method in ("Describe", "FetchSeed", "Generate", "Score", "ComputeGradient", "Ask", "Adapt")
        ),
    ]
    for status, call in calls:
        assert heard.fails(call) == status
    (response,) = c.ask(c.question(temperature=1e6 * NUMBER))
    heard.errors += str(response.failure)
    assert response.failure.code == "invalid_input"
    # The template's own error quotes the messages.
    template = "{{ raise_exception(messages[0].content) }}"
    monkeypatch.setattr(base.tokenizer, "chat_template", template, raising=False)
    monkeypatch.setattr(base._codec, "_template", template)  # as if it had been loaded with it
    user = pb.Chat(messages=[pb.ChatMessage(role="user", content=WORD)])
    assert heard.fails(lambda: c.generate("", prompt=pb.Prompt(chat=user))) == invalid
    heard.check(running, c.device)


def test_an_artefact_that_is_not_there_is_named_to_its_caller_alone(
    caller: tuple[Caller, Running], heard: Heard
) -> None:
    c, running = caller
    seed = pb.FetchSeedRequest(artefact=WORD)
    for call in (
        lambda: c.stub.FetchSeed(seed, timeout=TIMEOUT),
        lambda: c.generate(shift=c.shift(artefact=WORD)),
        lambda: c.adapt(artefact=WORD),
    ):
        assert failure(call)[0] == "NOT_FOUND"
    heard.check(running, c.device)


def test_who_may_not_call(caller: tuple[Caller, Running], heard: Heard) -> None:
    c, running = caller
    enrolment = enrol_grpc.EnrollmentStub(running.enrolment())
    request = enrol_pb.EnrollRequest(secret=WORD.encode() * 3, csr=csr_of(new_key()))
    assert heard.fails(lambda: enrolment.Enroll(request, timeout=TIMEOUT)) == "PERMISSION_DENIED"
    request = enrol_pb.EnrollRequest(secret=running.invite(), csr=WORD.encode())
    assert heard.fails(lambda: enrolment.Enroll(request, timeout=TIMEOUT)) == "INVALID_ARGUMENT"
    request = enrol_pb.RenewLapsedRequest(
        certificate=c.device.certificate, nonce=WORD.encode(), signature=WORD.encode(), csr=csr_of(new_key())
    )
    assert heard.fails(lambda: enrolment.RenewLapsed(request, timeout=TIMEOUT)) != "INTERNAL"
    identity = enrol_grpc.IdentityStub(c.device.channel)
    renew = enrol_pb.RenewRequest(csr=WORD.encode())
    assert heard.fails(lambda: identity.Renew(renew, timeout=TIMEOUT)) == "INVALID_ARGUMENT"
    running.authority.revoke(c.device.identity)
    for call in (c.device.describe, c.generate, c.score, c.gradient, c.ask, c.adapt):
        assert heard.fails(call) == "PERMISSION_DENIED"
    heard.check(running, c.device)


class Failing:
    """An engine that fails in its own words, which quote what it works on."""

    continuous = caches_activations = True

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _fail(self, *args: object, **_: object) -> Any:
        if isinstance(self._error, RuntimeError):
            raise RuntimeError(f"{args} {WORD} {NUMBER}") from ValueError(WORD)
        raise self._error

    submit = open = open_stateless = _fail


@pytest.mark.parametrize(
    "error",
    [RuntimeError(), Busy("busy", retry_ms=50), TooSlow("late"), Unavailable("gone"), Cancelled("left")],
)
def test_engines_that_fail(
    run: Callable[..., Running], artefact: Artefact, heard: Heard, error: Exception
) -> None:
    engine = Failing(error)
    running = run(engine=engine, steps=engine)
    c = Caller(running.device(), artefact)
    statuses = {heard.fails(call) for call in (c.generate, c.score, c.gradient, c.adapt)}
    assert len(statuses) == 1
    (response,) = c.ask()
    heard.errors += str(response.failure)
    assert response.failure.code == (error.code if isinstance(error, PerfitError) else "internal")
    heard.check(running, c.device)


def test_passes_that_fail(
    caller: tuple[Caller, Running], heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quote(*args: object, **_: object) -> Any:
        raise IndexError(f"{args} {WORD} {NUMBER}")

    c, running = caller
    for engine, name in (
        (GenerationEngine, "_forward"),
        (GradientEngine, "run_pass"),
        (UpdateEngine, "run_pass"),
    ):
        monkeypatch.setattr(engine, name, quote)
    assert heard.fails(c.generate) == "UNAVAILABLE"
    for call in (c.score, c.gradient, c.adapt):
        assert heard.fails(call) == "INTERNAL"
    assert heard._caplog.text.count("IndexError at test_redaction.py:") == 4  # once each, with its place
    heard.check(running, c.device)


def test_callers_who_leave_and_callers_who_wait(caller: tuple[Caller, Running], heard: Heard) -> None:
    c, running = caller
    for number in range(3):
        call = c.stub.Generate(generate(f"the {WORD}", c.shift(), max_new_tokens=200), timeout=TIMEOUT)
        next(call)
        call.cancel()
        late = c.stub.Generate(generate(f"the {WORD}", c.shift(), max_new_tokens=200), timeout=0.05)
        assert heard.fails(lambda late=late: list(late)) == "DEADLINE_EXCEEDED", number
    heard.check(running, c.device)


# A server whose engines quote what they work on, in their errors and through libraries' logs and warnings.
QUOTING = """
import logging, warnings
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
def quote(self, *args, **_):
    for request in self._requests if isinstance(self, GenerationEngine) else ():
        logging.getLogger("transformers.generation").error("prompt %s", request.prompt)
    logging.getLogger("perfit_cloud").warning("quoting")
    raise IndexError(f"{args} zebracanary 61.80339")
GenerationEngine._forward = GradientEngine.run_pass = quote
from perfit_cloud.cli.main import run
run()
"""


@pytest.mark.slow
def test_a_process_of_its_own(
    tmp_path: Path, model_folder: Callable[[str], Path], base: BaseModel, artefact: Artefact
) -> None:
    """Hardened, with its logs as an operator has them; and it says that it is hardened."""
    artefact.save(tmp_path / "artefact")
    words = [
        "serve",
        "--model",
        str(model_folder("llama")),
        "--artefact",
        str(tmp_path / "artefact"),
        "--json",
        "--state",
        str(tmp_path / "state"),
        "--address",
        "127.0.0.1:0",
        "--enrol-address",
        "127.0.0.1:0",
        "--set",
        "drain_seconds=1",
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", QUOTING, *words], **pipes) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            config = CloudConfig(state=tmp_path / "state")
            authority = Authority(
                config.state, certificate_seconds=config.certificate_seconds, lapse_seconds=60
            )
            addresses: Any = SimpleNamespace(
                addresses=Addresses(address=told["address"], enrol_address=told["enrol_address"])
            )
            running = Running(config, authority, addresses)
            c = Caller(running.device(), artefact)
            for call in (c.generate, c.score, c.gradient):
                assert failure(call)[0] in ("UNAVAILABLE", "INTERNAL")
            assert failure(lambda: c.raw("Score", b"\xff" + WORD.encode()))[0] == "INVALID_ARGUMENT"
            assert c.adapt()
            c.device.channel.close()
            authority.close()
            process.terminate()
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    held = told["hardening"]
    assert held["overwrites_freed"]
    assert held["overwrites_stacks"]
    assert held["no_core_dumps"]
    assert held["not_dumpable"]
    assert errors.count("IndexError at <string>:") == 3
    ids = ", ".join(map(str, base.encode(f"the cat {WORD}")[-4:]))
    for mark in (*MARKS, c.device.identity, ids):
        assert mark not in rest + errors


def test_a_server_that_is_not_hardened_says_so(tmp_path: Path) -> None:
    words = ("serve", "--state", str(tmp_path / "state"), "--set", "hardening=off", "--model", "nowhere")
    assert fork(*words, errors=tmp_path / "errors").wait(60) == 1
    assert "hardening is off" in (tmp_path / "errors").read_text().splitlines()[0]
