"""The service over real TLS on loopback, with the real engines: what a device gets, and how it fails."""

from __future__ import annotations

import itertools
import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tests.support import ask_calls
from tests.support.cloud import BASE, INVALID, TIMEOUT, Running, failure, generate, pem, personal
from tests.support.doubles import Slow, score
from tests.support.waiting import wait_for

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.state_folder import Addresses, only_server
from perfit_shared.errors import ConfigError, InvalidTensors
from perfit_shared.shifts import ShiftTensors, gradient_from_bytes
from perfit_shared.types import Finish, Mode, Sampling
from perfit_shared.wire import personalization_pb2 as pb


def test_describe_and_seed(run: Callable[..., Running], artefact: Artefact, base: BaseModel) -> None:
    running = run()
    device = running.device()
    told = device.describe()
    assert (told.fingerprint, told.cloud_id) == (base.fingerprint, running.authority.cloud_id)
    assert [a.name for a in told.artefacts] == [artefact.name]
    seed = device.stub.FetchSeed(pb.FetchSeedRequest(artefact=artefact.name))
    spec = artefact.spec
    assert ShiftTensors.from_bytes(seed.seed, spec, spec.personal_rank).digest() == artefact.seed.digest()
    status, metadata, message = failure(lambda: device.stub.FetchSeed(pb.FetchSeedRequest(artefact="x")))
    assert (status, metadata) == ("NOT_FOUND", {"perfit-code": "not_found"})
    assert artefact.name in message


