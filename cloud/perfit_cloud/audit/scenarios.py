"""Every RPC and every way that a call can end, and a look at the server before, during and after each.

    before   nothing may be there: the canaries are new (negative control)
    during   tensors and words (text or ids) must be there: the scanner finds (positive control)
    after    the call has ended and the server is at rest; its channel is still open
    closed   the channel has ended, too: nothing may be left, with hardening on

A server with hardening off comes first, for every RPC once. What is left there shows that the scanner
would find it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from perfit_cloud.audit.calls import CALLS, Canaries, PersonalCall, Running
from perfit_cloud.audit.memory import Look, Pages, cpu_seconds, look_at, settle, stopped
from perfit_cloud.audit.needles import Needle, raw
from perfit_cloud.audit.reference import ReferenceEngines
from perfit_cloud.audit.rows import Row, unseen
from perfit_cloud.audit.search import Index
from perfit_cloud.audit.server import AuditedServer, Connection, DeviceKey, Sealed, signature_of
from perfit_shared.errors import PerfitError
from perfit_shared.wire import enrollment_pb2 as enrol_pb

__all__ = ["ENDINGS", "RPCS", "Plan", "audit", "caught"]

RPCS = (*CALLS, "Enroll", "Renew", "Leave")
ENDINGS = ("done", "cancelled", "deadline", "refused", "gone")
_DTYPES = ("float32", "float16", "int8")
_STATUS = {  # what the client sees
    "done": {"OK"},
    "cancelled": {"CANCELLED"},
    "deadline": {"DEADLINE_EXCEEDED"},
    "refused": {"INVALID_ARGUMENT"},
    "not here": {"UNIMPLEMENTED"},
    "gone": {"UNAVAILABLE", "CANCELLED"},
}
_MANY_TOKENS, _MANY_EXAMPLES = 192, 48  # enough work for the server to be caught at it
_FEW_TOKENS, _FEW_EXAMPLES = 48, 4
_WORDS = 5  # of an example's prompt; more where the server was too fast
_SECONDS = 600.0  # deadline where that is not what ends the call
_REST_SECONDS = 2.0  # after a call: a server overwrites some of it a moment later
_LAST_REST_SECONDS = 4.0  # after its channel: longer than between two sweeps, so that the last was
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
    is_quick: bool = False  # with hardening off only one call, with it on two endings; no load
    flags: Sequence[str] = ()  # more, for `perfit-cloud serve`
    sealed: Sealed | None = None  # what seals the devices' calls; None: nothing
    # Makes an empty PostgreSQL database: replicas of fleets are audited; None: servers that do everything
    database: Callable[[], str] | None = None


def audit(plan: Plan, reference: ReferenceEngines, report: Callable[[Row], None]) -> list[Row]:
    """All rows; `report` gets each as it comes. Raises PerfitError when a scenario fails to play out."""
    rows: list[Row] = []
    for hardening in ("off", "on"):
        of_mode = _of_mode(plan, hardening)
        server = AuditedServer(
            plan.folder / f"hardening-{hardening}",
            model=plan.model,
            artefact=plan.artefact,
            hardening=hardening,
            flags=plan.flags,
            sealed=plan.sealed,
            database=plan.database() if plan.database is not None else "",
        )
        with server:
            for row in _Auditor(of_mode, server, reference, hardening, rows).rows():
                rows.append(row)
                report(row)
    return rows


def _of_mode(plan: Plan, hardening: str) -> Plan:
    """With hardening off each RPC runs once, as the control of all others."""
    devices = 0 if plan.is_quick else plan.devices
    if hardening == "off":
        rpcs = () if plan.is_quick else tuple(rpc for rpc in plan.rpcs if rpc != "Generate")
        return replace(plan, rpcs=("Generate", *rpcs), endings=("done",), devices=devices)
    few = [ending for ending in plan.endings if ending in ("done", "gone")]
    return replace(plan, endings=(few if plan.is_quick else []) or plan.endings, devices=devices)


class _Auditor:
    """The scenarios of one server."""

    def __init__(
        self,
        plan: Plan,
        server: AuditedServer,
        reference: ReferenceEngines,
        hardening: str,
        so_far: Sequence[Row],
    ) -> None:
        self._plan, self._server, self._foresight, self._hardening = plan, server, reference, hardening
        self._so_far = so_far  # rows of the whole audit
        self._tokens = min(_MANY_TOKENS, reference.base.context - 64)
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
        """Raises PerfitError when the call ends in another way, or before the server is caught at it."""
        dtype = _DTYPES[self._made % 3]
        for effort in range(1, _TRIES + 1):
            call = self._call(rpc, dtype, effort)
            began = time.monotonic()
            search = _ScenarioSearch(self._server, self._hardening, rpc, ending, call.needles)
            rows = [search.before()]
            # Long enough for some looks, short enough to wait for.
            seconds = 2 + 4 * (time.monotonic() - began) * effort if ending == "deadline" else _SECONDS
            connection = self._server.connect(device)
            try:
                grpc.channel_ready_future(connection.channel).result(_SECONDS)  # the handshake takes its time
                with ExitStack() as held:
                    if ending == "refused":  # at once: there is nothing to catch it at
                        running = call.refused(connection.personalization, seconds)
                    else:
                        running = call.start(connection.personalization, seconds)
                        row = caught(self._server.pid, running, search.during, held, self._wanted(ending))
                        if row is None:
                            continue
                        rows.append(row)
                        _end(running, ending, connection, seconds)
                _ended(running, call, ending, search.name)
                search.add(call.received(running.replies))
                if ending != "gone":  # whose channel ended with it
                    rows.append(search.at_rest("after"))
            finally:
                connection.close()
            yield from rows
            yield search.at_rest("closed")
            return
        raise PerfitError(
            f"{rpc} {ending}: the call ended before the server was caught at it; audit a larger model"
        )

    def _wanted(self, ending: str) -> Callable[[Row], bool]:
        """Whether a look at a call under way left something to be found.

        Of calls that are cut off the first look that found its controls will do. One that is answered is
        looked at until every family of needles was found once: a server holds some for a moment alone.
        """
        return lambda row: ending == "done" and bool(unseen([*self._so_far, row]))

    # -- identities ------------------------------------------------------------------------------

    def _identities(self, device: DeviceKey) -> Iterator[Row]:
        """Enroll carries the invite's secret. A device never sends its key; the search covers it anyway."""
        for ending in ("done", "refused"):
            if "Enroll" in self._plan.rpcs and ending in self._plan.endings and self._server.enrols:
                invite, new = self._server.invites(1)[0], DeviceKey()
                csr = new.csr() if ending == "done" else b"no signing request"
                enrol = enrol_pb.EnrollRequest(secret=invite.secret, csr=csr)
                needles = [raw("invite secret", invite.secret), raw("device key", new.secret)]
                connection = self._server.enrolment(invite)
                yield from self._short(
                    "Enroll", ending, needles, connection, partial(connection.enrollment.Enroll, enrol)
                )
        if "Renew" in self._plan.rpcs and "done" in self._plan.endings:
            csr = device.csr()
            needles = [raw("signing request", signature_of(csr)), raw("device key", device.secret)]
            connection = self._server.connect(device)
            renew = partial(connection.identity.Renew, enrol_pb.RenewRequest(csr=csr))
            ending = "done" if self._server.enrols else "not here"  # a replica reads it and refuses
            yield from self._short("Renew", ending, needles, connection, renew)
        if "Leave" in self._plan.rpcs and "done" in self._plan.endings:
            leaver = self._server.enrol(1)[0]  # the load still needs the other one
            connection = self._server.connect(leaver)
            leave = partial(connection.identity.Leave, enrol_pb.LeaveRequest())
            needles = [raw("device key", leaver.secret)]
            yield from self._short("Leave", "done", needles, connection, leave)

    def _short(
        self, rpc: str, ending: str, needles: list[Needle], connection: Connection, call: Callable[..., Any]
    ) -> Iterator[Row]:
        """A call too short to be caught at work; its connection still holds what it sent, and shows it."""
        with connection:
            search = _ScenarioSearch(self._server, self._hardening, rpc, ending, needles)
            yield search.before()
            try:
                call(timeout=_SECONDS)
                status = "OK"
            except grpc.RpcError as error:
                status = error.code().name
            if status not in _STATUS[ending]:
                raise PerfitError(f"{search.name}: the call ended with {status}")
            yield search.at_rest("after")
        yield search.at_rest("closed")

    # -- many devices ----------------------------------------------------------------------------

    def _load(self, count: int) -> Iterator[Row]:
        """All devices at once, each with its own canaries; of four, one cancels and one is cut off."""
        kinds = [rpc for rpc in self._plan.rpcs if rpc in CALLS] or list(CALLS)
        endings = [("done", "cancelled", "done", "gone")[n % 4] for n in range(count)]
        calls = [
            self._call(kinds[n % len(kinds)], _DTYPES[n % 3], effort=0 if endings[n] == "done" else 1)
            for n in range(count)
        ]
        needles = [needle for call in calls for needle in call.needles]
        search = _ScenarioSearch(self._server, self._hardening, "every RPC", f"{count} devices", needles)
        yield search.before()  # first: the server closes connections that stay idle meanwhile
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
                yield search.during()
                for of_call, ending, connection in zip(running, endings, connections, strict=True):
                    if of_call.status is None:
                        _end(of_call, ending, connection, _SECONDS)
            for n, (call, of_call, ending) in enumerate(zip(calls, running, endings, strict=True)):
                _ended(of_call, call, ending, f"{call.rpc} of device {n} of {count}")
                search.add(call.received(of_call.replies))
            yield search.at_rest("after")
        finally:
            for connection in connections:
                connection.close()
        yield search.at_rest("closed")

    def _call(self, rpc: str, dtype: str, effort: int) -> PersonalCall:
        """`effort`: 0 for little work, else a multiple of what keeps a server busy."""
        self._made += 1
        canaries = Canaries([self._plan.seed, self._made, self._hardening == "on"], self._foresight)
        size: dict[str, Any]
        if rpc in ("Generate", "Ask"):
            size = {"tokens": self._tokens if effort else min(_FEW_TOKENS, self._tokens)}
        else:
            examples = _MANY_EXAMPLES if effort else _FEW_EXAMPLES
            size = {"examples": examples, "words": _WORDS * max(1, effort)}
        made: PersonalCall = CALLS[rpc](canaries, dtype, **size)
        return made


