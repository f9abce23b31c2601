"""Another user of the machine, whom root becomes here: at the agent's socket, its process, in its place."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.agents import SECRET, connected, running
from tests.support.device import Perfit

from perfit_device.agent import client
from perfit_device.agent.address import address_of
from perfit_device.agent.controls import State
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import ConfigError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user"
)
STRANGER = 54321
BECOME = f"import os, socket, sys\nos.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})\n"
CONNECT = """
s = socket.socket(socket.AF_UNIX)
try: s.connect(sys.argv[1])
except PermissionError: print("refused"); sys.exit()
print(s.recv(100))
"""
# Says when it listens, and then what came.
LISTEN = """
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); s.listen()
print("listens", flush=True)
other, _ = s.accept()
print(other.recv(1000))
"""
OPEN = """
for path in sys.argv[1:]:
    try: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
    except PermissionError: continue
    print("open to all:", path)
"""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Short enough for a socket beside the vault, and outside pytest's own, which are closed to others."""
    with tempfile.TemporaryDirectory(prefix="perfit-") as folder:
        yield Path(folder)


@pytest.fixture
def made(home: Path) -> DeviceSettings:
    """Not enrolled."""
    settings = DeviceSettings("default", home)
    Vault.create(settings.vault_path, SECRET).close()
    return settings


@pytest.fixture
def reachable(made: DeviceSettings) -> Callable[[], None]:
    """Let everybody into every folder on the way."""

    def reach() -> None:
        for folder in made.vault_path.parents:
            if Path(tempfile.gettempdir()) in folder.parents:
                folder.chmod(0o755)

    return reach


def stranger(program: str, *arguments: str) -> str:
    words = [sys.executable, "-c", BECOME + program, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_another_user_of_the_machine_cannot_use_it(
    made: DeviceSettings, reachable: Callable[[], None]
) -> None:
    with running(made):
        place = Path(address_of(made))
        assert place.stat().st_mode & 0o777 == 0o600
        assert stranger(CONNECT, str(place)) == "refused"
        reachable()
        assert stranger(CONNECT, str(place)) == "refused", "by the socket's own mode"
        place.chmod(0o666)
        assert stranger(CONNECT, str(place)) == "b''", "by its uid"
        with connected(made) as agent:
            assert agent.perform(State()).pid > 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_another_user_reads_nothing_of_its_files_and_its_process(
    made: DeviceSettings, reachable: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PERFIT_NEW_PASSPHRASE", "PERFIT_BACKUP_PASSPHRASE"):
        monkeypatch.setenv(name, "staple battery")
    with running(made) as pid:
        process = Path(f"/proc/{pid}")
        said = process.joinpath("environ").read_bytes() + process.joinpath("cmdline").read_bytes()
        assert b"PERFIT_HOME" in said, "this process may read it"
        assert SECRET.encode() not in said and b"staple battery" not in said
        folder = made.vault_path.parent
        names = {file.name for file in folder.iterdir()}
        assert names >= {"vault.db", "agent.log", "agent.lock", "agent.sock"}
        reachable()
        files = [str(folder / name) for name in names - {"agent.sock"}]
        secret = [str(process / name) for name in ("environ", "mem", "maps", "fd", "cwd")]
        assert stranger(OPEN, *files, *secret) == ""
        assert stranger(OPEN, str(process / "cmdline")), "the search does find what is open"


@pytest.mark.parametrize("by_link", [False, True], ids=["a socket", "a link to a socket"])
def test_who_listens_in_its_place_hears_nothing(
    made: DeviceSettings, perfit: Perfit, reachable: Callable[[], None], tmp_path: Path, by_link: bool
) -> None:
    reachable()
    place, open_to_all = Path(address_of(made)), tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    at = open_to_all / "s"
    with subprocess.Popen(
        [sys.executable, "-c", BECOME + LISTEN, str(at)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "listens\n"
        if by_link:
            place.symlink_to(at)
        else:
            at.rename(place)
        assert "another user's process listens" in perfit.fails("unlock")
        assert process.communicate(timeout=60)[0] == "b''\n", "no word, and no passphrase"
    with running(made), connected(made) as agent:
        assert agent.perform(State()).pid > 0 and not place.is_symlink()


PLANTS = {
    "a folder for them alone": "os.mkdir(sys.argv[1], 0o700)",
    "a folder for all": "os.mkdir(sys.argv[1]); os.chmod(sys.argv[1], 0o777)",
    "a link to a folder of theirs": "os.mkdir(sys.argv[1] + 'x'); os.symlink(sys.argv[1] + 'x', sys.argv[1])",
    "a link to a folder of ours": "os.symlink(sys.argv[2], sys.argv[1])",
    "a link to nothing": "os.symlink(sys.argv[1] + 'x', sys.argv[1])",
    "a file": "open(sys.argv[1], 'w').close()",
}


@pytest.mark.parametrize("what", PLANTS)
def test_what_others_put_in_its_folder_s_place_is_refused(
    what: str,
    tmp_path: Path,
    cheap_vaults: None,
    reachable: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder for all, such as /tmp, where a socket lies whose own path would be too long."""
    reachable()
    folder, ours = tmp_path / "tmp" / "perfit-0", tmp_path / "ours"
    ours.mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.parent.chmod(0o1777)
    stranger(PLANTS[what], str(folder), str(ours))
    assert os.path.lexists(folder)
    monkeypatch.setattr(DeviceSettings, "runtime_folder", property(lambda _: folder))
    deep = DeviceSettings("default", tmp_path / ("deep" * 20) / ("er" * 40))
    for make in (False, True):
        with pytest.raises(ConfigError, match="yours alone"):
            address_of(deep, make=make)
    with pytest.raises(ConfigError, match="yours alone"):
        client.connect(deep)
    folder.unlink() if folder.is_symlink() or folder.is_file() else folder.rmdir()
    assert Path(address_of(deep, make=True)).parent.stat().st_mode & 0o777 == 0o700
