"""deploy/postgres/roles.sql on a real server: what each role of a fleet can do, and what not."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.support.authority import DAY, csr_of, enrolled, new_key
from tests.support.balancers import ROOT
from tests.support.store_contract import ANN, BOB, Opener, StoreContract, enroll

from local_postgres import MISSING, Cluster, server_programs
from perfit_shared.errors import ConfigError, IdentityRevoked, StoreFailed

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = pytest.mark.skipif(server_programs() is None, reason=MISSING)

from psycopg.conninfo import make_conninfo  # noqa: E402 - needs psycopg

from perfit_cloud.service.identity.authenticator import Authenticator  # noqa: E402
from perfit_cloud.service.identity.authority import Authority  # noqa: E402
from perfit_cloud.service.identity.postgres_store import PostgresStore  # noqa: E402
from perfit_cloud.service.identity.store import IdentityState  # noqa: E402

ROLES = ROOT / "deploy/postgres/roles.sql"


def run_roles(cluster: Cluster, database: str) -> None:
    """As its first lines say."""
    psql = [cluster.client("psql"), "--single-transaction", "--set=ON_ERROR_STOP=1", f"--file={ROLES}"]
    subprocess.run([*psql, database], check=True, capture_output=True, timeout=60)


@pytest.fixture
def enrolment(cluster: Cluster, database: str) -> str:
    """The connection string of the role that enrols, in a database whose tables it made."""
    conninfo = make_conninfo(database, user="perfit_enrolment")
    run_roles(cluster, database)
    PostgresStore(conninfo).close()
    run_roles(cluster, database)
    return conninfo


@pytest.fixture
def replica(enrolment: str) -> str:
    return make_conninfo(enrolment, user="perfit_replica")


@pytest.fixture
def open_store(open_postgres: Callable[[str], PostgresStore], enrolment: str) -> Opener:
    return partial(open_postgres, enrolment)


@pytest.fixture
def store_module() -> str:
    return "perfit_cloud.service.identity.postgres_store"


class TestEnrolmentRole(StoreContract):
    """Everything that a store does, by a role that may create nothing but its own tables."""


def test_a_replica_does_its_work(open_store: Opener, replica: str) -> None:
    """Two roles stood in the settings, and nothing gave the second a right."""
    store, serving = open_store(), PostgresStore(replica)
    try:
        cloud_id = store.setting("cloud_id", "ours")
        assert serving.setting("cloud_id", "another") == cloud_id
        enroll(store)
        enroll(store, BOB)
        woken = threading.Event()
        serving.on_change(woken.set)
        assert woken.wait(10)
        serving.write_marks({ANN: IdentityState(1, superseded=DAY)})
        assert serving.changes(0).states[ANN] == IdentityState(1, superseded=DAY)
        invite = store.invite(ANN.encode())
        assert invite is not None and invite.enrolment is None
        woken.clear()
        serving.revoke(BOB, 3)
        assert woken.wait(10)
        assert store.changes(0).states[BOB].is_revoked and serving.changes(0).states[BOB].is_revoked
    finally:
        serving.close()


def test_a_replica_lets_devices_in_and_go(enrolment: str, replica: str, tmp_path: Path) -> None:
    authority = Authority(
        tmp_path / "ca", certificate_seconds=DAY, lapse_seconds=DAY, database=enrolment, refuse_after=30
    )
    (tmp_path / "replica").mkdir(mode=0o700)
    authority.write_serving_files(tmp_path / "replica", ["localhost"])
    key = new_key()
    first = enrolled(authority, key)
    serving = Authenticator.open(tmp_path / "replica", database=replica, refuse_after=30)
    try:
        assert serving.cloud_id == authority.cloud_id
        identity = serving.check(first)
        authority.renew(first, csr_of(key))
        serving.refresh()  # writes the mark
        serving.leave(first)
        authority.refresh()
        with pytest.raises(IdentityRevoked):
            authority.check(first)
        assert [device.identity for device in authority.devices() if device.revoked] == [identity]
    finally:
        serving.close()
        authority.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO devices VALUES ('b', 1, 2, 1, -1, NULL, NULL, 9, '')",
        "DELETE FROM devices",
        "UPDATE devices SET identity = 'b'",
        "UPDATE devices SET expires = 9",
        "UPDATE devices SET label = 'x'",
        "SELECT label FROM devices",
        "SELECT issued FROM devices",
        "SELECT * FROM invites",
        "INSERT INTO invites VALUES ('x', 9)",
        "SELECT certificate FROM enrolments",
        "SELECT * FROM challenge_keys",
        "SELECT * FROM challenges",
        "UPDATE counters SET pruned = 9",
        "INSERT INTO meta VALUES ('x', 'y')",
        "UPDATE meta SET value = '0'",
        "CREATE TABLE perfit.more (a INT)",
        "CREATE SCHEMA more",
        "ALTER TABLE devices DISABLE ROW LEVEL SECURITY",
    ],
)
def test_a_replica_may_not(replica: str, statement: str) -> None:
    with psycopg.connect(replica) as db:
        db.execute("SET search_path = perfit")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute(statement)


def test_a_replica_welcomes_nobody_again(open_store: Opener, replica: str) -> None:
    store, serving = open_store(), PostgresStore(replica)
    enroll(store)
    store.revoke(ANN, int(time.time()))
    serving.restore(ANN)
    serving.close()
    assert store.changes(0).states[ANN].is_revoked
    store.restore(ANN)
    assert not store.changes(0).states[ANN].is_revoked


def test_a_replica_enrols_nobody(open_store: Opener, replica: str) -> None:
    open_store()
    serving = PostgresStore(replica)
    for act in (serving.devices, lambda: enroll(serving), serving.challenge_keys):
        with pytest.raises(StoreFailed):
            act()
    serving.close()


def test_a_replica_that_starts_before_the_tables_are_there_says_what_to_do(
    cluster: Cluster, database: str
) -> None:
    run_roles(cluster, database)
    replica = make_conninfo(database, user="perfit_replica")
    with pytest.raises(ConfigError, match=r"enrolling server .*roles\.sql"):
        PostgresStore(replica)
    PostgresStore(make_conninfo(database, user="perfit_enrolment")).close()
    with pytest.raises(ConfigError, match=r"roles\.sql again"):
        PostgresStore(replica)
    run_roles(cluster, database)
    PostgresStore(replica).close()


def test_tables_of_a_single_role_go_to_the_one_that_enrols(cluster: Cluster, database: str) -> None:
    single = PostgresStore(database)
    enroll(single)
    single.close()
    run_roles(cluster, database)
    for role in ("perfit_enrolment", "perfit_replica"):
        store = PostgresStore(make_conninfo(database, user=role))
        assert set(store.changes(0).states) == {ANN}
        store.close()
    with psycopg.connect(database) as db:
        owners = db.execute("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'perfit'")
        assert owners.fetchall() == [("perfit_enrolment",)]
