"""Drills of docs/operating.md: the authorities change, and the database comes from a backup."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import grpc
import pytest
from tests.support.authority import csr_of, new_key
from tests.support.cloud import Device, Running
from tests.support.fleet import Fleet
from tests.support.waiting import wait_for

from local_postgres import MISSING, Cluster, server_programs
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_shared.errors import Busy, PerfitError
from perfit_shared.invites import Invite
from perfit_shared.types import Sampling

pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(server_programs() is None, reason=MISSING)]

SECOND = 1.1  # dates of certificates and steps are whole seconds


# -- the authorities change while devices call -------------------------------------------------------


class CallingDevice:
    """perfit's own client, which asks at a replica again and again until it is stopped."""

    def __init__(self, fleet: Fleet, replica: Running) -> None:
        secret, expires = fleet.authority.invite(600)
        enrolling = fleet.enrolling.addresses.enrol_address
        invite = Invite(enrolling, fleet.authority.server_ca_der, expires, secret)
        self._address = replica.address
        self.enrolment = self._at_replica(enrolments.enroll(invite, Identity.create()))
        self.outcomes: Counter[str] = Counter()
        self._over, self._changed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def has_answers(self, count: int) -> bool:
        return self.outcomes["OK"] >= count

    def _at_replica(self, enrolment: Enrolment) -> Enrolment:
        return replace(enrolment, address=self._address)

    def renew(self) -> bool:
        """As the client does at half of a certificate's life; the next call shows the new one.

        Whether it did: a busy cloud is asked again later.
        """
        try:
            with mutual_channel(self.enrolment, self._address) as channel:
                renewed = enrolments.renew(channel, self.enrolment, self._address)
        except Busy:
            return False
        self.enrolment = self._at_replica(renewed)
        self._changed.set()
        return True

    def _run(self) -> None:
        while not self._over.is_set():
            self._changed.clear()
            with Cloud(self.enrolment) as cloud:
                while not self._over.is_set() and not self._changed.is_set():
                    self._ask(cloud)

    def _ask(self, cloud: Cloud) -> None:
        try:
            list(cloud.generate("the cat sat", ShiftUse(), Sampling(max_new_tokens=4)))
            self.outcomes["OK"] += 1
        except PerfitError as error:
            self.outcomes[error.code] += 1
        time.sleep(0.02)

    @contextmanager
    def calling(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join(60)


def test_the_authorities_change_while_devices_call(fleet: Fleet) -> None:
    replicas = [fleet.replica() for _ in range(2)]
    devices = [CallingDevice(fleet, replica) for replica in replicas]
    first = devices[0].enrolment
    with devices[0].calling(), devices[1].calling():
        for step in ("begin", "switch", "finish"):
            fleet.authority.rotation.take(step)
            time.sleep(SECOND)
            for replica in replicas:  # each does so every hour
                fleet.renewal(replica).renew()
            for device in devices:
                wait_for(device.renew)
            for device in devices:
                wait_for(partial(device.has_answers, device.outcomes["OK"] + 5))
    assert all(set(device.outcomes) == {"OK"} for device in devices)
    assert fleet.authority.rotation.state().step == "finished"
    for device in devices:
        assert device.enrolment.server_ca != first.server_ca
        assert not device.enrolment.other_server_ca
    with Cloud(first) as cloud, pytest.raises(PerfitError):  # neither trusts the other any more
        cloud.describe()


# -- the database comes from a backup ----------------------------------------------------------------


def refused(device: Device) -> str:
    """The code of a call's refusal; "" for one that is answered."""
    try:
        device.describe()
    except grpc.RpcError as error:
        return str(dict(error.trailing_metadata()).get("perfit-code"))  # type: ignore[attr-defined]
    return ""


def becomes(device: Device, code: str) -> None:
    wait_for(lambda: refused(device) == code, seconds=10, what=f"refused with {code!r}")


def test_what_a_backup_of_the_database_brings_back_and_loses(
    fleet: Fleet, cluster: Cluster, database: str
) -> None:
    replica = fleet.replica()
    kept, withdrawn, renewing = replica.device(), replica.device(), replica.device()
    secret = fleet.authority.invite(600)[0]  # used after the backup
    for device in (kept, withdrawn, renewing):
        assert refused(device) == ""
    time.sleep(SECOND)  # marks of certificates' use are written twice a second
    backup = cluster.dump(database)

    fleet.authority.revoke(withdrawn.identity)
    key, new_key_ = new_key(), new_key()
    newcomer = replica.with_certificate(key, fleet.authority.enroll(secret, csr_of(key)))
    old = replica.with_certificate(renewing.key, renewing.certificate)
    renewed = replica.with_certificate(new_key_, _renewed(fleet, renewing, csr_of(new_key_)))
    assert refused(newcomer) == refused(renewed) == ""
    becomes(withdrawn, "identity_revoked")
    becomes(old, "certificate_superseded")
    time.sleep(SECOND)

    cluster.restore(database, backup)  # while the servers run
    becomes(newcomer, "not_authenticated")  # they have read the list anew
    becomes(kept, "")
    assert refused(withdrawn) == ""  # who was revoked since is back, at servers that knew better, too
    assert refused(old) == ""  # a certificate that was replaced holds again,
    assert refused(renewed) == ""  # until the one after it is used: then
    becomes(old, "certificate_superseded")
    another = new_key()
    assert refused(replica.with_certificate(another, _renewed(fleet, renewed, csr_of(another)))) == ""

    fleet.authority.revoke(withdrawn.identity)  # as the operator does for all of after the backup
    becomes(withdrawn, "identity_revoked")
    again = replica.with_certificate(
        key, fleet.authority.enroll(secret, csr_of(key))
    )  # the invite is open again
    assert refused(again) == ""


def _renewed(fleet: Fleet, device: Device, csr: bytes) -> bytes:
    from cryptography import x509

    return fleet.authority.renew(x509.load_der_x509_certificate(device.certificate), csr)
