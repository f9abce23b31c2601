"""A device keeps what it renewed before it uses it, and learns when somebody else renewed its identity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud

from perfit_device import cloud_record, profile
from perfit_device.cli import common
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.vault.store import Vault
from perfit_shared.errors import Busy, CertificateSuperseded, CertificateValid, PerfitError, VaultError
from perfit_shared.types import Sampling

RETIRED = CertificateSuperseded("a newer certificate of this device is in use")
OLD = timedelta(hours=20)  # of a day: it wants to be renewed


def enrolled_with(cloud: FakeCloud, age: timedelta | None = None) -> Enrolment:
    if age is not None:
        cloud.certificate_age = age
    return enrolments.enroll(cloud.invite(), Identity.create())


@pytest.fixture
def old(cloud: FakeCloud) -> Enrolment:
    return enrolled_with(cloud, OLD)


def refusing(*methods: str, error: PerfitError = RETIRED) -> Any:
    return lambda method: error if method in methods else None


def test_a_renewal_is_for_a_new_key(cloud: FakeCloud, old: Enrolment) -> None:
    """So that a key that was stolen is good for nothing any more."""
    with Cloud(old) as device:
        assert "Renew" in cloud.calls
        assert device.enrolment.identity.to_der() != old.identity.to_der()
        assert device.enrolment.identity.matches(device.enrolment.certificate)
        device.describe()
    lapsed = enrolled_with(cloud, timedelta(hours=30))
    with Cloud(lapsed) as device:
        assert "RenewLapsed" in cloud.calls
        assert device.enrolment.identity.to_der() != lapsed.identity.to_der()
        device.describe()


def test_what_cannot_be_kept_is_not_used(cloud: FakeCloud, old: Enrolment) -> None:
    """Its first use would retire the one that is kept."""

    def full_disk(new: Enrolment) -> None:
        raise VaultError("the disk is full")

    with Cloud(old, on_renewed=full_disk) as device:
        assert "Renew" in cloud.calls
        assert device.enrolment is old
        device.describe()


def test_a_clock_that_is_ahead_renews_over_the_channel(cloud: FakeCloud) -> None:
    """By the cloud's clock the certificate has not lapsed, and by signature it is not renewed then."""
    lapsed = enrolled_with(cloud, timedelta(hours=30))
    cloud.fail = refusing("RenewLapsed", error=CertificateValid("this certificate has not lapsed"))
    with pytest.raises(CertificateValid):
        enrolments.renew_lapsed(lapsed)
    cloud.calls.clear()
    with pytest.raises(PerfitError):
        # The fake cloud's TLS goes by the true clock, so the channel itself is refused here.
        Cloud(lapsed).describe()
    assert cloud.calls.count("RenewLapsed") == 2  # at the opening, and when the channel broke off


@pytest.fixture
def device(cloud: FakeCloud) -> Iterator[tuple[Cloud, list[Enrolment | None]]]:
    """A device, and what another process of it left in the vault."""
    vault: list[Enrolment | None] = [None]
    with Cloud(enrolled_with(cloud), reload_enrolment=lambda: vault[0]) as opened:
        yield opened, vault


def test_another_process_renewed(cloud: FakeCloud, device: tuple[Cloud, list[Enrolment | None]]) -> None:
    opened, vault = device
    vault[0] = enrolled_with(cloud)
    errors = iter([RETIRED])
    cloud.fail = lambda method: next(errors, None) if method == "Describe" else None
    assert opened.describe().cloud_id == cloud.cloud_id
    assert opened.enrolment is vault[0]
    errors = iter([RETIRED])
    vault[0] = enrolled_with(cloud)
    cloud.fail = lambda method: next(errors, None) if method == "Generate" else None
    assert "".join(chunk.text for chunk in opened.generate("x", ShiftUse(), Sampling(4)))
    assert opened.enrolment is vault[0]


@pytest.mark.parametrize("kept", ["nothing", "the same"])
def test_somebody_else_renewed(
    cloud: FakeCloud, device: tuple[Cloud, list[Enrolment | None]], kept: str
) -> None:
    opened, vault = device
    vault[0] = opened.enrolment if kept == "the same" else None
    cloud.fail = refusing("Describe")
    cloud.calls.clear()
    with pytest.raises(CertificateSuperseded, match=r"renewed elsewhere.*somebody has its key.*--replace"):
        opened.describe()
    assert cloud.calls == ["Describe"]  # asked once


