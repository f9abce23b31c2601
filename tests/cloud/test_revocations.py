"""What every process knows of revocations, how soon, and what it does when it cannot know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from tests.support.adapt_calls import Stream
from tests.support.cloud import TIMEOUT, Running, generate
from tests.support.doubles import Drip
from tests.support.store_contract import ANN, BOB, enroll
from tests.support.waiting import wait_for

from perfit_cloud.service.identity import identity_cache
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.identity_cache import IdentityCache
from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.identity.store import Changes
from perfit_shared.errors import StoreFailed, Unavailable


class Flaky(SQLiteStore):
    """Fails when told to, and notes what it was asked."""

    fails = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[int] = []

    def changes(self, since: int) -> Changes:
        self.asked.append(since)
        if self.fails:
            raise StoreFailed("away")
        return super().changes(since)


@pytest.fixture
def store(tmp_path: Any) -> Iterator[Flaky]:
    made = Flaky(tmp_path / "authority.db")
    yield made
    made.close()


def test_after_a_look_that_failed_everything_is_read_anew(store: Flaky) -> None:
    """By then the store may be another one: a standby that took over, or a copy that was restored."""
    enroll(store)
    cache = IdentityCache(store, refuse_after=30)
    store.fails = True
    with pytest.raises(StoreFailed):
        cache.refresh()
    store.fails = False
    cache.refresh()
    cache.refresh()
    assert store.asked[0] == 0
    assert store.asked[-2:] == [0, store.changes(0).sequence]


def test_who_has_not_heard_for_too_long_lets_nobody_in(store: Flaky, clock: Callable[[float], None]) -> None:
    enroll(store)
    cache = IdentityCache(store, refuse_after=30)
    store.fails = True
    clock(29)
    assert cache.get(ANN) is not None
    clock(31)
    assert cache.is_deaf
    with pytest.raises(Unavailable, match="not heard") as told:
        cache.get(ANN)
    assert told.value.retry_ms > 0
    cache.look()  # a look that is not answered is no hearing
    with pytest.raises(Unavailable):
        cache.get(ANN)
    store.fails = False
    cache.refresh()
    assert cache.get(ANN) is not None


def test_a_store_of_this_machine_alone_is_waited_for(store: Flaky, clock: Callable[[float], None]) -> None:
    enroll(store)
    cache = IdentityCache(store)
    store.fails = True
    clock(86_400)
    assert cache.get(ANN) is not None


def test_a_process_that_was_stopped_looks_before_it_lets_anybody_in(
    store: Flaky, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_cache, "_REFRESH_SECONDS", 1000.0)
    enroll(store)
    cache = IdentityCache(store, refuse_after=30)
    cache.start()
    store.revoke(ANN, 3)
    state = cache.get(ANN)
    assert state is not None and not state.is_revoked
    clock(10)
    state = cache.get(ANN)
    assert state is not None and state.is_revoked
    cache.stop()


def test_calls_are_ended_only_for_who_was_withdrawn(store: Flaky) -> None:
    ended: list[str] = []
    for identity in (ANN, BOB):
        enroll(store, identity)
    cache = IdentityCache(store)
    cache.start()
    with cache.watched(ANN, lambda: ended.append(ANN)), cache.watched(BOB, lambda: ended.append(BOB)):
        store.revoke(ANN, 3)
        wait_for(lambda: bool(ended))
        time.sleep(1.2)
    assert set(ended) == {ANN}
    with cache.watched(BOB, lambda: ended.append(BOB)):
        pass
    store.revoke(BOB, 3)
    time.sleep(1.5)
    assert set(ended) == {ANN}  # its call is over
    cache.stop()


def withdraw(running: Running, identity: str) -> float:
    """By another process; when that was."""
    Authority(running.config.state, certificate_seconds=9, lapse_seconds=9).revoke(identity)
    return time.monotonic()


def test_a_stream_on_which_nobody_says_anything_ends_too(
    run: Callable[..., Running], stream: Callable[..., Stream]
) -> None:
    running = run()
    device, other = running.device(), running.device()
    idle, kept = stream(device), stream(other)
    wait_for(
        lambda: (
            running.server.telemetry.registry.get_sample_value("perfit_calls_in_flight", {"rpc": "Adapt"})
            == 2
        )
    )
    at = withdraw(running, device.identity)
    wait_for(idle.call.done, seconds=5)
    assert time.monotonic() - at < 2
    assert idle.call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.PERMISSION_DENIED)
    assert not kept.call.done()


def test_an_answer_that_says_nothing_for_a_while_ends_too(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    device = running.device()
    answer = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(answer)
    at = withdraw(running, device.identity)
    wait_for(answer.done, seconds=5)
    assert time.monotonic() - at < 2
