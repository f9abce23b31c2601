"""What every store of identities must do (`service/identity/store.py`), asked through its interface alone.

A test module of a store makes a fixture `open_store`: it opens the same store again at every call, as another
process or a restart would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from perfit_cloud.service.identity.challenges import Challenges
from perfit_cloud.service.identity.store import (
    MOST_CHALLENGES,
    UNUSED,
    Changes,
    Enrolment,
    IdentityState,
    IdentityStore,
)
from perfit_shared.errors import Busy, NotAuthenticated, Unavailable

__all__ = ["StoreContract"]

Opener = Callable[[], IdentityStore]
AT_ONCE = 8
DATES = {"issued": 1_700_000_000, "expires": 1_700_600_000}  # unix seconds
SECRET_HASH, OTHER_HASH = b"\1" * 32, b"\2" * 32
ANN, BOB = "a" * 32, "ab" * 16


def enrolment(identity: str = ANN) -> Enrolment:
    return Enrolment(identity, key_hash=b"k" * 32, certificate=b"certificate of " + identity.encode())


def enroll(store: IdentityStore, identity: str = ANN, *, secret_hash: bytes = b"") -> None:
    secret_hash = secret_hash or identity.encode()
    store.add_invite(secret_hash, DATES["expires"])
    assert store.enroll(secret_hash, enrolment(identity), **DATES)


def together(*calls: Callable[[], object]) -> list[Any]:
    """What the calls give when they begin at once."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], object]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


class Reader:
    """Follows a store as another process does."""

    def __init__(self, store: IdentityStore) -> None:
        self.store, self.sequence = store, 0
        self.states: dict[str, IdentityState] = {}

    def look(self) -> Changes:
        changes = self.store.changes(self.sequence)
        known = {} if changes.is_complete else self.states
        self.states = {**known, **changes.states}
        self.sequence = changes.sequence
        return changes


