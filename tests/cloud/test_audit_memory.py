"""The scanner against small processes whose memory and files are known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.memory import looking
from tests.support.waiting import wait_for

from perfit_cloud.audit import memory
from perfit_cloud.audit.memory import Look, check_allowed, cpu_seconds, look_at, processes_of, settle, stopped
from perfit_cloud.audit.needles import Needle, raw, text
from perfit_cloud.audit.search import Index
from perfit_shared.errors import ConfigError

SECRET = np.random.default_rng(11).standard_normal(300).astype(np.float32).tobytes()
WORD = "qzvxkjwy"


CHILD = """
import ctypes, sys
print("ready", flush=True)
held = []
for line in sys.stdin:
    exec(bytes.fromhex(line))
    print("done", flush=True)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """A process that runs what it is told; returns its id. Code goes as hex: it holds the secrets."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONMALLOC": "malloc",
            "MALLOC_PERTURB_": "165",
            "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        },
    )

    def run(code: str = "pass") -> int:
        assert process.stdin and process.stdout
        process.stdin.write(code.encode().hex() + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        return process.pid

    assert process.stdout
    process.stdout.readline()
    yield run
    process.kill()
    process.communicate()


def looked(pid: int, needles: list[Needle], *folders: Path) -> Look:
    with stopped(pid):
        return look_at(pid, Index(needles), folders)


def hidden(secret: bytes) -> str:
    """Code for the secret, which does not hold it."""
    return f"bytes(b ^ 90 for b in {bytes(b ^ 90 for b in secret)!r})"


@looking
def test_what_a_process_holds_is_found_and_what_it_overwrote_is_not(child: Callable[[str], int]) -> None:
    needles = [raw("wire", SECRET)]
    assert not looked(child("pass"), needles).found
    pid = child(f"held.append(bytearray({hidden(SECRET)}))")
    look = looked(pid, needles)
    assert {needles[found.needle].kind for found in look.found} == {"wire"}
    assert look.searched > 2**20
    assert not look.unreadable
    child("held[0][:] = bytes(len(held[0])); held.clear()")
    assert not looked(pid, needles).found


@looking
def test_freed_memory_is_looked_at(child: Callable[[str], int]) -> None:
    """Large blocks go back to the system; a small one stays in the heap, after its owner has freed it."""
    copy = (
        f"m = ctypes.CDLL(None); m.malloc.restype = ctypes.c_void_p; p = m.malloc(600)\n"
        f"s = bytearray({hidden(SECRET[:512])}); c = (ctypes.c_char * 512).from_buffer(s)\n"
        f"ctypes.memmove(p, c, 512); del c; s[:] = bytes(512); m.mallopt(-6, 0); m.free(ctypes.c_void_p(p))"
    )
    found = looked(child(copy), [raw("wire", SECRET)]).found
    assert [f.where for f in found] == ["heap"]


@looking
def test_what_lies_on_the_stack_of_a_thread_is_found_there(child: Callable[[str], int]) -> None:
    """An argument passed by value, of a function that never returns."""
    code = (
        "import threading; of_libc = ctypes.CDLL(None); struct = type('S', (ctypes.Structure,), "
        "{'_fields_': [('bytes', ctypes.c_char * 512)]}); of_libc.pause.argtypes = [struct]\n"
        f"given = struct(); given.bytes = {hidden(SECRET[:512])}\n"
        "threading.Thread(target=of_libc.pause, args=(given,), daemon=True).start()"
    )
    pid = child(code)
    needles = [raw("wire", SECRET[:512])]
    wait_for(
        lambda: "stack of a thread" in {f.where for f in looked(pid, needles).found}
    )  # once it has begun


@looking
@pytest.mark.parametrize("letter", ["", "\u0434", "\U0001f600"], ids=["utf-8", "ucs-2", "ucs-4"])
def test_python_texts_of_every_width_are_found(child: Callable[[str], int], letter: str) -> None:
    needles = list(text("t", [WORD]))
    pid = child(f"held.append({hidden(WORD.encode())}.decode() + {letter!r})")
    found = {needles[f.needle].kind for f in looked(pid, needles).found}
    assert {"": "t utf-8", "\u0434": "t ucs-2", "\U0001f600": "t ucs-4"}[letter] in found


@looking
@pytest.mark.parametrize(("place", "block"), [(8180, 8184), (8188, 8192)])
def test_a_run_across_two_reads_is_found(
    child: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, place: int, block: int
) -> None:
    """Of memory read page by page; the secret lies on the border of two pages."""
    monkeypatch.setattr(memory, "_CHUNK_BYTES", 4096)
    code = (
        "import mmap; m = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        f"for i, b in enumerate({bytes(b ^ 90 for b in SECRET[:16])!r}): m[{place} + i] = b ^ 90\n"
        "held.append(m)"
    )
    found = looked(child(code), [raw("wire", SECRET[:16])]).found
    assert [(f.where, f.address % 4096) for f in found] == [("anonymous memory", block % 4096)]


@looking
def test_pieces_of_a_secret_in_several_pages_are_told_together(
    child: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory read page by page. The audit drops what turns out public, and has to know all of it."""
    monkeypatch.setattr(memory, "_CHUNK_BYTES", 4096)
    code = (
        "import mmap; m = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "def put(at, data):\n for i, b in enumerate(data): m[at + i] = b ^ 90\n"
        f"held.append(m); put(4096, {bytes(b ^ 90 for b in SECRET[:16])!r})\n"
        f"put(20480, {bytes(b ^ 90 for b in SECRET[64:80])!r})"
    )
    (found,) = looked(child(code), [raw("wire", SECRET)]).found
    assert found.spans == {(0, 0, 16), (0, 64, 80)}


