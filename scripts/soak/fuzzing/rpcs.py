"""Targets of a live cloud: every RPC, over real mutual TLS, to a process of its own.

What a call may end with:

- its answer, which then is sound;
- a status with our code, which is not "internal" and belongs to the status by the table of errors;
- gRPC's own, for what never reaches our code: UNIMPLEMENTED for a method that is none, RESOURCE_EXHAUSTED
  for a message larger than the limit, NOT_FOUND of the health service for a service that is none.

Every so many calls an honest device asks what it asked at the start, and must get the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import mul
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.message import Message
from hypothesis import strategies as st

from local import LocalCloud
from perfit_device.cloud.channels import enrolment_channel, mutual_channel
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Enrolment, Identity, pem
from perfit_shared.errors import from_code, to_status
from perfit_shared.invites import Invite
from perfit_shared.shifts import ShiftSpec
from perfit_shared.wire import enrollment_pb2 as epb
from perfit_shared.wire import personalization_pb2 as pb
from soak.fuzzing.checking import Target, Unsound
from soak.fuzzing.counts import Counted, counted
from soak.fuzzing.hints import Known, hints_for
from soak.fuzzing.mutation import edited, messages, mostly
from soak.settings import flags as flags_of
from tiny import Tiny

__all__ = ["NAMES", "Live", "live"]

NAMES = (
    "rpc: bytes",
    "rpc: messages",
    "rpc: streams",
    "rpc: enrolment",
    "rpc: counts and sizes",
    "rpc: the log",
)
_GROWTH = 256 << 20  # bytes that the cloud may have more than at the start
_SECONDS = 20.0  # most that a call may take here
_PROBE_EVERY = 40  # calls
_LARGEST = 1 << 20  # bytes of a message, as this cloud is configured
# Small answers, and no rate that would keep inputs from being looked at.
_SETTINGS = {
    "new_tokens": 8,
    "message_bytes": _LARGEST,
    "examples": 8,
    "adapt_examples": 40,
    "threads": 1,
    "requests_minute": 10**6,
    "tokens_minute": 10**9,
    "enrol_requests_minute": 10**6,
}
_PERSONALIZATION, _ENROLMENT = "perfit.v1.Personalization", "perfit.v1.Enrollment"
_LEAVE = "/perfit.v1.Identity/Leave"
_UNARY: dict[str, tuple[type[Message], type[Message]]] = {
    f"/{_PERSONALIZATION}/Describe": (pb.DescribeRequest, pb.DescribeResponse),
    f"/{_PERSONALIZATION}/FetchSeed": (pb.FetchSeedRequest, pb.FetchSeedResponse),
    f"/{_PERSONALIZATION}/Score": (pb.ScoreRequest, pb.ScoreResponse),
    f"/{_PERSONALIZATION}/ComputeGradient": (pb.ComputeGradientRequest, pb.ComputeGradientResponse),
    "/perfit.v1.Identity/Renew": (epb.RenewRequest, epb.Credentials),
    _LEAVE: (epb.LeaveRequest, epb.LeaveResponse),
}
_GENERATE = f"/{_PERSONALIZATION}/Generate"
_STREAMS: dict[str, type[Message]] = {
    f"/{_PERSONALIZATION}/Ask": pb.AskResponse,
    f"/{_PERSONALIZATION}/Adapt": pb.AdaptResponse,
}
_ENROL: dict[str, tuple[type[Message], type[Message]]] = {
    f"/{_ENROLMENT}/Enroll": (epb.EnrollRequest, epb.Credentials),
    f"/{_ENROLMENT}/Challenge": (epb.ChallengeRequest, epb.ChallengeResponse),
    f"/{_ENROLMENT}/RenewLapsed": (epb.RenewLapsedRequest, epb.Credentials),
}
_STRANGE = ("/grpc.health.v1.Health/Check", f"/{_PERSONALIZATION}/Nothing", "/x/y", f"/{_ENROLMENT}/Enroll")
_OF_GRPC = {
    (grpc.StatusCode.UNIMPLEMENTED, "Method not found!"): "no such method",
    (grpc.StatusCode.NOT_FOUND, ""): "no such service",  # of the health service
}


@contextmanager
def live(tiny: Tiny, work: Path) -> Iterator[Live]:
    """A cloud in a process of its own, a hostile device and an honest one."""
    work.mkdir(parents=True, exist_ok=True)
    flags = flags_of(_SETTINGS)
    log = work / "cloud.log"
    with LocalCloud(tiny.model, tiny.artefacts, work / "state", log=log, flags=flags) as cloud:
        made = Live(cloud, log)
        try:
            yield made
        finally:
            made.close()


class Live:
    """What the targets need of the cloud."""

    def __init__(self, cloud: LocalCloud, log: Path) -> None:
        self._cloud, self._log = cloud, log
        self._spare = Invite.decode(cloud.invite())
        enrolments = [enroll(Invite.decode(cloud.invite()), Identity.create()) for _ in range(3)]
        self._hostile_enrolment: Enrolment = enrolments[0]
        self._hostile, self._honest, self._leaver = (
            mutual_channel(each, each.address) for each in enrolments
        )
        self._anybody = enrolment_channel(self._spare.address, pem(self._spare.server_ca_der))
        self._calls = 0
        described = pb.DescribeResponse.FromString(
            self._honest.unary_unary(f"/{_PERSONALIZATION}/Describe")(b"", timeout=_SECONDS)
        )
        artefact = described.artefacts[0]
        spec = ShiftSpec(
            tuple(artefact.spec.layers),
            artefact.spec.positions,
            artefact.spec.collective_rank,
            artefact.spec.personal_rank,
            artefact.spec.hidden_size,
        )
        self._known = Known.of(artefact.name, artefact.version, spec)
        self._first = self._asked()
        self._process = psutil.Process(cloud.process.pid)
        self._taken = self._process.memory_info().rss  # bytes

    def close(self) -> None:
        for channel in (self._hostile, self._honest, self._leaver, self._anybody):
            channel.close()

    def targets(self) -> list[Target]:
        hints = hints_for(self._known)
        bytes_, calls, streams, enrolments, counts, log = NAMES
        return [
            Target(bytes_, 9, self._raw(hints), self._check_raw, seconds=_SECONDS),
            Target(calls, 9, self._messages(hints), self._check_raw, seconds=_SECONDS),
            Target(streams, 7, self._conversations(hints), self._check_stream, seconds=_SECONDS),
            Target(enrolments, 3, self._enrolments(), self._check_enrolment, seconds=_SECONDS),
            Target(counts, 5, counted(), self._check_counted, seconds=_SECONDS),
            Target(log, 0, st.none(), self._check_log),
        ]

    # -- what is sent ----------------------------------------------------------------------------------

    def _raw(self, hints: dict[str, Any]) -> st.SearchStrategy[tuple[str, bytes]]:
        methods = st.sampled_from([*_UNARY, _GENERATE, *_STREAMS, *_ENROL, *_STRANGE])
        large = st.builds(mul, st.sampled_from([b"\0", b"\x0a", b"\xff"]), st.just(_LARGEST + 1))
        one = edited(self._samples())
        return st.tuples(methods, st.integers(0, 60).flatmap(lambda n: large if n == 60 else one))

    def _messages(self, hints: dict[str, Any]) -> st.SearchStrategy[tuple[str, bytes]]:
        kinds = {**{method: kinds[0] for method, kinds in _UNARY.items()}, _GENERATE: pb.GenerateRequest}
        # Describe, Leave and Renew take next to nothing, so half of the kinds would be all but empty.
        wanted = [_GENERATE, *(m for m in _UNARY if not m.endswith(("Describe", "Leave")))]
        return st.one_of(
            [st.tuples(st.just(method), messages(kinds[method], hints).map(_serialized)) for method in wanted]
        )

    def _conversations(self, hints: dict[str, Any]) -> st.SearchStrategy[tuple[str, list[bytes], int]]:
        """(method, messages in any order, after how many answers to leave; many: never)."""
        shift = st.just(self._known.shift) | messages(pb.Shift, hints)
        ask = mostly(
            messages(pb.Question, hints).map(lambda q: pb.AskRequest(question=q)),
            shift.map(lambda s: pb.AskRequest(shift=s)),
            messages(pb.AskRequest, hints),
        )
        sound, pairs, step = self._update()
        adapt = st.one_of(
            st.just(sound),
            st.just(pairs),
            st.just(step),
            messages(pb.AdaptRequest, hints),
            messages(pb.AdaptStep, hints).map(lambda s: pb.AdaptRequest(step=s)),
            messages(pb.AdaptExamples, hints).map(lambda e: pb.AdaptRequest(examples=e)),
        )
        bad = edited(self._samples())
        leave = st.sampled_from([0, 1, 2, 99, 99, 99])

        def of(
            method: str, one: st.SearchStrategy[Any], *openings: Message
        ) -> st.SearchStrategy[tuple[str, list[bytes], int]]:
            rest = st.lists(mostly(one.map(_serialized), bad), max_size=5)
            opening = st.sampled_from(
                [[_serialized(m) for m in openings[:n]] for n in range(len(openings) + 1)]
            )
            return st.tuples(st.just(method), st.builds(list.__add__, opening, rest), leave)

        ask_method, adapt_method = _STREAMS
        return st.one_of(
            of(ask_method, ask, pb.AskRequest(shift=self._known.shift)),
            of(adapt_method, adapt, sound, pairs, step),
        )

    def _enrolments(self) -> st.SearchStrategy[tuple[str, bytes]]:
        csr, certificate = Identity.create().csr(), self._hostile_enrolment.certificate
        hints = {
            "secret": st.just(self._spare.secret),
            "csr": st.just(csr) | edited([csr]),
            "certificate": st.just(certificate) | edited([certificate]),
        }
        return st.one_of(
            [
                st.tuples(st.just(method), messages(kinds[0], hints).map(_serialized))
                for method, kinds in _ENROL.items()
            ]
        )

    def _update(self) -> tuple[pb.AdaptRequest, pb.AdaptRequest, pb.AdaptRequest]:
        known = self._known
        return (
            pb.AdaptRequest(open=pb.AdaptOpen(artefact=known.artefact, version=known.version)),
            pb.AdaptRequest(examples=pb.AdaptExamples(examples=_pairs())),
            pb.AdaptRequest(step=pb.AdaptStep(personal=known.tensors[1], rows=[0, 2])),
        )

    def _samples(self) -> list[bytes]:
        """Real messages of every kind."""
        generate, gradient, score = self._questions()
        question = pb.Question(number=1, prompt=generate.prompt, sampling=generate.sampling)
        made: list[Message] = [
            generate,
            gradient,
            score,
            *self._update(),
            pb.FetchSeedRequest(artefact=self._known.artefact),
            pb.AskRequest(shift=self._known.shift),
            pb.AskRequest(question=question),
        ]
        return [_serialized(message) for message in made]

    def _questions(self) -> tuple[pb.GenerateRequest, pb.ComputeGradientRequest, pb.ScoreRequest]:
        shift, pairs = self._known.shift, _pairs()
        return (
            pb.GenerateRequest(prompt=pairs[0].prompt, shift=shift, sampling=pb.Sampling(max_new_tokens=8)),
            pb.ComputeGradientRequest(examples=pairs, shift=shift),
            pb.ScoreRequest(
                candidates=[pb.Candidate(prompt=p.prompt, answer=p.target) for p in pairs], shift=shift
            ),
        )

    # -- what comes back -------------------------------------------------------------------------------

    def _check_raw(self, call: tuple[str, bytes]) -> str:
        method, data = call
        # Who has left gets nothing but that answer, so the hostile one has somebody else leave.
        return self._check(self._leaver if method == _LEAVE else self._hostile, method, [data])

    def _check_enrolment(self, call: tuple[str, bytes]) -> str:
        return self._check(self._anybody, call[0], [call[1]])

    def _check_stream(self, conversation: tuple[str, list[bytes], int]) -> str:
        method, sent, leave = conversation
        return self._check(self._hostile, method, sent, leave=leave)

    def _check_counted(self, case: Counted) -> str:
        """Also that the cloud is no larger for it."""
        channel = self._anybody if _ENROLMENT in case.path else self._hostile
        coding = grpc.Compression.Gzip if case.is_compressed else grpc.Compression.NoCompression
        outcome = self._check(channel, case.path, [case.to_bytes()], coding=coding)
        taken = self._process.memory_info().rss - self._taken
        if taken > _GROWTH:
            raise Unsound(f"the cloud took {taken >> 20} MiB")
        return outcome

    def _check(
        self,
        channel: grpc.Channel,
        method: str,
        sent: Sequence[bytes],
        *,
        leave: int = 99,
        coding: grpc.Compression = grpc.Compression.NoCompression,
    ) -> str:
        self._calls += 1
        if self._calls % _PROBE_EVERY == 0:
            self._probe()
        call: Any = channel.stream_stream(method)(iter(sent), timeout=_SECONDS, compression=coding)
        got: list[bytes] = []
        try:
            while len(got) < leave:
                got.append(next(call))
        except StopIteration:
            return _answered(method, got)
        except grpc.RpcError:
            _answered(method, got)
            return _ended(method, call)
        finally:
            call.cancel()
        _answered(method, got)
        return "left"

    def _probe(self) -> None:
        """What an honest device gets now, and got before anybody was hostile."""
        end = time.monotonic() + _SECONDS
        while True:
            try:
                now = self._asked()
                break
            except grpc.RpcError as error:  # the hostile one holds places, which it may for a while
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > end:
                    raise Unsound(f"an honest device was refused: {error.code()}") from error
                time.sleep(0.05)
        if now != self._first:
            raise Unsound("an honest device got other bits than before")

    def _asked(self) -> list[bytes]:
        generate, gradient, score = (_serialized(question) for question in self._questions())
        channel, service = self._honest, _PERSONALIZATION
        parts = channel.unary_stream(_GENERATE)(generate, timeout=_SECONDS)
        # Where an answer is cut into parts is a matter of time, not of anybody's values.
        answer = "".join(pb.GenerateResponse.FromString(part).text for part in parts)
        return [
            answer.encode(),
            channel.unary_unary(f"/{service}/ComputeGradient")(gradient, timeout=_SECONDS),
            channel.unary_unary(f"/{service}/Score")(score, timeout=_SECONDS),
        ]

    def _check_log(self, _: None) -> str:
        self._probe()
        if self._cloud.process.poll() is not None:
            raise Unsound("the cloud has ended")
        said = [line for line in self._log.read_text("utf-8", "replace").splitlines() if "ERROR" in line]
        if said:
            raise Unsound(f"the cloud's log tells of {len(said)} errors, as {said[0][:200]}")
        return "nothing"


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _pairs() -> list[pb.Example]:
    texts = [("the cat sat on the mat", " a cat"), ("the dog ran", " away"), ("to the door", " and out")]
    return [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in texts]


def _answered(method: str, got: Sequence[bytes]) -> str:
    """Whether answers are sound, those before an error too."""
    if method == _GENERATE:
        kind: Callable[[bytes], Any] = pb.GenerateResponse.FromString
    elif method in _STREAMS:
        kind = _STREAMS[method].FromString
    elif method in _UNARY or method in _ENROL:
        kind = (_UNARY | _ENROL)[method][1].FromString
    else:
        return "answered"
    for message in map(kind, got):
        if isinstance(message, pb.AskResponse) and message.failure.code == "internal":
            raise Unsound("a question ended with an internal error")
    return "answered"


def _ended(method: str, call: Any) -> str:
    """What a failed call ended with, where that may be. Raises Unsound."""
    status, details = call.code(), call.details() or ""
    word = dict(call.trailing_metadata() or ()).get("perfit-code")
    if word is not None:
        if word == "internal" or to_status(from_code(status.name, str(word), details))[0] != status.name:
            raise Unsound(f"{method} ended with {status.name} and the code {word}")
        return str(word)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return "a message too large"
    if (status, details) not in _OF_GRPC:
        raise Unsound(f"{method} ended with {status.name} of gRPC: {details[:100]}")
    return _OF_GRPC[status, details]
