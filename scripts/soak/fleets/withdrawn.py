"""Devices that are withdrawn while they call: none may be answered later than the promise says.

One after another, a new device calls every replica directly, some twenty times a second, and keeps a stream
of an update open at one. Then it is revoked. A call that begins later than 2 s after that must be refused,
and the stream must be over; 30 s where the database was away meanwhile.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc

from perfit_cloud.service.identity.certificates import identity_of, read_certificate
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_shared.errors import PerfitError
from perfit_shared.invites import Invite
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services
from soak.fleets.processes import Fleet

__all__ = ["Withdrawn"]

_SECONDS, _AWAY_SECONDS = 2.0, 30.0  # the promise
_BEFORE_SECONDS = 1.5  # of calls before it is revoked
_LOOK_SECONDS = 0.05
_CALL_SECONDS = 5.0
_PATIENCE = 60.0


class Withdrawn:
    """A thread that goes on until `stop`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.wrong: list[str] = []
        self.count = 0  # devices that were revoked
        self.answered = 0  # calls before
        self.refused = 0  # calls after
        self.latest = 0.0  # seconds after a revocation at which a call began that was answered
        self.latest_away = 0.0  # the same where the database was away
        self.latest_stream = 0.0  # at which a stream was over
        self._revoked: list[Enrolment] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="withdrawn", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """And see that all who were revoked still are, at every replica that is up."""
        self._over.set()
        self._thread.join(_PATIENCE + _AWAY_SECONDS)
        for enrolment in self._revoked:
            for at in self._ways(enrolment):
                if self._call(at) == "OK":
                    self.wrong.append("a device that was revoked is answered at the end")

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._one()
        except Exception as error:
            self.wrong.append(f"the devices that are withdrawn: {type(error).__name__}: {error}"[:300])

    def _one(self) -> None:
        enrolment = self._patiently(self._enrolled)
        identity = identity_of(read_certificate(enrolment.certificate))
        ways = self._ways(enrolment)
        try:
            end = time.monotonic() + _BEFORE_SECONDS
            while time.monotonic() < end:
                for way in ways:
                    self.answered += self._call(way) == "OK"
                time.sleep(_LOOK_SECONDS)
            stream, ended_at = self._stream(ways[self.count % len(ways)])
            self._patiently(lambda: self._fleet.authority.revoke(identity))
            self._watch(ways, stream, ended_at, time.monotonic())
        finally:
            for way in ways:
                way.close()
        self._revoked.append(enrolment)
        self.count += 1

    def _watch(self, ways: list[grpc.Channel], stream: Any, ended_at: list[float], revoked: float) -> None:
        """Until every replica that answers at all refused it twice, and the stream is over."""
        refusals = [0] * len(ways)
        while time.monotonic() < revoked + _AWAY_SECONDS + _SECONDS:
            for n, way in enumerate(ways):
                begun = time.monotonic()
                status = self._call(way)
                if status == "OK":
                    self._late(begun - revoked, self._fleet.was_away(revoked, begun))
                    refusals[n] = 0
                refusals[n] += status == "PERMISSION_DENIED"
                self.refused += status == "PERMISSION_DENIED"
            past = time.monotonic() - revoked
            if past > 2 * _SECONDS and stream.done() and all(r >= 2 for r in refusals if r or past < 10):
                break
            time.sleep(_LOOK_SECONDS)
        if not stream.done():
            self.wrong.append("the stream of a device that was revoked is still open")
            stream.cancel()
        elif ended_at:
            seconds = max(0.0, ended_at[0] - revoked)
            if not self._fleet.was_away(revoked, ended_at[0]):
                self.latest_stream = max(self.latest_stream, seconds)
                if seconds > _SECONDS:
                    self.wrong.append(f"a stream ended {seconds:.2f} s after its device was revoked")

    def _late(self, seconds: float, was_away: bool) -> None:
        if was_away:
            self.latest_away = max(self.latest_away, seconds)
        else:
            self.latest = max(self.latest, seconds)
        if seconds > (_AWAY_SECONDS if was_away else _SECONDS):
            self.wrong.append(f"a call was answered {seconds:.2f} s after its device was revoked")

    # -- calls -------------------------------------------------------------------------------------------

    def _enrolled(self) -> Enrolment:
        authority = self._fleet.authority
        secret, expires = authority.invite(600)
        invite = Invite(self._fleet.enrol_address, authority.server_ca_der, expires, secret)
        return enroll(invite, Identity.create())

    def _ways(self, enrolment: Enrolment) -> list[grpc.Channel]:
        """A channel to each replica, past the balancer."""
        return [mutual_channel(enrolment, f"127.0.0.1:{replica.port}") for replica in self._fleet.replicas]

    def _call(self, channel: grpc.Channel) -> str:
        """The status of a call."""
        stub: Any = services.PersonalizationStub(channel)
        try:
            stub.Describe(pb.DescribeRequest(), timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            call: Any = error
            return str(call.code().name)
        return "OK"

    def _stream(self, channel: grpc.Channel) -> tuple[Any, list[float]]:
        """A stream on which nobody says anything, and when it ended."""
        silent = threading.Event()

        def nothing() -> Any:
            silent.wait(_PATIENCE + _AWAY_SECONDS)
            yield from ()

        ended_at: list[float] = []
        stub: Any = services.PersonalizationStub(channel)
        stream = stub.Adapt(nothing(), timeout=_PATIENCE + _AWAY_SECONDS)

        def over() -> None:
            ended_at.append(time.monotonic())
            silent.set()

        if not stream.add_callback(over):
            over()
        return stream, ended_at

    def _patiently(self, act: Any) -> Any:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return act()
            except PerfitError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