class StoreContract:
    # -- settings --------------------------------------------------------------------------------

    def test_the_first_default_of_a_setting_stays(self, open_store: Opener) -> None:
        assert open_store().setting("cloud_id", "first") == "first"
        assert open_store().setting("cloud_id", "second") == "first"

    # -- invites ---------------------------------------------------------------------------------

    def test_an_invite_is_spent_once_however_many_try(self, open_store: Opener) -> None:
        stores = [open_store() for _ in range(AT_ONCE)]
        stores[0].add_invite(SECRET_HASH, 7)
        tries = [
            partial(store.enroll, SECRET_HASH, enrolment(f"{n:032x}"), **DATES)
            for n, store in enumerate(stores)
        ]
        said = together(*tries)
        assert sorted(said) == [False] * (AT_ONCE - 1) + [True]
        winner = f"{said.index(True):032x}"
        assert [device.identity for device in stores[0].devices()] == [winner]
        state = stores[-1].invite(SECRET_HASH)
        assert state is not None
        assert (state.expires, state.is_used, state.enrolment) == (7, True, enrolment(winner))

    def test_an_invite_that_nobody_added_is_unknown(self, open_store: Opener) -> None:
        store = open_store()
        store.add_invite(OTHER_HASH, 7)
        assert store.invite(SECRET_HASH) is None
        assert not store.enroll(SECRET_HASH, enrolment(), **DATES)
        assert store.devices() == []
        state = store.invite(OTHER_HASH)
        assert state is not None
        assert (state.is_used, state.enrolment) == (False, None)

    def test_an_answer_stays_until_its_certificate_is_used(self, open_store: Opener) -> None:
        enroll(open_store(), secret_hash=SECRET_HASH)
        store = open_store()
        for mark, kept in ((IdentityState(UNUSED, superseded=86400), enrolment()), (IdentityState(1), None)):
            store.write_marks({ANN: mark})
            state = store.invite(SECRET_HASH)
            assert state is not None
            assert (state.is_used, state.enrolment) == (True, kept)

    # -- identities ------------------------------------------------------------------------------

    def test_renewals_that_come_together_get_generations_of_their_own(self, open_store: Opener) -> None:
        stores = [open_store() for _ in range(AT_ONCE)]
        enroll(stores[0])
        renewals = [partial(store.renew, ANN, generation=1, issued=5, expires=9) for store in stores]
        assert sorted(together(*renewals)) == list(range(2, AT_ONCE + 2))
        assert [(device.issued, device.expires) for device in stores[0].devices()] == [(5, 9)]

    def test_a_certificate_that_is_ahead_of_the_store_gets_the_next_generation(
        self, open_store: Opener
    ) -> None:
        store = open_store()
        enroll(store)
        assert store.renew(ANN, generation=41, issued=5, expires=9) == 42
        assert store.renew(ANN, generation=1, issued=6, expires=9) == 43

    def test_only_known_identities_that_are_welcome_renew(self, open_store: Opener) -> None:
        store = open_store()
        enroll(store)
        assert store.renew(BOB, generation=1, issued=5, expires=9) is None
        open_store().revoke(ANN, 3)
        assert store.renew(ANN, generation=1, issued=5, expires=9) is None
        assert [(device.issued, device.revoked) for device in store.devices()] == [(DATES["issued"], 3)]

    def test_marks_only_grow(self, open_store: Opener) -> None:
        store = open_store()
        enroll(store)
        for mark in (IdentityState(3, superseded=86400), IdentityState(2), IdentityState(UNUSED)):
            store.write_marks({ANN: mark, BOB: mark})
        assert open_store().changes(0).states == {ANN: IdentityState(3, superseded=86400)}

    def test_a_label_goes_from_an_invite_to_its_identity(self, open_store: Opener) -> None:
        store = open_store()
        store.add_invite(SECRET_HASH, 2, "ann's laptop")
        store.add_invite(OTHER_HASH, 1)
        told = [(i.secret_hash, i.expires, i.label) for i in store.open_invites()]
        assert told == [(OTHER_HASH, 1, ""), (SECRET_HASH, 2, "ann's laptop")]
        assert store.enroll(SECRET_HASH, enrolment(), **DATES)
        assert [i.secret_hash for i in store.open_invites()] == [OTHER_HASH]
        assert [device.label for device in open_store().devices()] == ["ann's laptop"]
        store.set_label(ANN, "")
        assert [device.label for device in open_store().devices()] == [""]

    def test_an_open_invite_is_forgotten_and_a_used_one_is_not(self, open_store: Opener) -> None:
        store = open_store()
        enroll(store, ANN, secret_hash=SECRET_HASH)
        store.add_invite(OTHER_HASH, DATES["expires"])
        assert store.delete_invite(OTHER_HASH)
        assert not store.delete_invite(OTHER_HASH) and not store.delete_invite(SECRET_HASH)
        assert not store.enroll(OTHER_HASH, enrolment(BOB), **DATES)
        assert open_store().invite(SECRET_HASH) is not None

    def test_who_was_revoked_is_welcome_again_and_others_hear_of_it(self, open_store: Opener) -> None:
        store, reader = open_store(), Reader(open_store())
        enroll(store)
        store.revoke(ANN, 3)
        assert reader.look().states[ANN].is_revoked
        assert store.renew(ANN, generation=1, issued=5, expires=9) is None
        store.restore(ANN)
        store.restore(ANN)
        assert reader.look().states == {ANN: IdentityState(UNUSED)}
        assert [device.revoked for device in store.devices()] == [None]
        assert store.renew(ANN, generation=1, issued=5, expires=9) == 2

    def test_a_prefix_finds_two_identities_at_most(self, open_store: Opener) -> None:
        store = open_store()
        for identity in (ANN, BOB, "b" * 32, "aa" + "c" * 30):
            enroll(store, identity)
        assert store.matching("aba") == [BOB]
        assert len(store.matching("a")) == 2
        assert store.matching("a%") == store.matching("____") == []

    def test_devices_come_newest_first(self, open_store: Opener) -> None:
        store = open_store()
        for identity in (ANN, BOB):
            enroll(store, identity)
        store.renew(BOB, generation=1, issued=DATES["issued"] + 1, expires=9)
        assert [device.identity for device in store.devices()] == [BOB, ANN]

    # -- what changed ----------------------------------------------------------------------------

    def test_a_second_reader_is_told_what_changed_and_nothing_else(self, open_store: Opener) -> None:
        store, reader = open_store(), Reader(open_store())
        for identity in (ANN, BOB):
            enroll(store, identity)
        assert reader.look().states.keys() == {ANN, BOB}
        assert reader.look().states == {}
        store.revoke(ANN, 3)
        changes = reader.look()
        assert changes.states == {ANN: IdentityState(UNUSED, is_revoked=True)}
        assert not changes.is_complete
        store.write_marks({BOB: IdentityState(2)})
        assert reader.look().states == {BOB: IdentityState(2)}
        store.revoke(ANN, 4)  # again
        store.renew(BOB, generation=2, issued=5, expires=9)  # no call asks for it
        store.write_marks({BOB: IdentityState(1, superseded=86400)})  # nor for this, which tells a time
        assert reader.look().states == {}
        assert [device.revoked for device in store.devices() if device.identity == ANN] == [3]

    def test_a_reader_misses_nothing_while_others_write(self, open_store: Opener) -> None:
        reader, is_over = Reader(open_store()), threading.Event()

        def follow() -> None:
            while not is_over.is_set():
                with suppress(Busy):  # it asks again
                    reader.look()

        def write(store: IdentityStore, names: range) -> None:
            for n in names:
                enroll(store, f"{n:032x}")
                store.write_marks({f"{n:032x}": IdentityState(n)})
                if n % 3 == 0:
                    store.revoke(f"{n:032x}", n)

        follower = threading.Thread(target=follow)
        follower.start()
        writers = [partial(write, open_store(), range(10 * n, 10 * n + 10)) for n in range(3)]
        try:
            together(*writers)
        finally:
            is_over.set()
            follower.join()
        reader.look()
        assert reader.states == {f"{n:032x}": IdentityState(n, is_revoked=n % 3 == 0) for n in range(30)}

    # -- deleting --------------------------------------------------------------------------------

    def test_prune_goes_by_the_days_it_is_given(self, open_store: Opener) -> None:
        store, reader = open_store(), Reader(open_store())
        for identity, expires in ((ANN, 1000), (BOB, 2000)):
            store.add_invite(identity.encode(), 500)
            assert store.enroll(identity.encode(), enrolment(identity), issued=1, expires=expires)
        store.write_marks({BOB: IdentityState(1)})
        store.add_invite(SECRET_HASH, 500)
        store.add_invite(OTHER_HASH, 501)
        reader.look()
        assert store.prune(identities_before=1000, invites_before=0) == (0, 0)
        # ANN's answer may still be asked for, so its invite stays.
        assert store.prune(identities_before=1000, invites_before=501) == (0, 2)
        assert store.invite(ANN.encode()) is not None
        assert store.prune(identities_before=1001, invites_before=501) == (1, 1)
        assert store.invite(SECRET_HASH) is store.invite(ANN.encode()) is None
        assert store.invite(OTHER_HASH) is not None
        changes = reader.look()
        assert (changes.is_complete, reader.states) == (True, {BOB: IdentityState(1)})
        assert not reader.look().is_complete

    # -- challenges ------------------------------------------------------------------------------

    def test_of_two_new_keys_one_is_taken_and_the_last_two_stay(self, open_store: Opener) -> None:
        stores = [open_store() for _ in range(AT_ONCE)]
        for after in range(3):
            makes = [
                partial(store.add_challenge_key, bytes([n]), made=n, after=after)
                for n, store in enumerate(stores)
            ]
            together(*makes)
            keys = stores[0].challenge_keys()
            assert [key.number for key in keys] == [after + 1, after][: 1 + bool(after)]
            assert keys[0].key == bytes([keys[0].made])
        assert stores[-1].challenge_keys() == keys

    def test_a_challenge_is_used_once_in_all_stores(self, open_store: Opener) -> None:
        stores = [open_store() for _ in range(AT_ONCE)]
        stores[0].add_challenge_key(b"key", made=1, after=0)
        uses = [partial(store.use_challenge, 1, b"\7" * 32) for store in stores]
        assert sorted(together(*uses)) == [False] * (AT_ONCE - 1) + [True]
        assert stores[1].use_challenge(1, b"\x08" * 32)
        stores[1].close()
        assert not open_store().use_challenge(1, b"\7" * 32)

    def test_under_a_key_that_was_dropped_nothing_is_used(self, open_store: Opener) -> None:
        store = open_store()
        assert not store.use_challenge(1, b"\7" * 32)
        for after in range(3):
            store.add_challenge_key(b"key", made=1, after=after)
            assert store.use_challenge(after + 1, bytes([after]) * 32)
        assert not store.use_challenge(1, b"\x09" * 32)
        assert not store.use_challenge(2, bytes([1]) * 32)
        assert store.use_challenge(2, b"\x09" * 32)

    def test_used_challenges_have_a_bound(
        self, open_store: Opener, monkeypatch: pytest.MonkeyPatch, store_module: str
    ) -> None:
        assert MOST_CHALLENGES < 100_000
        monkeypatch.setattr(f"{store_module}.MOST_CHALLENGES", 3)
        store = open_store()
        for after in range(2):
            store.add_challenge_key(b"key", made=1, after=after)
            for n in range(3):
                assert store.use_challenge(after + 1, bytes([after, n]) * 16)
            with pytest.raises(Busy):
                store.use_challenge(after + 1, b"\x09" * 32)

    def test_whichever_process_is_asked_knows_a_challenge(self, open_store: Opener) -> None:
        first, second = Challenges(open_store()), Challenges(open_store())
        for maker, user in ((first, second), (second, first), (first, Challenges(open_store()))):
            challenge = maker.make()
            user.use(challenge)
            for each in (first, second, Challenges(open_store())):  # the last as after a restart
                with pytest.raises(NotAuthenticated, match="used already"):
                    each.use(challenge)

    def test_challenges_end_with_their_minute(
        self, open_store: Opener, clock: Callable[[float], None]
    ) -> None:
        challenges = Challenges(open_store())
        early, late = challenges.make(), challenges.make()
        clock(55)
        challenges.use(early)
        clock(62)
        with pytest.raises(NotAuthenticated, match="expired"):
            challenges.use(late)

    def test_asking_for_challenges_makes_a_key_every_two_minutes_and_nothing_more(
        self, open_store: Opener, clock: Callable[[float], None]
    ) -> None:
        store = open_store()
        first, second = Challenges(store), Challenges(open_store())
        numbers = []
        for seconds in (0, 1, 60, 180, 190, 230, 360):  # a minute's room for a machine that dawdles
            clock(seconds)
            for challenges in (first, second, first):
                challenges.make()
            numbers.append(store.challenge_keys()[0].number)
        assert numbers == [1, 1, 1, 2, 2, 2, 3]

    # -- the end ---------------------------------------------------------------------------------

    def test_a_store_that_was_closed_says_that_the_cloud_stops(self, open_store: Opener) -> None:
        store = open_store()
        store.close()
        for call in (store.devices, lambda: store.changes(0), lambda: store.revoke(ANN, 1)):
            with pytest.raises(Unavailable, match="stopping"):
                call()