class _ScenarioSearch:
    """The looks at a server for the needles of one scenario."""

    def __init__(
        self, server: AuditedServer, hardening: str, rpc: str, ending: str, needles: Sequence[Needle]
    ) -> None:
        self._server, self._hardening, self._rpc, self._ending = server, hardening, rpc, ending
        self._index = Index(needles)
        self._pages: Pages | None = None  # before the call: unchanged pages hold nothing of it

    @property
    def name(self) -> str:
        return f"{self._rpc} {self._ending}"

    def add(self, needles: Sequence[Needle]) -> None:
        """Look for these, too, from now on."""
        if needles:
            self._index = Index([*self._index.needles, *needles])

    def before(self) -> Row:
        """What was found before anything was sent; drops needles that prove nothing.

        The words of an answer and token ids are the model's own. Some of their runs stand in libraries.
        """
        settle(self._server.pid)
        look, needles = self._stopped(), self._index.needles
        self._pages = look.pages
        public: dict[int, set[tuple[int, int, int]]] = {}
        for found in look.found:
            kind = needles[found.needle].kind
            if kind.startswith("answer text") or " ids " in kind:
                public.setdefault(found.needle, set()).update(found.spans)
        look = replace(look, found=tuple(f for f in look.found if f.needle not in public))
        row = self._row("before", look)
        if public:
            self._index = Index([n.without(public.get(number, ())) for number, n in enumerate(needles)])
        return row

    def during(self) -> Row:
        """Search a stopped server."""
        return self._row("during", look_at(self._server.pid, self._index, since=self._pages))

    def at_rest(self, moment: str) -> Row:
        settle(self._server.pid, rest=_LAST_REST_SECONDS if moment == "closed" else _REST_SECONDS)
        return self._row(moment, self._stopped())

    def _stopped(self) -> Look:
        with stopped(self._server.pid):
            return look_at(self._server.pid, self._index, [self._server.folder], since=self._pages)

    def _row(self, moment: str, look: Look) -> Row:
        needles = self._index.needles
        places: dict[str, dict[str, None]] = {}
        for found in look.found:
            places.setdefault(needles[found.needle].kind, {})[found.where] = None
        return Row(
            self._hardening,
            self._rpc,
            self._ending,
            moment,
            found={kind: tuple(of_kind) for kind, of_kind in places.items()},
            sought=tuple(dict.fromkeys(needle.kind for needle in needles)),
            searched=look.searched,
            unreadable=look.unreadable,
        )


