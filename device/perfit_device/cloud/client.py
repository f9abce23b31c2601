"""The cloud as plain methods: values in and out, every failure an exception of the shared tree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import grpc

from perfit_device.cancellation import uninterrupted
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.calls import Stream, awaited
from perfit_device.cloud.channels import translate
from perfit_device.cloud.codec import (
    ANSWER_DTYPE,
    LOSS_DTYPE,
    Artefact,
    CloudInfo,
    Prompt,
    ShiftUse,
    chunk_from_wire,
    cloud_info_from_wire,
    prompt_to_wire,
    sampling_to_wire,
    scores_from_wire,
    shift_to_wire,
    tensors_from_wire,
)
from perfit_device.cloud.connections import Connection, Connections
from perfit_device.cloud.identity import Enrolment, identity_in, life_left
from perfit_device.cloud.retry import TRANSIENT
from perfit_device.cloud.sealing import Sealing, trusted_roots
from perfit_shared.errors import (
    BrokenOff,
    CertificateExpired,
    CertificateSuperseded,
    CertificateValid,
    NotHere,
    PerfitError,
    SealRequired,
    SealUnknown,
    ShiftMismatch,
    Unavailable,
)
from perfit_shared.shifts import ShiftTensors, gradient_from_bytes
from perfit_shared.starts import MOST_STARTS
from perfit_shared.types import Chunk, Sampling, Score
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services

__all__ = ["ANSWER_CHARACTERS", "Cloud"]

_T = TypeVar("_T")
# Deadlines in seconds. The long ones leave room for a queue in front of a busy CPU cloud.
_DEADLINES = {"Describe": 20.0, "FetchSeed": 60.0, "Score": 300.0, "ComputeGradient": 300.0}
_GENERATE_SECONDS = 600.0
ANSWER_CHARACTERS = 1 << 20  # no honest answer is longer
_LAPSING = 0.001  # share of life left below which a certificate counts as lapsed


class Cloud:
    """One cloud, over mutual TLS. Use `with`; safe for several threads at once.

    `on_renewed` saves a new certificate before its first use, which retires the old one; when it raises,
    the old one stays. `reload_enrolment` gives the certificate that another process of this device may
    have saved, when the cloud says that this one is retired. `bytes_up` and `bytes_down` count the
    messages sent and received, without TLS, HTTP/2 and what seals them. With `sealing` every call is sealed,
    but for the Describe that asks for the keys.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        on_renewed: Callable[[Enrolment], None] | None = None,
        reload_enrolment: Callable[[], Enrolment | None] | None = None,
        sealing: Sealing | None = None,
    ) -> None:
        self.enrolment = enrolment
        self.sealing = sealing
        self.bytes_up = 0
        self.bytes_down = 0
        self._on_renewed = on_renewed
        self._reload_enrolment = reload_enrolment
        self._lock = threading.Lock()  # held while the certificate is renewed
        self._counting = threading.Lock()
        self._connections = Connections(sealing, self._sealing_keys)
        self._open()

    def _open(self) -> None:
        """A channel for a certificate that holds, renewed first where that is due."""
        if life_left(self.enrolment.certificate) <= _LAPSING:
            with suppress(CertificateValid):  # by the cloud's clock
                self.enrolment = self._renewed_lapsed()
        at = self._connections.renew(self.enrolment)
        if enrolments.wants_renewal(self.enrolment):
            try:
                self._save(enrolments.renew(at.channel, self.enrolment, at.address))
            except PerfitError:
                return  # the old one still holds; the call that follows says what is wrong
            self._connections.renew(self.enrolment)

    def _save(self, enrolment: Enrolment) -> None:
        if self._on_renewed is not None:
            self._on_renewed(enrolment)  # before it can be used
        self.enrolment = enrolment

    def close(self) -> None:
        """Ends every call in flight."""
        self._connections.close()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return self.enrolment.address

    # -- calls ---------------------------------------------------------------------------------

    def describe(self) -> CloudInfo:
        return cloud_info_from_wire(self._call("Describe", pb.DescribeRequest()))

    def fetch_seed(self, artefact: Artefact) -> ShiftTensors:
        """The plain one. Raises ShiftMismatch when the cloud has replaced the artefact since."""
        return self.fetch_starts(artefact)[0]

    def fetch_starts(self, artefact: Artefact) -> tuple[ShiftTensors, ...]:
        """The plain seed, then those of communities. Raises as `fetch_seed`."""
        response = self._call("FetchSeed", pb.FetchSeedRequest(artefact=artefact.name))
        if response.version != artefact.version:
            raise ShiftMismatch(f"the cloud replaced {artefact.name} just now; try again")
        found = (response.seed, *response.communities)
        if len(found) > MOST_STARTS:
            raise PerfitError(f"the cloud sent {len(found):,} seeds, more than can be; tell its operator")
        return tuple(tensors_from_wire(ShiftTensors.from_bytes, each, artefact, "a seed") for each in found)

    def generate(self, prompt: Prompt, use: ShiftUse, sampling: Sampling) -> Iterator[Chunk]:
        """Chunks of an answer as they come. Closing the iterator cancels the call."""
        request = pb.GenerateRequest(
            prompt=prompt_to_wire(prompt),
            shift=shift_to_wire(use, ANSWER_DTYPE),
            sampling=sampling_to_wire(sampling),
        )

        def begin() -> tuple[Stream, list[Any]]:
            self._count(up=request.ByteSize())
            responses = self._begun(lambda stub: stub.Generate(request, timeout=_GENERATE_SECONDS))
            try:
                return responses, list(islice(responses, 1))
            except BaseException:
                responses.close()
                raise

        responses, first = self.renewing(begin)
        length = 0
        with closing(responses):
            for response in chain(first, responses):
                length += max(1, len(response.text), len(response.logprobs))  # also of chunks without text
                if length > ANSWER_CHARACTERS:
                    raise PerfitError("the cloud sends without end; the answer was cut off")
                yield chunk_from_wire(response)

    def score(self, candidates: Sequence[tuple[Prompt, str]], use: ShiftUse) -> list[Score]:
        """Log-likelihoods of (prompt, answer) pairs, in their order."""
        request = pb.ScoreRequest(shift=shift_to_wire(use, LOSS_DTYPE))
        for prompt, answer in candidates:
            request.candidates.add(prompt=prompt_to_wire(prompt), answer=answer)
        return scores_from_wire(self._call("Score", request), len(candidates))

    def compute_gradient(
        self, examples: Sequence[tuple[Prompt, str]], artefact: Artefact, tensors: ShiftTensors
    ) -> tuple[float, int, ShiftTensors]:
        """(loss in nats a token, target tokens, d loss / d tensors) of one batch."""
        shift = shift_to_wire(ShiftUse(artefact, tensors), LOSS_DTYPE)
        request = pb.ComputeGradientRequest(shift=shift)
        for prompt, target in examples:
            request.examples.add(prompt=prompt_to_wire(prompt), target=target)
        response = self._call("ComputeGradient", request)
        gradient = tensors_from_wire(gradient_from_bytes, response.gradient, artefact, "a gradient")
        return response.loss, response.tokens, gradient

    def stream(self, method: str, requests: Iterator[Any], seconds: float) -> Stream:
        """A call that streams both ways, for at most `seconds`; gRPC reads `requests` in its own thread."""

        def counted() -> Iterator[Any]:
            for request in requests:
                self._count(up=request.ByteSize())
                yield request

        return self._begun(lambda stub: getattr(stub, method)(counted(), timeout=seconds))

    def renewing(self, call: Callable[[], _T]) -> _T:
        """The call's value; calls once more with a new certificate when the old one lapsed meanwhile.

        Also when the server that it reached has other sealing keys, and when another process of this device
        renewed the certificate. Raises CertificateSuperseded when somebody else did. On an open channel the
        cloud names the reason. It opens no channel for a lapsed certificate: then only `BrokenOff` arrives,
        which a stopping cloud causes, too.
        """
        used = self.enrolment
        try:
            return call()
        except CertificateSuperseded:
            self._replace(used, self._reloaded)
        except SealUnknown:
            pass  # the sealer has forgotten that key, and asks for others
        except CertificateExpired:
            self._replace(used, self._renewed_lapsed)
        except BrokenOff as broken:
            try:
                self._replace(used, self._renewed_lapsed)
            except (*TRANSIENT, CertificateValid):
                raise broken from None
        return call()

    def _replace(self, used: Enrolment, other: Callable[[], Enrolment]) -> None:
        """Another certificate than that one, and a channel with it."""
        with self._lock:
            if self.enrolment is used:
                self.enrolment = other()
                self._connections.renew(self.enrolment)

    def _renewed_lapsed(self) -> Enrolment:
        try:
            self._save(enrolments.renew_lapsed(self.enrolment))
        except CertificateSuperseded:
            return self._reloaded()
        return self.enrolment

    def _reloaded(self) -> Enrolment:
        """What another process of this device has saved. Raises CertificateSuperseded when none did."""
        saved = self._reload_enrolment() if self._reload_enrolment is not None else None
        if saved is None or saved.certificate == self.enrolment.certificate:
            raise CertificateSuperseded(
                "this identity was renewed elsewhere: the cloud knows a newer certificate than this device. "
                "Unless its vault is an old copy, somebody has its key: let the operator revoke "
                f"{identity_in(self.enrolment.certificate)[:32]}, and enrol anew with --replace"
            )
        return saved

    # -- plumbing ------------------------------------------------------------------------------

    def _call(self, method: str, request: Any) -> Any:
        return self.renewing(lambda: self._call_once(method, request))

    def _call_once(self, method: str, request: Any) -> Any:
        self._count(up=request.ByteSize())
        connection = self._connections.for_call()
        try:
            self._prepare(connection)
            response = awaited(getattr(connection.stub, method), request, _DEADLINES[method])
        except grpc.RpcError as error:
            raise self._translated(error, connection) from error
        finally:
            connection.end()
        self._count(down=response.ByteSize())
        return response

    def _prepare(self, connection: Connection) -> None:
        """As the connection's, and leaves it where no key is offered and another address may have some."""
        try:
            connection.prepare()
        except SealRequired as error:
            if "," not in self.enrolment.address:
                raise
            self._connections.move(connection)
            raise Unavailable(str(error)) from None

    def _sealing_keys(self, channel: grpc.Channel) -> Iterable[pb.SealingKey]:
        """Of the cloud that is behind this channel, in the clear. Nothing else of the answer is used.

        Raises grpc.RpcError, which the call that needs the keys translates.
        """
        stub: Any = services.PersonalizationStub(channel)
        described = awaited(stub.Describe, pb.DescribeRequest(), _DEADLINES["Describe"])
        return list(described.sealing_keys)

    def _begun(self, begin: Callable[[Any], Any]) -> Stream:
        connection = self._connections.for_call()
        try:
            self._prepare(connection)
            with uninterrupted():
                call = begin(connection.stub)
        except grpc.RpcError as error:
            connection.end()
            raise self._translated(error, connection) from error
        except BaseException:
            connection.end()
            raise
        translated = partial(self._translated, connection=connection)
        return Stream(call, lambda size: self._count(down=size), translated, connection.end)

    def _translated(self, error: grpc.RpcError, connection: Connection) -> PerfitError:
        ours = translate(error, connection.address, trusted_roots(self.enrolment, self.sealing))
        has_several = "," in self.enrolment.address
        if isinstance(ours, NotHere) and has_several:
            ours = Unavailable(str(ours))  # another of the addresses does it
        if isinstance(ours, Unavailable):
            self._connections.move(connection)
            if has_several:
                ours.retry_ms = 0  # that one asked for the delay, and the next call goes to another
        return ours

    def _count(self, *, up: int = 0, down: int = 0) -> None:
        with self._counting:
            self.bytes_up += up
            self.bytes_down += down
