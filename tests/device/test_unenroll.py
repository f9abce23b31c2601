"""Leaving a cloud: nothing readable is left here, and it refuses the old certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support import agents
from tests.support.device import Perfit
from tests.support.vaults import PASSPHRASE
from tests.support.waiting import wait_for

from perfit_device.agent import launch
from perfit_device.settings import DeviceSettings
from perfit_device.vault import removal
from perfit_device.vault.store import Vault
from perfit_shared.errors import IdentityRevoked, Unavailable, VaultBusy


def folder_of(home: Path, profile: str = "default") -> Path:
    return home / "profiles" / profile


def test_the_folder_is_overwritten_then_removed(ready: Perfit, cloud: Any, home: Path) -> None:
    """Handles that are open, as a copy by inode would be, read zeros."""
    ready.ok("update", "--epochs", "2")
    folder = folder_of(home)
    (folder / "left.new").write_bytes(b"of a kill")
    held = [(folder / name).open("rb") for name in ("vault.db", "left.new")]
    assert all(any(file.read()) for file in held)
    assert "this leaves the cloud" in ready.fails("unenroll")
    assert "Leave" not in cloud.calls and folder.exists()
    done = ready.json("unenroll", "--yes")
    assert done == {"profile": "default", "is_withdrawn": True, "examples": 0}
    assert cloud.calls[-1] == "Leave"
    assert not folder.exists()
    for file in held:
        file.seek(0)
        assert not any(file.read())
        file.close()
    assert 'there is no profile "default"' in ready.fails("status")


def test_the_history_may_stay(ready: Perfit, cloud: Any, home: Path) -> None:
    ready.ok("update", "--epochs", "2")
    items = ready.json("history", "list")
    assert ready.json("unenroll", "--keep-history", "--yes")["examples"] == 20
    assert ready.json("history", "list") == items
    assert "not enrolled" in ready.fails("ask", "x", code=4)
    with Vault.open(folder_of(home) / "vault.db", "correct horse") as vault:
        assert vault.kinds() == {"example", "import", "counter"}
    ready.ok("enroll", cloud.invite().encode())
    ready.ok("update", "--epochs", "2")


def test_a_cloud_that_is_away_changes_nothing_unless_offline(ready: Perfit, cloud: Any, home: Path) -> None:
    cloud.stop()
    line = ready.fails("unenroll", "--yes", code=3)
    assert "nothing was wiped, and --offline wipes without telling the cloud" in line
    assert len(ready.json("history", "list")) == 20
    _, _, err = ready("unenroll", "--offline", "--yes")
    assert "the cloud does not know yet that it left" in err
    assert not folder_of(home).exists()


def test_a_reply_that_got_lost_is_no_error(ready: Perfit, cloud: Any, home: Path) -> None:
    cloud.fail = lambda method: IdentityRevoked("withdrawn") if method == "Leave" else None
    ready.ok("unenroll", "--yes")
    assert not folder_of(home).exists()


def test_a_certificate_that_lapsed_leaves_too(perfit: Perfit, cloud: Any, home: Path) -> None:
    from datetime import timedelta

    cloud.certificate_age = timedelta(days=2)
    perfit.ok("enroll", cloud.invite().encode())
    cloud.fail = lambda method: Unavailable("away") if method == "Describe" else None
    cloud.calls.clear()
    perfit.ok("unenroll", "--yes")
    assert "Leave" in cloud.calls and not folder_of(home).exists()


def test_a_vault_in_use_is_not_wiped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "WAIT_SECONDS", 0.05)
    path = tmp_path / "profile" / "vault.db"
    with Vault.create(path, PASSPHRASE), pytest.raises(VaultBusy):
        removal.wipe(path)
    with Vault.open(path, PASSPHRASE):
        pass
    path.write_bytes(b"damaged" + path.read_bytes()[7:])
    removal.wipe(path)
    assert not path.parent.exists()


@pytest.mark.parametrize("again", [("unenroll", "--yes"), ("profiles", "remove", "default", "--yes")])
@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_removal_that_was_killed_is_finished(
    ready: Perfit, cloud: Any, home: Path, monkeypatch: pytest.MonkeyPatch, files: int, again: tuple[str, ...]
) -> None:
    """It left a vault whose first pages were overwritten, which nothing but `profiles remove` would take."""
    ready.ok("config", "set", "task", "news_headline")
    remove, removed = removal._remove, list[Path]()

    def killed(file: Path) -> None:
        if len(removed) == files:
            raise KeyboardInterrupt
        remove(file)
        removed.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(removal, "_remove", killed)
        assert ready("unenroll", "--yes")[0] == 130
    assert [file.name for file in removed][:1] == ["vault.db"][:files]
    assert not ready.json("profiles") and any((home / "profiles").iterdir())
    assert 'what an interrupted removal left of "default" is gone now' in ready(*again)[2]
    assert not any((home / "profiles").iterdir())
    assert ready.json("config", "list") == {}
    ready.ok("enroll", cloud.invite().encode())


def test_enrolling_anew_finishes_a_removal(ready: Perfit, cloud: Any, home: Path) -> None:
    folder_of(home).rename(home / "profiles" / ".default.removed")
    ready.ok("enroll", cloud.invite().encode())
    assert [each.name for each in (home / "profiles").iterdir()] == ["default"]


# -- profiles ------------------------------------------------------------------------------------


def test_profiles_are_chosen_and_removed(
    enrolled: Perfit, cloud: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled.ok("--profile", "work", "enroll", cloud.invite().encode())
    enrolled.ok("profiles", "use", "work")
    enrolled.ok("config", "set", "task", "news_headline")
    assert enrolled.ok("profiles") == "  default\n* work\n"
    monkeypatch.setenv("PERFIT_PROFILE", "default")
    assert enrolled.json("profiles") == [
        {"name": "default", "current": True},
        {"name": "work", "current": False},
    ]
    monkeypatch.delenv("PERFIT_PROFILE")
    assert 'there is no profile "home"; there are default, work' in enrolled.fails("profiles", "use", "home")
    assert 'this deletes the profile "work" for good' in enrolled.fails("profiles", "remove", "work")
    monkeypatch.setenv("PERFIT_PASSPHRASE", "forgotten by now")
    with (folder_of(home, "work") / "vault.db").open("rb") as held:
        enrolled.ok("profiles", "remove", "work", "--yes")
        assert not any(held.read())
    assert enrolled.ok("profiles") == "* default\n"
    assert enrolled.json("config", "list") == {}


@pytest.mark.parametrize(
    "words",
    [
        ("unenroll", "--yes"),
        ("unenroll", "--keep-history", "--yes"),
        ("profiles", "remove", "default", "--yes"),
    ],
)
def test_an_agent_ends_with_its_profile(ready: Perfit, home: Path, words: tuple[str, ...]) -> None:
    settings = DeviceSettings("default", home)
    launch.start(settings, "correct horse")
    with agents.connected(settings) as agent:
        pid = agent.hello.pid
    ready.ok(*words)
    wait_for(lambda: agents.has_ended(pid))
    assert folder_of(home).exists() == ("--keep-history" in words)
