"""A backup: one sealed file, from one device to another that enrolled by itself."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud
from tests.support.vaults import CHEAP

from perfit_device import answers, backup
from perfit_device.answers import Answer
from perfit_device.backup import Row
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import VaultDamaged, VaultError, WrongPassphrase

SECRET = "the secret of the backup"
ROWS = [
    Row("a", "one", b"x" * 10),
    Row("a", "two", b""),
    Row("b", "large", random.Random(1).randbytes(3 << 20)),
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERFIT_BACKUP_PASSPHRASE", SECRET)
    return tmp_path / "mine.perfit"


def vault_of(home: Path, profile: str = "default") -> Vault:
    return Vault.open(home / "profiles" / profile / "vault.db", "correct horse")


def rows_of(home: Path, profile: str) -> dict[str, dict[str, bytes]]:
    with vault_of(home, profile) as vault:
        return {kind: vault.list(kind) for kind in vault.kinds()}


def written(rows: list[Row] = ROWS) -> bytes:
    file = io.BytesIO()
    backup.write(file, rows, SECRET, CHEAP)
    return file.getvalue()


def read(data: bytes, passphrase: str = SECRET) -> list[Row]:
    return list(backup.read(io.BytesIO(data), passphrase, KdfParams()))


# -- the file ------------------------------------------------------------------------------------


def test_rows_come_back_and_nothing_of_them_can_be_read(caplog: object) -> None:
    data = written()
    assert read(data) == ROWS
    assert read(written([])) == []
    assert b"large" not in data and ROWS[2].data[:16] not in data
    assert written() != data, "a new key each time"


def test_every_cut_and_every_flip_is_an_error() -> None:
    data, rng = written(), random.Random(3)
    for at in [*range(0, 700, 7), *(rng.randrange(len(data)) for _ in range(40))]:
        with pytest.raises(VaultError):
            read(data[:at])
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        with pytest.raises(VaultError):
            read(bytes(changed))
    with pytest.raises(VaultDamaged, match="changed or cut off"):
        read(data + b"x")
    with pytest.raises(WrongPassphrase):
        read(data, "another")


def test_frames_keep_their_places() -> None:
    """Frames that are whole by themselves, in another order, doubled, or without the last."""
    data = written()
    starts = frames(data)
    assert len(starts) == 5
    head = data[: starts[0]]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    assert read(head + b"".join(parts)) == ROWS
    for order in ([1, 0, 2, 3, 4], [0, 1, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 4], [4]):
        with pytest.raises(VaultDamaged):
            read(head + b"".join(parts[number] for number in order))


def frames(data: bytes) -> list[int]:
    at = 16 + 4 + int.from_bytes(data[16:20], "big")
    found = []
    while at < len(data):
        found.append(at)
        at += 4 + 60 + int.from_bytes(data[at : at + 4], "big")
    return found


def test_lengths_are_bounded_before_anything_is_read() -> None:
    """A file that says it has gigabytes makes nobody allocate them."""
    data, asked = written(), []

    class Asked(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size)
            return super().read(size)

    at = frames(data)[0]
    for hostile in (data[:16] + b"\xff" * 4 + data[20:], data[:at] + b"\xff" * 4 + data[at + 4 :]):
        asked.clear()
        with pytest.raises(VaultDamaged):
            list(backup.read(Asked(hostile), SECRET, CHEAP))
        assert all(size is not None and 0 <= size <= 4096 for size in asked)
    dear = data.replace(b'"iterations": 1', b'"iterations": 9')
    with pytest.raises(VaultError):
        read(dear)


# -- from one device to another --------------------------------------------------------------------


@pytest.fixture
def trained(ready: Perfit, home: Path) -> Perfit:
    ready.ok("update", "--epochs", "2")
    ready.ok("update", "--epochs", "3")
    with vault_of(home) as vault:
        answers.put(vault, Answer("Budget passed", "news_headline", fields={"text": "The council voted."}))
    ready.ok("config", "set", "task", "news_headline")
    return ready


def personal_of(cloud: FakeCloud) -> Callable[[], list[bytes]]:
    """The tensors that questions come with, from here on."""
    seen: list[bytes] = []
    check = cloud.tensors

    def noting(shift: Any, context: Any) -> Any:
        seen.append(shift.personal)
        return check(shift, context)

    cloud.tensors = noting  # type: ignore[method-assign]
    return lambda: seen


def test_another_device_of_the_same_cloud_answers_the_same(
    trained: Perfit, cloud: Any, home: Path, file: Path
) -> None:
    trained.ok("evaluate")
    trained.ok("history", "add", "After the update.", "Later", "--task", "news_headline")
    done = trained.json("backup", str(file))
    assert (done["examples"], done["versions"], done["answers"]) == (21, 2, 1)
    assert file.stat().st_mode & 0o777 == 0o600
    trained.ok("--profile", "other", "enroll", cloud.invite().encode())
    seen = personal_of(cloud)
    trained.ok("ask", "x", "--temperature", "0")
    restored = trained.json("--profile", "other", "restore", str(file))
    assert (restored["examples"], restored["versions"], restored["answers"]) == (21, 2, 1)
    assert restored["other_cloud"] == []
    trained.ok("--profile", "other", "ask", "x", "--temperature", "0")
    first, second = seen()
    assert first and first == second
    mine, theirs = rows_of(home, "default"), rows_of(home, "other")
    for rows in (mine, theirs):
        rows["answer"].pop("last", None)  # what each of them asked since
    for kind in ("example", "version", "trained", "answer", "measured", "seed"):
        assert mine[kind] == theirs[kind] and mine[kind], kind
    assert mine["identity"] != theirs["identity"]
    assert trained.json("--profile", "other", "config", "list")["task.other"] == "news_headline"
    listed = trained.json("--profile", "other", "versions", "list")["versions"]
    assert [(v["number"], v["follows"], v["origin"], v["current"]) for v in listed] == [
        (1, 0, "restored", False),
        (2, 1, "restored", True),
    ]
    assert trained.json("--profile", "other", "undo")["number"] == 1


def test_a_backup_never_holds_the_identity(trained: Perfit, home: Path, file: Path) -> None:
    trained.ok("backup", str(file))
    held = {row.kind for row in read(file.read_bytes())}
    assert held == {
        *("settings", "example", "import", "answer", "shift", "version", "trained"),
        *("updates", "seed"),
    }
    identity = rows_of(home, "default")["identity"]["current"]
    key = json.loads(identity)["key"].encode()
    assert not any(key in row.data for row in read(file.read_bytes()))


def test_into_a_profile_with_examples_of_its_own(trained: Perfit, cloud: Any, home: Path, file: Path) -> None:
    trained.ok("backup", str(file))
    before = rows_of(home, "default")
    assert "has 20 examples and 1 shifts already; `--into default`" in trained.fails("restore", str(file))
    assert rows_of(home, "default") == before
    again = trained.json("restore", str(file), "--into", "default")
    assert (again["examples"], again["known"], again["versions"], again["answers"]) == (0, 20, 0, 0)
    assert rows_of(home, "default") == before
    trained.ok("history", "add", "One of mine.", "Mine", "--task", "news_headline")
    trained.ok("update", "--epochs", "4", "--anyway")
    trained.ok("versions", "drop", "1", "--yes")
    current = trained.json("versions", "list")["versions"][-1]["number"]
    done = trained.json("restore", str(file), "--into", "default")
    assert (done["examples"], done["versions"]) == (0, 1), "the one that was dropped"
    versions = trained.json("versions", "list")["versions"]
    assert [(v["number"], v["current"]) for v in versions] == [(2, False), (current, True), (4, False)]
    assert trained.json("undo")["number"] == 2
    assert len(trained.json("history", "list")) == 21


def test_what_belongs_to_another_cloud_is_kept_and_said(trained: Perfit, home: Path, file: Path) -> None:
    trained.ok("backup", str(file))
    other = FakeCloud()
    try:
        trained.ok("--profile", "far", "enroll", other.invite().encode())
        _, _, err = trained("--profile", "far", "restore", str(file))
        assert "the shift for news_headline belongs to another cloud" in err
        assert "no personal shift yet" in trained.fails("--profile", "far", "undo")
        assert len(rows_of(home, "far")["version"]) == 2
        trained.ok("--profile", "far", "update", "--epochs", "2")
    finally:
        other.stop()


@pytest.mark.parametrize("how", ["passphrase", "flipped", "cut", "other", "hostile tensors", "newer"])
def test_a_backup_that_cannot_be_restored_touches_nothing(
    trained: Perfit, cloud: Any, home: Path, file: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.ok("backup", str(file))
    trained.ok("--profile", "other", "enroll", cloud.invite().encode())
    before, data = rows_of(home, "other"), file.read_bytes()
    if how == "passphrase":
        monkeypatch.setenv("PERFIT_BACKUP_PASSPHRASE", "wrong")
    elif how == "flipped":
        file.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    elif how == "cut":
        file.write_bytes(data[: frames(data)[-1]])
    elif how == "other":
        file.write_bytes(b"PK\x03\x04 something else")
    else:
        changed = [
            Row(row.kind, row.name, b"\0" * 64 if row.kind == "version" else row.data)
            if how != "newer"
            else Row("thought" if row.kind == "answer" else row.kind, row.name, row.data)
            for row in read(data)
        ]
        file.write_bytes(written(changed))
    line = trained.fails("--profile", "other", "restore", str(file), code=6)
    assert "nothing was" in line or "no backup" in line
    assert rows_of(home, "other") == before


def test_a_backup_is_written_whole_or_not_at_all(
    trained: Perfit, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(backup, "_write_frame", full)
        assert "No space left on device; nothing was written" in trained.fails("backup", str(file))
    assert list(file.parent.glob(f"{file.name}*")) == []
    trained.ok("backup", str(file))
    data = file.read_bytes()
    assert "exists; choose another name, or --force" in trained.fails("backup", str(file))
    assert file.read_bytes() == data
    trained.ok("backup", str(file), "--force")
    assert file.read_bytes() != data
    assert "a backup is no text" in trained("backup", "-", "--json")[2]


def test_imports_come_with_their_numbers_behind_those_that_are_there(
    trained: Perfit, cloud: Any, home: Path, file: Path
) -> None:
    with vault_of(home) as vault:
        vault.put("import", "1", json.dumps({"number": 1, "file": "mine.jsonl"}).encode())
    trained.ok("backup", str(file))
    trained.ok("--profile", "other", "enroll", cloud.invite().encode())
    with vault_of(home, "other") as vault:
        vault.put("import", "1", json.dumps({"number": 1, "file": "theirs.jsonl"}).encode())
        vault.put("counter", "imports", b"1")
    trained.ok("--profile", "other", "restore", str(file))
    found = {name: json.loads(data) for name, data in rows_of(home, "other")["import"].items()}
    assert found["1"]["file"] == "theirs.jsonl"
    assert (found["2"]["number"], found["2"]["file"]) == (2, "mine.jsonl")


def test_status_is_the_same_after_a_restore(trained: Perfit, cloud: Any, file: Path) -> None:
    """What an update knew comes along, though examples have other numbers where some were forgotten."""
    trained.ok("evaluate")
    first = trained.json("history", "list")[0]["name"]
    trained.ok("forget", first, "--yes")
    trained.ok("history", "add", "After the update.", "Later", "--task", "news_headline")
    trained.ok("backup", str(file))
    trained.ok("--profile", "other", "enroll", cloud.invite().encode())
    trained.ok("--profile", "other", "restore", str(file))
    mine, theirs = (
        trained.json("--profile", profile, "status")["tasks"]["news_headline"]
        for profile in ("default", "other")
    )
    assert mine["new"] == 1 and mine["measured"]
    for key in ("new", "measured", "best", "split", "current"):
        assert mine[key] == theirs[key], key