def test_answers_are_the_engines(
    run: Callable[..., Running], artefact: Artefact, base: BaseModel, generation: GenerationEngine
) -> None:
    device = run().device()
    message, use = personal(artefact)
    texts = set()
    for shift, expected_use in ((BASE, ShiftUse(Mode.BASE)), (message, use)):
        expected = list(generation.submit(base.encode("the cat sat"), expected_use, Sampling(12)))
        got = list(device.stub.Generate(generate(shift=shift), timeout=TIMEOUT))
        assert "".join(m.text for m in got) == "".join(p.text for p in expected)
        assert [m.finish for m in got[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(got) - 1)
        finish = pb.FINISH_REASON_END if expected[-1].finish is Finish.END else pb.FINISH_REASON_LENGTH
        assert got[-1].finish == finish
        assert got[-1].prompt_tokens == len(base.encode("the cat sat"))
        assert got[-1].answer_tokens == expected[-1].answer_tokens
        texts.add("".join(m.text for m in got))
    assert len(texts) == 2  # the personal shift is on


def test_log_probabilities_of_an_answer_add_up_to_its_score(
    run: Callable[..., Running],
    artefact: Artefact,
    base: BaseModel,
    generation: GenerationEngine,
    gradients: GradientEngine,
) -> None:
    """In Generate and in Ask, an end of sequence included."""
    device = run().device()
    message, use = personal(artefact)
    assert device.describe().limits.logprobs == 20
    prompt, finishes = base.encode("the cat sat"), set()
    for seed in range(12):
        hot = {"temperature": 1.5, "max_new_tokens": 40, "seed": seed}
        got = list(device.stub.Generate(generate(shift=message, logprobs=3, **hot), timeout=TIMEOUT))
        told = [token for part in got for token in part.logprobs]
        assert len(told) == got[-1].answer_tokens and {len(token.top) for token in told} == {3}
        answer = generation.submit(prompt, use, Sampling(**hot))
        assert list(answer)[-1].finish
        (score,) = gradients.score([(prompt, answer.ids)], use)  # what Score answers with
        assert sum(token.logprob for token in told) == pytest.approx(score.log_likelihood, abs=1e-3)
        question = ask_calls.question(1, logprobs=3, **hot)
        parts = [r.part for r in ask_calls.ask(device, ask_calls.opening(message), question)]
        assert [token.text for part in parts for token in part.logprobs] == [token.text for token in told]
        finishes.add(got[-1].finish)
    assert len(finishes) == 2  # some end by themselves


def test_an_answer_arrives_while_it_is_made(
    run: Callable[..., Running], generation: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, go, made = run().device(), threading.Event(), itertools.count(1)
    forward = generation._forward

    def held(plan: Any) -> Any:
        """The engine stands still at its 20th pass until the first message was read."""
        if next(made) == 20:
            assert go.wait(TIMEOUT)
        return forward(plan)

    monkeypatch.setattr(generation, "_forward", held)
    stream = device.stub.Generate(generate(max_new_tokens=60), timeout=TIMEOUT)
    first = next(stream)
    assert generation.health().in_flight == 1
    assert (bool(first.text), first.finish) == (True, pb.FINISH_REASON_UNSPECIFIED)
    go.set()
    rest = list(stream)
    assert len(rest) >= 1
    assert rest[-1].answer_tokens > 20


def test_scores_and_gradients_are_the_engines(
    run: Callable[..., Running], artefact: Artefact, base: BaseModel, gradients: GradientEngine
) -> None:
    device = run().device()
    message, use = personal(artefact)
    texts = [("the cat sat", " on the mat"), ("the dog", " ran")]
    pairs = [(base.encode(p), base.encode_target(t)) for p, t in texts]
    candidates = [pb.Candidate(prompt=pb.Prompt(text=p), answer=t) for p, t in texts]
    scored = device.stub.Score(pb.ScoreRequest(candidates=candidates, shift=message), timeout=TIMEOUT)
    expected = gradients.score(pairs, use)
    assert [s.tokens for s in scored.scores] == [s.tokens for s in expected]
    assert np.allclose([s.log_likelihood for s in scored.scores], [s.log_likelihood for s in expected])
    examples = [pb.Example(prompt=pb.Prompt(text=p), target=t) for p, t in texts]
    got = device.stub.ComputeGradient(
        pb.ComputeGradientRequest(examples=examples, shift=message), timeout=TIMEOUT
    )
    gradient, spec = gradients.gradient(pairs, use), artefact.spec
    tensors = gradient_from_bytes(got.gradient, spec, spec.personal_rank)
    assert got.tokens == gradient.tokens
    assert got.loss == pytest.approx(gradient.loss, rel=1e-6)
    for (_, a), (_, b) in zip(tensors.named(), gradient.tensors.named(), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert tensors.norm() > 0


@pytest.mark.parametrize(
    ("call", "status", "code", "says"),
    [
        (lambda s, _: list(s.Generate(generate(""))), INVALID, "invalid_prompt", "empty"),
        (lambda s, _: list(s.Generate(generate("cat " * 300))), INVALID, "invalid_prompt", "at most"),
        (lambda s, _: list(s.Generate(generate(max_new_tokens=0))), INVALID, "invalid_input", "1 to"),
        (lambda s, _: list(s.Generate(generate(shift=pb.Shift()))), INVALID, "invalid_input", "mode"),
        (
            lambda s, p: list(s.Generate(generate(shift=pb.Shift(**{**p, "version": "0"})))),
            "FAILED_PRECONDITION",
            "shift_mismatch",
            "perfit update",
        ),
        (
            lambda s, p: list(s.Generate(generate(shift=pb.Shift(**{**p, "personal": b"x"})))),
            INVALID,
            "invalid_tensors",
            "safetensors",
        ),
        (
            lambda s, _: s.ComputeGradient(pb.ComputeGradientRequest(shift=BASE)),
            INVALID,
            "invalid_input",
            "personal mode",
        ),
        (
            lambda s, p: s.ComputeGradient(pb.ComputeGradientRequest(shift=pb.Shift(**p))),
            INVALID,
            "invalid_input",
            "no examples",
        ),
        (lambda s, _: s.Score(pb.ScoreRequest(shift=BASE)), INVALID, "invalid_input", "no examples"),
    ],
)
def test_refusals_carry_status_code_and_one_line(
    run: Callable[..., Running], artefact: Artefact, call: Any, status: str, code: str, says: str
) -> None:
    device = run().device()
    message, _ = personal(artefact)
    parts = {f.name: value for f, value in message.ListFields()}
    got_status, metadata, details = failure(lambda: call(device.stub, parts))
    assert (got_status, metadata) == (status, {"perfit-code": code})
    assert says in details
    assert "\n" not in details
    assert device.describe().cloud_id  # the channel is as good as before


@pytest.mark.parametrize(
    "error", [RuntimeError("secret zebra 0.123"), KeyError("zebra"), ConfigError("zebra")]
)
def test_unknown_errors_tell_nothing(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    device = run(steps=Slow(error)).device()
    with caplog.at_level(logging.DEBUG):
        result = failure(lambda: device.stub.Score(score()))
    assert result == ("INTERNAL", {"perfit-code": "internal"}, "internal error")
    assert f"{type(error).__name__} at doubles.py:" in caplog.text
    assert "zebra" not in caplog.text
    assert "0.123" not in caplog.text


def test_errors_of_the_engine_keep_their_code(run: Callable[..., Running]) -> None:
    device = run(steps=Slow(InvalidTensors("they overflow"))).device()
    assert failure(lambda: device.stub.Score(score())) == (
        "INVALID_ARGUMENT",
        {"perfit-code": "invalid_tensors"},
        "they overflow",
    )


def test_messages_are_bounded(run: Callable[..., Running]) -> None:
    device = run(message_bytes=300_000).device()
    request = generate("x" * 400_000)
    assert failure(lambda: list(device.stub.Generate(request)))[0] == "RESOURCE_EXHAUSTED"
    device.describe()


# -- the server's life ---------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_clear_error(run: Callable[..., Running]) -> None:
    running = run()
    with pytest.raises(ConfigError, match="cannot listen on"):
        run(address=running.address)


def test_addresses_are_left_for_invites(run: Callable[..., Running], tmp_path: Path) -> None:
    running = run(public_address="localhost:7", public_enrol_address="cloud.example:8")
    assert Addresses.load(running.config.state) == Addresses("localhost:7", "cloud.example:8")
    with pytest.raises(ConfigError, match="no server has run"):
        Addresses.load(tmp_path)


def test_one_server_for_a_state_folder(tmp_path: Path) -> None:
    with (
        only_server(tmp_path),
        pytest.raises(ConfigError, match="another perfit-cloud"),
        only_server(tmp_path),
    ):
        pass
    with only_server(tmp_path):
        pass


def test_idle_connections_are_closed(run: Callable[..., Running]) -> None:
    """What gRPC read and wrote for them lies in its buffers as long as they are open."""
    device = run(idle_seconds=1).device()
    states: list[grpc.ChannelConnectivity] = []
    device.channel.subscribe(states.append)
    device.describe()
    wait_for(lambda: grpc.ChannelConnectivity.READY in states)
    wait_for(lambda: states[-1] is grpc.ChannelConnectivity.IDLE)
    device.describe()  # over a new connection


def test_words_of_prompts_are_not_kept_by_the_tokenizer(base: BaseModel) -> None:
    """Its cache would take 10,000 words of up to 256 bytes; these are 19 MB there."""
    words = ["".join(chr(97 + byte % 26) for byte in random.Random(n).randbytes(200)) for n in range(3000)]
    for word in words[:100]:
        base.encode(word)
    before = psutil.Process().memory_info().rss
    for word in words:
        base.encode(word)
    assert psutil.Process().memory_info().rss - before < 5e6


def test_server_certificate_is_replaced_without_a_restart(run: Callable[..., Running]) -> None:
    running = run(names=("cloud.example",))
    address = running.server.addresses.enrol_address

    def serial() -> str:
        context = ssl.create_default_context(cadata=pem(running.authority.server_ca_der).decode())
        context.set_alpn_protocols(["h2"])
        host, port = address.rsplit(":", 1)
        with (
            socket.create_connection((host, int(port)), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname="cloud.example") as tls,
        ):
            return str((tls.getpeercert() or {})["serialNumber"])

    first = serial()
    assert serial() == first
    rotating = running.server._credentials
    rotating._identity = replace(rotating._identity, renew_at=0)
    assert serial() != first
    running.device().describe()
