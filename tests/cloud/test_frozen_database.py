"""A PostgreSQL that stands still (SIGSTOP): it neither answers nor closes, and TCP finds no fault with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from tests.support.cloud import Device, failure, generate
from tests.support.fleet import Fleet
from tests.support.store_contract import ANN, enroll
from tests.support.waiting import wait_for

from local_postgres import MISSING, Cluster, server_programs
from perfit_shared.errors import Busy

pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(server_programs() is None, reason=MISSING)]

from perfit_cloud.service.identity import postgres_store  # noqa: E402 - needs psycopg
from perfit_cloud.service.identity.postgres_store import PostgresStore  # noqa: E402

# A statement's 5 s (15 s of what reads) and one more, then 2 s for a new connection; on a busy machine.
WRITE_SECONDS, READ_SECONDS = 12, 24


@contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    cluster.freeze()
    try:
        yield
    finally:
        cluster.thaw()


@pytest.fixture
def store(database: str) -> Iterator[PostgresStore]:
    made = PostgresStore(database)
    enroll(made)
    made.changes(0)
    yield made
    made.close()


def seconds_until_busy(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    with pytest.raises(Busy):
        call()
    return time.monotonic() - begun


def test_nobody_waits_for_a_server_that_stands_still(
    store: PostgresStore, database: str, cluster: Cluster
) -> None:
    """A statement on an open connection waited for as long as the server stood still."""
    with ThreadPoolExecutor(3) as pool, frozen(cluster):
        waits = {
            pool.submit(seconds_until_busy, store.devices): WRITE_SECONDS,
            pool.submit(seconds_until_busy, lambda: store.changes(1)): READ_SECONDS,
            pool.submit(seconds_until_busy, lambda: PostgresStore(database)): WRITE_SECONDS,
        }
        for wait, most in waits.items():
            assert wait.result(60) < most
    store.revoke(ANN, 3)
    assert store.changes(0).states[ANN].is_revoked


def test_who_listens_notices_and_listens_again(
    store: PostgresStore, database: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have listened to a frozen server for ever, though another one had taken its place."""
    monkeypatch.setattr(postgres_store, "_PROBE_LOOKS", 1)
    connects: list[float] = []
    real = postgres_store.connect

    def noted(conninfo: str) -> object:
        connects.append(time.monotonic())
        return real(conninfo)

    monkeypatch.setattr(postgres_store, "connect", noted)
    woken = threading.Event()
    store.on_change(woken.set)
    assert woken.wait(10)
    with frozen(cluster):
        wait_for(lambda: len(connects) > 1, what="it gave up the frozen server")
    wait_for(lambda: _wakes(store, woken), what="it listens again")


def _wakes(store: PostgresStore, woken: threading.Event) -> bool:
    woken.clear()
    store.revoke(ANN, 3)
    store.restore(ANN)
    return woken.wait(0.4)


def is_served(device: Device) -> bool:
    try:
        return bool(list(device.stub.Generate(generate(), timeout=30)))
    except grpc.RpcError:
        return False


def check_recovery(fleet: Fleet, cluster: Cluster, *, refuse_after: float, more: float) -> None:
    """Frozen until calls are refused, and `more` seconds."""
    replica = fleet.replica(refuse_after=refuse_after)
    device, revoked = replica.device(), replica.device()
    assert is_served(device) and is_served(revoked)
    with frozen(cluster):
        begun = time.monotonic()
        assert is_served(device)  # who is known is served meanwhile
        wait_for(lambda: not is_served(device), seconds=refuse_after + 10)
        assert refuse_after - 1 < time.monotonic() - begun < refuse_after + 5
        status, metadata, _ = failure(device.describe)
        assert (status, metadata["perfit-code"]) == ("UNAVAILABLE", "unavailable")
        time.sleep(more)
    wait_for(lambda: is_served(device), seconds=5)
    fleet.authority.revoke(revoked.identity)
    wait_for(lambda: not is_served(revoked), seconds=2)
    assert is_served(device)


def test_a_replica_that_hears_nothing_refuses_and_recovers_by_itself(fleet: Fleet, cluster: Cluster) -> None:
    check_recovery(fleet, cluster, refuse_after=3, more=0)


def test_after_thirty_seconds_as_documented_and_longer_than_any_statement_waits(
    fleet: Fleet, cluster: Cluster
) -> None:
    check_recovery(fleet, cluster, refuse_after=30, more=10)


def test_a_server_stops_though_the_database_stands_still(fleet: Fleet, cluster: Cluster) -> None:
    """What it would write last waited behind a look that no answer came to."""
    replica = fleet.replica()
    assert is_served(replica.device())
    cache = fleet.authority._identities
    with frozen(cluster):
        time.sleep(1)  # a look is under way
        begun = time.monotonic()
        cache.stop()
        assert time.monotonic() - begun < 15
