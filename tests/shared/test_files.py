"""A file is written whole or not at all, whatever ends the writing."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perfit_shared.files import write_whole, written_whole

# Ends the process as a kill does, before or after its n-th call of a step.
_KILLED = """
import os, sys
from pathlib import Path
from perfit_shared.files import write_whole

path, step, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
real = getattr(os, step)

def dies(*args, **options):
    if when == "after":
        real(*args, **options)
    os._exit(9)

setattr(os, step, dies)
write_whole(path, b"new" * 1000)
"""


@pytest.mark.parametrize(
    ("step", "when", "left"),
    [
        ("open", "after", b"old"),
        ("fsync", "before", b"old"),
        ("fsync", "after", b"old"),
        ("replace", "before", b"old"),
        ("replace", "after", b"new" * 1000),
    ],
)
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, step: str, when: str, left: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", _KILLED, path, step, when], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == left


def test_a_full_disk_leaves_the_old_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match="too large"):
            write_whole(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_an_error_of_the_writer_leaves_the_old_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_the_new_file_has_its_mode_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with written_whole(path, mode=0o600) as file:
        (half,) = (p for p in tmp_path.iterdir() if p != path)
        assert half.stat().st_mode & 0o777 == 0o600
        file.write(b"new")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_two_writers_at_once_share_no_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as first, written_whole(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"first"]  # the last to end


def test_where_it_must_not_replace_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old", replaces=False)
    with pytest.raises(FileExistsError):
        write_whole(path, b"new", replaces=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}