@looking
def test_only_pages_that_changed_since_an_earlier_look_are_searched(child: Callable[[str], int]) -> None:
    """Whole ones: what was there before is no part of a call. A run may still begin in a page that did not
    change, and end in one that did."""
    needles, mirrored = [raw("wire", SECRET[:16])], bytes(b ^ 90 for b in SECRET[:16])
    code = (
        "import mmap; m = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "def put(at, data):\n for i, b in enumerate(data): m[at + i] = b ^ 90\n"
        f"held.append(m); put(0, bytes(65536)); put(8192, {mirrored!r}); put(40948, {mirrored[:12]!r})"
    )
    pid = child(code)
    with stopped(pid):
        before = look_at(pid, Index(needles))
        assert [found.address % 4096 for found in before.found] == [0]
        assert not look_at(pid, Index(needles), since=before.pages).found
    child("m[8192 + 4000] = 1")  # the page is another now
    with stopped(pid):
        look = look_at(pid, Index(needles), since=before.pages)
    assert [found.address for found in look.found] == [before.found[0].address]
    child(f"m[8192] ^= 1; put(40960, {mirrored[12:]!r})")
    with stopped(pid):
        look = look_at(pid, Index(needles), since=before.pages)
    assert [found.address % 4096 for found in look.found] == [4088]
    assert look.searched >= before.searched - 2**20


@looking
def test_shared_memory_and_memory_taken_back_are_told_apart(child: Callable[[str], int]) -> None:
    """A page of shared memory may hold bytes although this process has not touched it.

    Far from its ends: looking at what lies beside them brings the pages there in.
    """
    code = (
        "import mmap; m = mmap.mmap(-1, 2**20); m[2**19:2**19 + 300] = " + hidden(SECRET[:300]) + "\n"
        "m.madvise(mmap.MADV_DONTNEED); held.append(m)"
    )
    found = looked(child(code), [raw("wire", SECRET)]).found
    assert "mapped zero (deleted)" in {f.where for f in found}


@looking
def test_files_are_looked_at_even_deleted_ones(child: Callable[[str], int], tmp_path: Path) -> None:
    needles = [raw("wire", SECRET)]
    code = (
        "import os; f = open('notes', 'wb', buffering=0); f.write(b'abc' + " + hidden(SECRET) + ")\n"
        "held.append(f)"
    )
    pid = child(code)
    assert {f.where for f in looked(pid, needles).found} >= {"open file notes"}
    child("os.unlink('notes')")
    assert any("notes" in f.where for f in looked(pid, needles).found)
    (tmp_path / "left").write_bytes(b"x" + SECRET[40:80])
    child("held.clear()")
    assert "file left" in {f.where for f in looked(pid, needles, tmp_path).found}


@looking
def test_children_are_looked_at_too(child: Callable[[str], int]) -> None:
    source = f"import time; s = {hidden(SECRET)}; print('up', flush=True); time.sleep(60)"
    code = (
        f"import subprocess; p = subprocess.Popen([{sys.executable!r}, '-c', {source!r}], "
        "stdout=subprocess.PIPE); p.stdout.readline(); held.append(p)"
    )
    pid = child(code)
    assert len(processes_of(pid)) == 2
    assert looked(pid, [raw("wire", SECRET)]).found
    child("p.kill(); p.wait()")
    assert not looked(pid, [raw("wire", SECRET)]).found


@looking
def test_a_process_stands_still_while_it_is_looked_at(child: Callable[[str], int]) -> None:
    pid = child("import threading, time\ndef spin():\n while time.process_time() < end: pass")
    child("end = time.process_time() + 1.5; threading.Thread(target=spin, daemon=True).start()")
    with stopped(pid):
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        settle(pid)  # what it had done by then is counted late where there is much to do
        before = cpu_seconds(pid)
        time.sleep(0.3)
        assert cpu_seconds(pid) == before
    settle(pid)
    assert cpu_seconds(pid) > before  # it went on, and settle waited for its end


def test_without_the_capability_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000000400\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    with pytest.raises(ConfigError, match="needs CAP_SYS_PTRACE; run it as root, or"):
        check_allowed()
    status.write_text("Name:\tx\nCapEff:\t0000000000080000\n")
    check_allowed()
