"""Every RPC and every way that a call can end, and a look at the server before, during and after each.

    before   nothing may be there: the canaries are new (negative control)
    during   tensors and text must be there: the scanner finds (positive control)
    after    the call has ended and the server is at rest; its channel is still open
    closed   the channel has ended, too: nothing may be left, with hardening on

A server with hardening off comes first. What is left there shows that the scanner would find it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from perfit_cloud.audit.calls import CALLS, Canaries, PersonalCall, Running
from perfit_cloud.audit.foreseen import Foresight
from perfit_cloud.audit.memory import Look, cpu_seconds, look_at, settle, stopped
from perfit_cloud.audit.needles import Needle, raw
from perfit_cloud.audit.search import Index
from perfit_cloud.audit.server import AuditedServer, Connection, DeviceKey
from perfit_shared.errors import PerfitError
from perfit_shared.wire import enrollment_pb2 as enrol_pb

__all__ = ["ENDINGS", "RPCS", "Plan", "Row", "audit", "is_kept"]

RPCS = (*CALLS, "Enroll", "Renew")
ENDINGS = ("done", "cancelled", "deadline", "refused", "gone")
_DTYPES = ("float32", "float16", "int8")
_STATUS = {  # what the client sees
    "done": {"OK"},
    "cancelled": {"CANCELLED"},
    "deadline": {"DEADLINE_EXCEEDED"},
    "refused": {"INVALID_ARGUMENT"},
    "gone": {"UNAVAILABLE", "CANCELLED"},
}
_MANY_TOKENS, _MANY_EXAMPLES = 192, 48  # enough work for the server to be caught at it
_FEW_TOKENS, _FEW_EXAMPLES = 48, 4
_SECONDS = 120.0  # deadline where that is not what ends the call
_REST_SECONDS = 2.0  # after a call: a server overwrites some of it a moment later
_LOOKS = 8  # at a call under way, until something is found
_TRIES = 3


@dataclass(frozen=True)
class Plan:
    """What to audit."""

    model: str  # folder or hub name
    artefact: Path  # folder
    folder: Path  # empty; for the servers' state
    rpcs: Sequence[str] = RPCS
    endings: Sequence[str] = ENDINGS
    devices: int = 16  # at once, in the scenario of load; 0: none
    seed: int = 0
    is_quick: bool = False  # with hardening off only one call, and fewer with it on
    flags: Sequence[str] = ()  # more, for `perfit-cloud serve`


@dataclass(frozen=True)
class Row:
    """What one look found."""

    hardening: str  # "on" or "off"
    rpc: str
    ending: str
    moment: str  # "before", "during", "after" or "closed"
    found: dict[str, tuple[str, ...]]  # where, by kind of needle
    searched: int  # bytes
    unreadable: tuple[str, ...]

    @property
    def fault(self) -> str:
        """What is wrong with it; empty: nothing."""
        if self.moment == "before" and self.found:
            return "found what was never sent: these needles prove nothing"
        if self.moment == "during" and not (_holds(self.found, "tensor") and _holds(self.found, "text")):
            return "found no tensors or no text while the server worked on them: a blind scanner"
        if self.moment == "closed" and self.hardening == "on" and self.found:
            return "not forgotten"
        return ""


def is_kept(rows: Sequence[Row]) -> bool:
    """Whether the promise was kept, and every control found what it should."""
    closed = [row for row in rows if row.moment == "closed"]
    could_find = any(row.found for row in closed if row.hardening == "off")
    has_looked = any(row.hardening == "on" for row in closed)
    return could_find and has_looked and not any(row.fault for row in rows)


def audit(plan: Plan, foresight: Foresight, report: Callable[[Row], None]) -> list[Row]:
    """All rows; each is told to `report` as it comes. Raises PerfitError when a scenario cannot be played."""
    rows: list[Row] = []
    for hardening in ("off", "on"):
        of_mode = _reduced(plan, hardening)
        server = AuditedServer(
            plan.folder / f"hardening-{hardening}", model=plan.model, artefact=plan.artefact,
            hardening=hardening, flags=plan.flags,
        )  # fmt: skip
        with server:
            for row in _Auditor(of_mode, server, foresight, hardening).rows():
                rows.append(row)
                report(row)
    return rows


def _reduced(plan: Plan, hardening: str) -> Plan:
    if not plan.is_quick:
        return plan
    if hardening == "off":
        return replace(plan, rpcs=plan.rpcs[:1], endings=plan.endings[:1], devices=0)
    few = [ending for ending in plan.endings if ending in ("done", "gone")]
    return replace(plan, endings=few or plan.endings, devices=0)


class _Auditor:
    """The scenarios of one server."""

    def __init__(self, plan: Plan, server: AuditedServer, foresight: Foresight, hardening: str) -> None:
        self._plan, self._server, self._foresight, self._hardening = plan, server, foresight, hardening
        self._tokens = min(_MANY_TOKENS, foresight.base.context - 64)
        self._made = 0  # calls

    def rows(self) -> Iterator[Row]:
        settle(self._server.pid)
        device = self._server.enrol(1)[0]
        for rpc in self._plan.rpcs:
            if rpc in CALLS:
                for ending in self._plan.endings:
                    yield from self._scenario(rpc, ending, device)
        yield from self._identities(device)
        if self._plan.devices:
            yield from self._load(self._plan.devices)

    # -- one call --------------------------------------------------------------------------------

    def _scenario(self, rpc: str, ending: str, device: DeviceKey) -> Iterator[Row]:
        call = self._call(rpc, _DTYPES[self._made % 3], is_long=True)
        where = (rpc, ending)
        began = time.monotonic()
        index, row = self._before(*where, call.needles)
        yield row
        looking = time.monotonic() - began
        connection = self._server.connect(device)
        try:
            grpc.channel_ready_future(connection.channel).result(_SECONDS)  # the handshake takes its time
            with ExitStack() as held:
                # Long enough for some looks, short enough to wait for.
                seconds = 2 + 4 * looking if ending == "deadline" else _SECONDS
                if ending == "refused":  # at once: there is nothing to catch it at
                    running = call.refused(connection.personalization, seconds)
                else:
                    running, look = self._caught(call, connection, index, seconds=seconds, held=held)
                    yield self._row(*where, "during", look, index)
                if ending == "cancelled":
                    running.cancel()
                elif ending == "deadline":
                    running.wait(seconds + 10)
                elif ending == "gone" and connection.relay is not None:
                    connection.relay.cut()
            self._ended(running, call, ending, where)
            index = Index([*index.needles, *call.received(running.replies)])
            yield self._look(*where, "after", index)
        finally:
            connection.close()
        yield self._look(*where, "closed", index)

    def _caught(
        self, call: PersonalCall, connection: Connection, index: Index, *, seconds: float, held: ExitStack
    ) -> tuple[Running, Look]:
        """The call under way on a server that is stopped at it until `held` ends, and what was found.

        Raises PerfitError when it ends before anything is found.
        """
        for attempt in range(_TRIES):
            running = call.start(connection.personalization, seconds * 2**attempt)
            for number in range(_LOOKS):
                _let_work(self._server.pid, 0.02 * 1.5**number, running)
                with ExitStack() as hold:
                    hold.enter_context(stopped(self._server.pid))
                    if running.status is not None:
                        break
                    look = look_at(self._server.pid, index)
                    kinds = {index.needles[found.needle].kind for found in look.found}
                    if number == _LOOKS - 1 or (_holds(kinds, "tensor") and _holds(kinds, "text")):
                        held.push(hold.pop_all())
                        return running, look
        raise PerfitError(
            f"{call.rpc} ended ({running.status}) before the server was caught at it; audit a larger model"
        )

    def _ended(self, running: Running, call: PersonalCall, ending: str, where: tuple[str, str]) -> None:
        """Wait for the end of the call. Raises PerfitError when it ended in another way than it should."""
        try:
            if ending == "done":
                running.wait(_SECONDS, call.is_answered)
                running.send(None)
            running.wait(_SECONDS)
        except TimeoutError:
            raise PerfitError(f"{' '.join(where)}: the call did not end") from None
        if running.status not in _STATUS[ending]:
            raise PerfitError(f"{' '.join(where)}: the call ended with {running.status}")

    # -- identities ------------------------------------------------------------------------------

    def _identities(self, device: DeviceKey) -> Iterator[Row]:
        """Enroll carries the invite's secret. A device's key is never sent, and looked for all the same."""
        for ending in ("done", "refused"):
            if "Enroll" in self._plan.rpcs and ending in self._plan.endings:
                invite, new = self._server.invites(1)[0], DeviceKey()
                needles = [raw("invite secret", invite.secret), raw("device key", new.secret)]
                csr = new.csr() if ending == "done" else new.secret[:1] * 100

                def enrol(connection: Connection, secret: bytes = invite.secret, csr: bytes = csr) -> None:
                    request = enrol_pb.EnrollRequest(secret=secret, csr=csr)
                    connection.enrollment.Enroll(request, timeout=_SECONDS)

                yield from self._short("Enroll", ending, needles, self._server.enrolment(invite), enrol)
        if "Renew" in self._plan.rpcs and "done" in self._plan.endings:

            def renew(connection: Connection) -> None:
                connection.identity.Renew(enrol_pb.RenewRequest(csr=device.csr()), timeout=_SECONDS)

            needles = [raw("device key", device.secret)]
            yield from self._short("Renew", "done", needles, self._server.connect(device), renew)

    def _short(
        self, rpc: str, ending: str, needles: list[Needle], connection: Connection,
        call: Callable[[Connection], None],
    ) -> Iterator[Row]:  # fmt: skip
        """A call too short to be caught at work."""
        index, row = self._before(rpc, ending, needles)
        yield row
        with connection, suppress(grpc.RpcError):
            call(connection)
            yield self._look(rpc, ending, "after", index)
        yield self._look(rpc, ending, "closed", index)

    # -- many devices ----------------------------------------------------------------------------

    def _load(self, count: int) -> Iterator[Row]:
        """All devices at once, each with canaries of its own; of four one cancels and one is cut off."""
        where = ("every RPC", f"{count} devices")
        kinds = [rpc for rpc in self._plan.rpcs if rpc in CALLS] or list(CALLS)
        calls = [self._call(kinds[n % len(kinds)], _DTYPES[n % 3], is_long=n % 2 == 0) for n in range(count)]
        index, row = self._before(*where, [needle for call in calls for needle in call.needles])
        yield row
        connections = [self._server.connect(device) for device in self._server.enrol(count)]
        try:
            for connection in connections:  # the handshakes are no part of the load
                grpc.channel_ready_future(connection.channel).result(_SECONDS)
            running = [
                call.start(connection.personalization, _SECONDS)
                for call, connection in zip(calls, connections, strict=True)
            ]
            _let_work(self._server.pid, 0.2, running[0])
            with stopped(self._server.pid):
                yield self._row(*where, "during", look_at(self._server.pid, index), index)
                for number, connection in enumerate(connections):
                    if number % 4 == 1:
                        running[number].cancel()
                    elif number % 4 == 3 and connection.relay is not None:
                        connection.relay.cut()
            needles: list[Needle] = list(index.needles)
            for call, of_call in zip(calls, running, strict=True):
                of_call.wait(_SECONDS, call.is_answered)
                of_call.send(None)
                of_call.wait(_SECONDS)
                needles += call.received(of_call.replies)
            index = Index(needles)
            yield self._look(*where, "after", index)
        finally:
            for connection in connections:
                connection.close()
        yield self._look(*where, "closed", index)

    # -- looking ---------------------------------------------------------------------------------

    def _call(self, rpc: str, dtype: str, *, is_long: bool) -> PersonalCall:
        self._made += 1
        canaries = Canaries([self._plan.seed, self._made, self._hardening == "on"], self._foresight)
        size: dict[str, Any]
        if rpc in ("Generate", "Ask"):
            size = {"tokens": self._tokens if is_long else min(_FEW_TOKENS, self._tokens)}
        else:
            size = {"examples": _MANY_EXAMPLES if is_long else _FEW_EXAMPLES}
        made: PersonalCall = CALLS[rpc](canaries, dtype, **size)
        return made

    def _before(self, rpc: str, ending: str, needles: list[Needle]) -> tuple[Index, Row]:
        """The index of the needles that can tell, and what was found of them before anything was sent.

        The words of an answer are the model's own. Some of their parts stand in libraries, and say nothing.
        """
        index = Index(needles)
        settle(self._server.pid)
        with stopped(self._server.pid):
            look = look_at(self._server.pid, index, [self._server.folder])
        public: dict[int, set[tuple[int, int, int]]] = {}
        for found in look.found:
            if index.needles[found.needle].kind.startswith("answer text"):
                public.setdefault(found.needle, set()).update(found.spans)
        if public:
            kept = [n.without(public.get(number, ())) for number, n in enumerate(index.needles)]
            look = replace(look, found=tuple(f for f in look.found if f.needle not in public))
            row = self._row(rpc, ending, "before", look, index)
            return Index(kept), row
        return index, self._row(rpc, ending, "before", look, index)

    def _look(self, rpc: str, ending: str, moment: str, index: Index) -> Row:
        settle(self._server.pid, rest=_REST_SECONDS)
        with stopped(self._server.pid):
            look = look_at(self._server.pid, index, [self._server.folder])
        return self._row(rpc, ending, moment, look, index)

    def _row(self, rpc: str, ending: str, moment: str, look: Look, index: Index) -> Row:
        places: dict[str, dict[str, None]] = {}
        for found in look.found:
            places.setdefault(index.needles[found.needle].kind, {})[found.where] = None
        kinds = {kind: tuple(of_kind) for kind, of_kind in places.items()}
        return Row(self._hardening, rpc, ending, moment, kinds, look.searched, look.unreadable)


def _let_work(pid: int, seconds: float, running: Running) -> None:
    """Until the server has worked for so long, or has nothing to do, or the call is over."""
    goal, end = cpu_seconds(pid) + seconds, time.monotonic() + 20 * seconds
    while cpu_seconds(pid) < goal and time.monotonic() < end and running.status is None:
        time.sleep(0.002)


def _holds(kinds: Iterable[str], word: str) -> bool:
    return any(word in kind.split() for kind in kinds)
