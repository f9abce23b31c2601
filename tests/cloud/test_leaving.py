"""Devices and a real server: a backup answers alike elsewhere, and who left is refused from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.authority import csr_of
from tests.support.cloud import TIMEOUT, Running, failure
from tests.support.models import random_shift
from tests.support.vaults import make_cheap

from perfit_cloud.model.artefacts import Artefact
from perfit_device import history, personal
from perfit_device.cloud.client import Cloud
from perfit_device.cloud_record import read_enrolment
from perfit_device.history import HistoryItem
from perfit_device.operations.ask import Question, prepare
from perfit_device.operations.backup import BackUp, Restore
from perfit_device.operations.enroll import Enroll
from perfit_device.operations.unenroll import Unenroll
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_device.shift_versions import PersonalShift
from perfit_device.vault.removal import wipe
from perfit_shared.errors import IdentityRevoked
from perfit_shared.invites import Invite
from perfit_shared.types import Mode
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc

REVOKED = ("PERMISSION_DENIED", {"perfit-code": "identity_revoked"})


@pytest.fixture
def running(run: Callable[..., Running]) -> Running:
    return run()


def invite_to(running: Running) -> Invite:
    addresses = running.server.addresses
    return Invite(addresses.enrol_address, running.authority.server_ca_der, 2**31, running.invite())


@pytest.fixture
def make(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Profile]]:
    """An enrolled profile of a name."""
    make_cheap(monkeypatch)
    made: list[Profile] = []

    def one(name: str) -> Profile:
        profile = Profile.create(DeviceSettings(name, tmp_path / "home"), passphrase="sesame")
        made.append(profile)
        profile.perform(Enroll(invite_to(running).encode()))
        return profile

    yield one
    for profile in made:
        if profile.settings.vault_path.exists():
            profile.close()


def answers_of(profile: Profile) -> dict[Mode, str]:
    question = Question("the cat sat on the mat", max_tokens=12, temperature=0)
    prepared = prepare(profile, question, list(Mode))
    return {mode: "".join(chunk.text for chunk in prepared.stream(mode)) for mode in Mode}


def test_a_backup_answers_alike_on_a_device_that_enrolled_by_itself(
    make: Callable[[str], Profile], artefact: Artefact, tmp_path: Path
) -> None:
    first, file = make("first"), str(tmp_path / "backup")
    with first.vault() as vault:
        info = first.connect()[1]
        served = first.artefact(None)
        history.add(vault, [HistoryItem.make(artefact.task, {"text": "a dog", "title": "dog"})])
        for seed in (1, 2):
            tensors = random_shift(artefact.spec, artefact.spec.personal_rank, seed)
            personal.store(vault, info.cloud_id, served, PersonalShift(tensors, seed))
    before = answers_of(first)
    assert before[Mode.PERSONAL] != before[Mode.COLLECTIVE]
    assert first.perform(BackUp(file, "apart")).versions == 2
    second = make("second")
    assert answers_of(second)[Mode.PERSONAL] != before[Mode.PERSONAL], "it is the seed's"
    done = second.perform(Restore(file, "apart"))
    assert (done.examples, done.versions, done.other_cloud) == (1, 2, ())
    assert answers_of(second) == before
    with first.vault() as one, second.vault() as other:
        mine, theirs = read_enrolment(one), read_enrolment(other)
    assert mine and theirs and mine.certificate != theirs.certificate


def test_who_left_is_refused_with_all_that_it_had(
    make: Callable[[str], Profile], running: Running, tmp_path: Path
) -> None:
    profile, other = make("leaves"), make("stays")
    answers_of(profile)
    with profile.vault() as vault:
        old = read_enrolment(vault)
        marks = [data[:40] for kind in vault.kinds() for data in vault.list(kind).values() if len(data) > 40]
    assert old is not None and marks
    assert profile.perform(Unenroll()).is_withdrawn
    profile.close()
    wipe(profile.settings.vault_path)  # as the command does
    assert not profile.settings.vault_path.parent.exists()
    left = [path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not any(mark in data for mark in marks for data in left)
    with pytest.raises(IdentityRevoked), Cloud(old) as cloud:
        cloud.describe()
    device = running.with_certificate(old.identity.key, old.certificate)
    identity = enrol_grpc.IdentityStub(device.channel)
    renew = enrol_pb.RenewRequest(csr=csr_of(device.key))
    assert failure(lambda: identity.Renew(renew, timeout=TIMEOUT))[:2] == REVOKED
    assert failure(lambda: identity.Leave(enrol_pb.LeaveRequest(), timeout=TIMEOUT))[:2] == REVOKED
    assert next(each for each in running.authority.devices() if each.identity == device.identity).revoked
    assert answers_of(other), "nobody else is concerned"


def test_leaving_needs_a_certificate_of_its_own(running: Running) -> None:
    """Nobody withdraws somebody else: the call names no identity, and the retired one calls nothing."""
    old, other = running.device(), running.device()
    key = old.key
    answer = enrol_grpc.IdentityStub(old.channel).Renew(enrol_pb.RenewRequest(csr=csr_of(key)))
    new = running.with_certificate(key, answer.certificate)
    new.describe()
    leave: Any = enrol_grpc.IdentityStub(old.channel).Leave
    assert failure(lambda: leave(enrol_pb.LeaveRequest()))[1] == {"perfit-code": "certificate_superseded"}
    new.describe()
    other.describe()
    enrol_grpc.IdentityStub(new.channel).Leave(enrol_pb.LeaveRequest(), timeout=TIMEOUT)
    assert failure(new.describe)[:2] == REVOKED
    other.describe()
