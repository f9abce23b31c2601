"""Makes the vault of today's format that every later version must open, and knows what the kept ones hold.

.venv/bin/python -m tests.support.old_files      (from the root; only for a new format)

`vault-format1.db` and `vault-format1-undo.db` were made so by the perfit of format 1. The first holds one
version of one shift; the second what `write` writes today.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from perfit_device import history, personal
from perfit_device.cloud.codec import Artefact, CloudInfo, Limits
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud_record import write_enrolment, write_record
from perfit_device.history import HistoryItem
from perfit_device.shift_versions import PersonalShift, TrainingSummary
from perfit_device.training import update as updates
from perfit_device.training.update import Finished, Plan
from perfit_device.vault.crypto import Header, KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import TASKS
from perfit_shared.training import Training

DATA = Path(__file__).parents[1] / "device" / "data"
KEPT = DATA / "vault-format2.db"
KEPT_OF_1 = DATA / "vault-format1-undo.db"
FIRST_OF_1 = DATA / "vault-format1.db"
PASSPHRASE = "a passphrase of format 1"
CLOUD = "c0ffee"
SPEC = ShiftSpec(layers=(1,), positions="l7", collective_rank=4, personal_rank=2, hidden_size=8)
ARTEFACT = Artefact("news_headline", "v1", SPEC, TASKS["news_headline"].resolved(False), 0.01, 3, 4)
ROW = updates.update_row(CLOUD, "news_headline", "news_headline")
SEED = ShiftTensors.identity(SPEC, SPEC.personal_rank, 1)
NEXT = ShiftTensors.identity(SPEC, SPEC.personal_rank, 2)
OTHER = replace(ARTEFACT, name="news_categorize", task=TASKS["news_categorize"].resolved(False))
LEARNED = TrainingSummary(8, 1.5, 1.0, 1.4, 1.2)
STEPS = 2


def items() -> list[HistoryItem]:
    return [
        HistoryItem.make(
            ARTEFACT.task,
            {"text": f"The council met in room {n}, façade №{n}.", "title": f"Meeting {n}"},
            date=f"2024-01-{n + 1:02}",
            part="test" if n > 9 else "",
        )
        for n in range(12)
    ]


PLAN = Plan(
    epochs=3,
    learning_rate=0.01,
    batch_size=4,
    seed=0,
    examples=8,
    fresh=False,
    history=history.split(items()).digest(),
    version="v1",
)


def versions(vault: Vault, artefact: str = ARTEFACT.name) -> list[tuple[int, str, int, str]]:
    """(number, artefact's version, updates, digest of the tensors) of each."""
    kept = personal.read_versions(vault, CLOUD, artefact)
    assert kept is not None and kept.current == kept.kept[-1].number
    return [
        (
            v.number,
            v.artefact_version,
            v.updates,
            personal.read_tensors(vault, CLOUD, artefact, v.number).digest(),
        )
        for v in kept.kept
    ]


TWO = [(1, "v1", 2, SEED.digest()), (2, "v1", 3, NEXT.digest())]


def header_of(path: Path) -> Header:
    connection = sqlite3.connect(path)
    (data,) = connection.execute("SELECT data FROM header").fetchone()
    connection.close()
    return Header.from_bytes(data)


def write(path: Path) -> None:
    """A row of every kind, rewritten and removed ones among them."""
    identity = Identity.create()
    name, start = x509.Name([]), datetime(2026, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(1)
        .public_key(identity.key.public_key())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=7))
        .sign(identity.key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    info = CloudInfo("a model", "f" * 64, CLOUD, (ARTEFACT,), Limits(512, 64, 3, 1 << 20, 4, 100))
    training = Training.start(PLAN, SEED)
    for _ in range(STEPS):
        training = training.stepped(1.5, SEED)
    with Vault.create(path, "another", kdf=KdfParams(memory_kib=64, iterations=1, lanes=4)) as vault:
        vault.put("identity", "pending", bytes(32) + identity.to_der())
        write_enrolment(vault, Enrolment(identity, certificate, certificate, "a:1", "a:2", CLOUD))
        write_record(vault, info)
        history.add(vault, items())
        extra = HistoryItem.make(ARTEFACT.task, {"text": "one more", "title": "x"})
        history.add(vault, [extra])
        history.forget(vault, [extra])
        personal.store(vault, CLOUD, ARTEFACT, PersonalShift(SEED, 2))
        personal.store(vault, CLOUD, ARTEFACT, PersonalShift(NEXT, 3, learned=LEARNED))
        personal.store(vault, CLOUD, OTHER, PersonalShift(SEED, 1, 2))
        vault.put("checkpoint", ROW, training.to_bytes())
        vault.put("refused", ROW, json.dumps({"of": "x", "names": ["y"]}).encode())
        vault.put("finished", ROW, json.dumps(asdict(Finished(PLAN, "f" * 64, accepted=True))).encode())
        vault.change_passphrase(PASSPHRASE)


if __name__ == "__main__":
    write(KEPT)
    KEPT.with_name(KEPT.name + ".sum").unlink()