def caught(
    pid: int, running: Running, look: Callable[[], Row], held: ExitStack, wants_more: Callable[[Row], bool]
) -> Row | None:
    """What looks at a process found while it worked; `held` keeps it stopped. None: the call was over.

    It is looked at again while the controls failed, or while `wants_more` of what was found so far.
    """
    found: Row | None = None
    for number in range(_LOOKS):
        _let_work(pid, 0.02 * 1.5**number, running)
        with ExitStack() as hold:
            hold.enter_context(stopped(pid))
            if running.status is not None:
                return found
            row = look() if found is None else found.joined(look())
            is_last = number == _LOOKS - 1
            if is_last or not (row.fault or wants_more(row)):
                held.push(hold.pop_all())
                return row
            found = None if row.fault else row
    return None


def _end(running: Running, ending: str, connection: Connection, seconds: float) -> None:
    """What the device does to end it, while the server is stopped."""
    if ending == "cancelled":
        running.cancel()
    elif ending == "deadline":
        running.wait(seconds + 10)
    elif ending == "gone" and connection.relay is not None:
        connection.relay.cut()


def _ended(running: Running, call: PersonalCall, ending: str, name: str) -> None:
    """Wait for the end of a call. Raises PerfitError when it ended in another way than it should."""
    try:
        if ending == "done":
            running.wait(_SECONDS, call.is_answered)
            running.send(None)
        running.wait(_SECONDS)
    except TimeoutError:
        raise PerfitError(f"{name}: the call did not end") from None
    if running.status not in _STATUS[ending]:
        raise PerfitError(f"{name}: the call ended with {running.status}")


def _let_work(pid: int, seconds: float, running: Running) -> None:
    """Until the server has worked for so long, or has nothing to do, or the call is over."""
    goal, end = cpu_seconds(pid) + seconds, time.monotonic() + 20 * seconds
    while cpu_seconds(pid) < goal and time.monotonic() < end and running.status is None:
        time.sleep(0.002)