def test_what_was_read_anew_is_tried_once(
    cloud: FakeCloud, device: tuple[Cloud, list[Enrolment | None]]
) -> None:
    opened, vault = device
    vault[0] = enrolled_with(cloud)
    cloud.fail = refusing("Describe")
    cloud.calls.clear()
    with pytest.raises(CertificateSuperseded):
        opened.describe()
    assert cloud.calls == ["Describe", "Describe"]


# -- the command line --------------------------------------------------------------------------------


def test_status_says_that_it_was_renewed_elsewhere(enrolled: Perfit, cloud: FakeCloud) -> None:
    assert enrolled.json("status")["renewed_elsewhere"] is False
    cloud.fail = refusing("Describe")
    code, out, _ = enrolled("status", "--json")
    report = json.loads(out)
    assert (code, report["renewed_elsewhere"]) == (4, True)
    assert "renewed elsewhere" in report["cloud"]
    assert "renewed elsewhere" in enrolled("status")[1]


@pytest.mark.parametrize("who", ["another command", "somebody else"])
def test_a_command_that_released_the_vault_reads_it_anew(
    enrolled: Perfit, cloud: FakeCloud, home: Path, who: str
) -> None:
    """`ask` gives the vault back before it asks; another command may renew meanwhile."""
    other, left = enrolled_with(cloud), [RETIRED]

    def fail(method: str) -> PerfitError | None:
        if method != "Generate" or not left:
            return None
        if who == "another command":
            with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
                cloud_record.write_enrolment(vault, other)
        return left.pop()

    cloud.fail = fail
    if who == "another command":
        enrolled.ok("ask", "x", "--mode", "base")
        with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
            kept = cloud_record.read_enrolment(vault)
        assert kept is not None
        assert kept.certificate == other.certificate
    else:
        assert "renewed elsewhere" in enrolled.fails("ask", "x", "--mode", "base", code=4)


def test_a_vault_that_is_busy_is_waited_for_in_mid_run(
    ready: Perfit, cloud: FakeCloud, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update renewed, and held the vault: evaluate died of it, and had asked for the passphrase again."""
    path, other = home / "profiles" / "default" / "vault.db", enrolled_with(cloud)
    holders: list[Vault] = []

    def fail(method: str) -> PerfitError | None:
        if method != "Ask":
            return None
        if not holders:
            holders.append(Vault.open(path, "correct horse"))
            cloud_record.write_enrolment(holders[0], other)
            return RETIRED
        if not holders[0].closed:
            holders[0].close()
            return RETIRED
        return None

    asked: list[str] = []

    def typed(prompt: str) -> str:
        asked.append(prompt)
        return "correct horse"

    monkeypatch.delenv("PERFIT_PASSPHRASE")
    monkeypatch.setattr(common, "ask_passphrase", typed)
    monkeypatch.setattr(Vault, "open", partial(Vault.open, wait_seconds=0.05))
    cloud.fail = fail
    code, _, err = ready("evaluate")
    assert code == 0, err
    assert "another perfit is using" in err
    assert asked == ["Passphrase"]


def test_enrolment_keeps_what_its_first_look_renews(perfit: Perfit, cloud: FakeCloud, home: Path) -> None:
    """It was used and dropped: the next command came with a certificate that was retired."""
    cloud.certificate_age = OLD
    perfit.ok("enroll", cloud.invite().encode())
    assert cloud.calls.count("Renew") == 1
    perfit.ok("status")
    assert cloud.calls.count("Renew") == 1


def test_a_command_that_tries_again_does_so_with_what_it_renewed(
    perfit: Perfit, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the old certificate it would be refused, and the operator told of it."""
    monkeypatch.setattr(profile, "OPENING_SECONDS", 30)
    cloud.certificate_age = OLD
    cloud.fail = refusing("Renew", error=Busy("busy"))
    perfit.ok("enroll", cloud.invite().encode())
    cloud.calls.clear()
    busy = iter([Busy("busy"), Busy("busy")])
    cloud.fail = lambda method: next(busy, None) if method == "Describe" else None
    perfit.ok("ask", "x", "--mode", "base")
    assert cloud.calls.count("Describe") == 3
    assert cloud.calls.count("Renew") == 1


def test_an_invite_that_is_used_up_is_not_sent_again(perfit: Perfit, cloud: FakeCloud) -> None:
    invite = cloud.invite().encode()
    perfit.ok("enroll", invite)
    assert perfit.json("enroll", invite)["cloud_id"] == cloud.cloud_id
    assert cloud.calls.count("Enroll") == 1
