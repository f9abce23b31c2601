"""A renewal retires what it replaces, from the first use of the new certificate on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from tests.support.authority import DAY, csr_of, enrolled, new_key, open_authority, renew_lapsed, renewed

from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import generation_of, identity_of
from perfit_shared.errors import CertificateSuperseded, IdentityRevoked, InviteRefused


def test_the_old_certificate_holds_until_the_new_one_was_used(authority: Authority) -> None:
    old = enrolled(authority)
    authority.check(old)
    new = renewed(authority, old)
    authority.check(old)  # the reply may have got lost
    assert authority.check(new) == identity_of(old)
    with pytest.raises(CertificateSuperseded, match="have it revoked"):
        authority.check(old)
    with pytest.raises(CertificateSuperseded):
        renewed(authority, old)
    authority.check(new)


def test_calls_that_are_open_end_in_their_own_time(authority: Authority) -> None:
    old = enrolled(authority)
    authority.check(old)
    authority.check(renewed(authority, old))
    assert authority.recheck(old) == identity_of(old)
    authority.revoke(identity_of(old))
    with pytest.raises(IdentityRevoked):
        authority.recheck(old)


def test_of_several_renewals_the_last_one_used_holds(authority: Authority) -> None:
    first = enrolled(authority)
    second, third = renewed(authority, first), renewed(authority, first)
    authority.check(second)
    authority.check(third)
    for retired in (first, second):
        with pytest.raises(CertificateSuperseded):
            authority.check(retired)
    fourth = renewed(authority, third)
    assert [generation_of(c) for c in (first, second, third, fourth)] == [1, 2, 3, 4]


def test_a_retired_certificate_renews_nothing_when_it_has_lapsed(
    authority: Authority, clock: Callable[[float], None]
) -> None:
    key = new_key()
    old = enrolled(authority, key)
    new = renewed(authority, old)
    authority.check(new)
    clock(2 * DAY)
    with pytest.raises(CertificateSuperseded):
        renew_lapsed(authority, old, key)


def test_a_lapsed_certificate_that_renews_was_used(
    authority: Authority, clock: Callable[[float], None]
) -> None:
    first_key, second_key = new_key(), new_key()
    first = enrolled(authority, first_key)
    second = renewed(authority, first, second_key)
    clock(2 * DAY)
    renew_lapsed(authority, second, second_key)
    with pytest.raises(CertificateSuperseded):
        renew_lapsed(authority, first, first_key)


def test_retired_stays_retired_in_another_process_and_after_a_restart(
    authority: Authority, tmp_path: Path
) -> None:
    old = enrolled(authority)
    authority.check(renewed(authority, old))
    with pytest.raises(CertificateSuperseded):
        authority.check(old)
    authority.refresh()  # what another process wrote takes nothing back
    with pytest.raises(CertificateSuperseded):
        authority.check(old)
    authority.close()
    with pytest.raises(CertificateSuperseded):
        open_authority(tmp_path / "state").check(old)


def test_the_operator_sees_that_a_retired_certificate_was_presented(authority: Authority) -> None:
    old, other = enrolled(authority), enrolled(authority)
    authority.check(renewed(authority, old))
    authority.check(other)
    authority.refresh()
    assert [device.superseded for device in authority.devices()] == [None, None]
    for _ in range(3):
        with pytest.raises(CertificateSuperseded):
            authority.check(old)
    authority.refresh()
    seen = {device.identity: device.superseded for device in authority.devices()}
    assert seen[identity_of(other)] is None
    day = seen[identity_of(old)]
    assert day is not None
    assert day % DAY == 0


def test_an_old_copy_of_the_database_locks_nobody_out(authority: Authority, tmp_path: Path) -> None:
    """Certificates of after the copy are newer than any it knows."""
    first = enrolled(authority)
    copy = (tmp_path / "state" / "authority.db").read_bytes()
    third = renewed(authority, renewed(authority, first))
    authority.check(third)
    authority.close()
    (tmp_path / "state" / "authority.db").write_bytes(copy)
    again = open_authority(tmp_path / "state")
    assert again.check(third) == identity_of(first)
    assert generation_of(renewed(again, third)) == 4
    with pytest.raises(CertificateSuperseded):
        again.check(first)


# -- the invite, which is a way to a certificate as well -------------------------------------------


def test_an_invite_answers_again_until_its_certificate_was_used(authority: Authority) -> None:
    key, (secret, _) = new_key(), authority.invite(60)
    der = authority.enroll(secret, csr_of(key))
    assert authority.enroll(secret, csr_of(key)) == der
    authority.check(x509.load_der_x509_certificate(der))
    authority.refresh()
    with pytest.raises(InviteRefused, match="used already"):
        authority.enroll(secret, csr_of(key))
