"""The store in PostgreSQL: the contract of stores, on a real server that also goes away and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from tests.support.store_contract import ANN, BOB, Opener, StoreContract, enroll
from tests.support.waiting import wait_for

from local_postgres import MISSING, Cluster, server_programs
from perfit_shared.errors import Busy, ConfigError

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = pytest.mark.skipif(server_programs() is None, reason=MISSING)

from perfit_cloud.service.identity import postgres_format  # noqa: E402 - needs psycopg
from perfit_cloud.service.identity.postgres_store import PostgresStore  # noqa: E402
from perfit_cloud.service.identity.store import IdentityState  # noqa: E402


@pytest.fixture
def open_store(open_postgres: Callable[[str], PostgresStore], database: str) -> Opener:
    return partial(open_postgres, database)


@pytest.fixture
def store_module() -> str:
    return "perfit_cloud.service.identity.postgres_store"


class TestPostgresStore(StoreContract):
    pass


def test_processes_that_open_an_empty_database_together_make_one_store(open_store: Opener) -> None:
    stores: list[object] = []
    threads = [threading.Thread(target=lambda: stores.append(open_store())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6


def test_tables_of_a_later_version_are_refused_and_stay(open_store: Opener, database: str) -> None:
    open_store()
    later = str(postgres_format.FORMAT + 1)
    with psycopg.connect(database) as db:
        db.execute("UPDATE perfit.meta SET value = %s WHERE key = 'format'", (later,))
    with pytest.raises(ConfigError, match="later version"):
        open_store()
    with psycopg.connect(database) as db:
        assert db.execute("SELECT value FROM perfit.meta WHERE key = 'format'").fetchone() == (later,)


def test_a_migration_that_fails_leaves_nothing(
    open_store: Opener, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enroll(open_store())
    monkeypatch.setattr(postgres_format, "FORMAT", 2)
    broken = (*postgres_format._MIGRATIONS, ("CREATE TABLE more (a INT)", "not SQL"))
    monkeypatch.setattr(postgres_format, "_MIGRATIONS", broken)
    with pytest.raises(Exception, match="cannot be used"):
        open_store()
    monkeypatch.undo()
    assert [device.identity for device in open_store().devices()] == [ANN]
    with psycopg.connect(database) as db:
        assert db.execute("SELECT to_regclass('perfit.more')").fetchone() == (None,)


def test_what_cannot_be_a_connection_string_is_said_without_quoting_it() -> None:
    with pytest.raises(ConfigError, match="should read like") as told:
        PostgresStore("a secret = 'x")
    assert "secret" not in str(told.value)


def test_nobody_waits_long_for_a_row_that_somebody_holds(open_store: Opener, database: str) -> None:
    store = open_store()
    enroll(store)
    with psycopg.connect(database) as other:
        other.execute("SELECT * FROM perfit.counters FOR UPDATE")
        begun = time.monotonic()
        with pytest.raises(Busy) as told:
            store.revoke(ANN, 3)
        assert time.monotonic() - begun < 5
        assert told.value.retry_ms > 0
        assert store.changes(0).states == {ANN: IdentityState(-1)}  # who reads waits for nobody
    store.revoke(ANN, 3)


def test_a_listener_is_woken_by_a_revocation_of_another_process(open_store: Opener) -> None:
    store, woken = open_store(), threading.Event()
    enroll(store)
    open_store().on_change(woken.set)
    assert woken.wait(10)  # it listens
    for act in (lambda: store.revoke(ANN, 3), lambda: store.restore(ANN)):
        woken.clear()
        begun = time.monotonic()
        act()
        assert woken.wait(10)
        assert time.monotonic() - begun < 0.5
    woken.clear()
    enroll(store, BOB)  # nobody waits for that
    assert not woken.wait(0.3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_store_outlives_its_server(open_store: Opener, how: str, cluster: Cluster) -> None:
    store, woken = open_store(), threading.Event()
    enroll(store)
    store.changes(0)
    store.on_change(woken.set)
    assert woken.wait(10)
    cluster.stop(how)
    try:
        calls: tuple[Callable[[], object], ...] = (
            lambda: store.changes(1),
            store.devices,
            lambda: store.revoke(ANN, 3),
            open_store,
        )
        for call in calls:
            with pytest.raises(Busy):
                call()
    finally:
        cluster.start()
    assert [device.revoked for device in store.devices()] == [None]
    store.revoke(ANN, 3)
    wait_for(lambda: store.changes(0).states[ANN].is_revoked)
    woken.clear()

    def is_woken() -> bool:
        store.restore(ANN)
        store.revoke(ANN, 3)
        return woken.wait(0.2)

    wait_for(is_woken, what="it listens again")


def test_a_connection_that_broke_while_nobody_used_it_costs_no_change(
    open_store: Opener, cluster: Cluster
) -> None:
    store = open_store()
    enroll(store)
    cluster.stop()
    cluster.start()
    store.revoke(ANN, 3)
    assert [device.revoked for device in store.devices()] == [3]
