"""The scanner against bytes and against small processes whose memory is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from tests.conftest import random_shift

from perfit_cloud.audit import memory
from perfit_cloud.audit.calls import Generate, Running
from perfit_cloud.audit.memory import Look, check_allowed, cpu_seconds, look_at, processes_of, settle, stopped
from perfit_cloud.audit.needles import (
    Needle,
    canary_words,
    gradient_forms,
    gradient_sent,
    raw,
    tensor_forms,
    text,
    token_ids,
)
from perfit_cloud.audit.rows import Row, forms_seen, is_kept, unseen
from perfit_cloud.audit.scenarios import _ended
from perfit_cloud.audit.search import Index
from perfit_shared.errors import ConfigError, PerfitError
from perfit_shared.shifts import ShiftSpec, ShiftTensors, gradient_to_bytes

SPEC = ShiftSpec((1, 2), "f3+l3", 6, 3, hidden_size=32)
RNG = np.random.default_rng(11)
SECRET = RNG.standard_normal(300).astype(np.float32).tobytes()
WORD = "qzvxkjwy"


def may_look() -> bool:
    try:
        check_allowed()
    except ConfigError:
        return False
    return True


looking = pytest.mark.skipif(not may_look(), reason="looking into other processes needs CAP_SYS_PTRACE")


def kinds(needles: list[Needle], data: bytes) -> set[str]:
    """What is found of the needles in bytes that lie at a multiple of 8."""
    index = Index(needles)
    return {needles[number].kind for number in index.search(np.frombuffer(data, np.uint8))}


# -- search --------------------------------------------------------------------------------------


@pytest.mark.parametrize("needle", [
    raw("wire", SECRET),
    *text("text", [WORD]),
    *token_ids("ids", [[901, 17, 4000, 33]]),
], ids=lambda needle: needle.kind)  # fmt: skip
def test_the_shortest_run_is_found_at_every_offset(needle: Needle) -> None:
    index = Index([needle])
    secret = needle.pieces[0][: needle.run] if needle.kind == "wire" else needle.pieces[0]
    assert len(secret) == needle.run
    for offset in range(0, 40, needle.item):
        data = bytearray(RNG.integers(128, 256, 200, dtype=np.uint8).tobytes())
        data[offset : offset + len(secret)] = secret
        assert 0 in index.search(np.frombuffer(data, np.uint8)), offset
        data[offset + len(secret) - 1] ^= 1  # one byte less is no run
        assert not index.search(np.frombuffer(data, np.uint8)), offset


def test_a_run_from_the_middle_of_a_secret_is_found_and_told_where() -> None:
    data = bytes(64) + SECRET[101:131] + bytes(64)
    found = Index([raw("wire", SECRET)]).search(np.frombuffer(data, np.uint8))
    assert {span[0] for span in found[0].spans} == {0}
    assert min(start for _, start, _ in found[0].spans) >= 101
    assert max(stop for _, _, stop in found[0].spans) <= 131
    assert 64 <= found[0].first < 94


def test_zeros_beside_a_secret_are_no_part_of_it() -> None:
    found = Index([raw("wire", SECRET[:16])]).search(
        np.frombuffer(bytes(64) + SECRET[:16] + bytes(64), np.uint8)
    )
    assert found[0].spans == {(0, 0, 16)}


def test_a_run_lies_within_one_piece() -> None:
    pieces = Needle("two", (SECRET[:12], SECRET[12:24], SECRET[24:60]))
    assert not kinds([pieces], SECRET[:24] + bytes(64))
    assert kinds([pieces], bytes(8) + SECRET[24:60] + bytes(64))


def test_runs_across_the_bounds_of_what_is_searched_are_found() -> None:
    data = np.frombuffer(bytes(256) + SECRET[:24] + bytes(256), np.uint8)
    index = Index([raw("wire", SECRET)])
    assert index.search(data, 0, 264)
    assert index.search(data, 264, 512)


def test_runs_across_the_chunks_of_a_search_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perfit_cloud.audit.search._CHUNK", 64)
    for needle in (raw("wire", SECRET[:16]), *text("t", [WORD]), *token_ids("i", [[9, 8, 70000, 5]])):
        for offset in range(0, 200, needle.item):
            data = bytes(offset) + needle.pieces[0] + bytes(200)
            assert kinds([needle], data), (needle.kind, offset)


@pytest.mark.parametrize("item", [1, 2, 4, 8])
def test_runs_that_say_nothing_are_no_needles(item: int) -> None:
    dull = [bytes(400), np.tile(np.frombuffer(SECRET[:item], np.uint8), 50).tobytes()]
    for data in dull:
        assert not kinds([Needle("dull", (data,), item=item)], data)
        mixed = data + SECRET[:64]
        assert kinds([Needle("mixed", (mixed,), item=item)], mixed)
        assert not kinds([Needle("mixed", (mixed,), item=item)], data)
    assert not kinds([*token_ids("ids", [[7] * 40])], np.full(40, 7, np.int64).tobytes())


def test_zeros_within_a_secret_send_nobody_through_all_zeros_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors sent as int8 have many: every zero of the memory was compared with each, for minutes."""
    values = RNG.standard_normal(400)
    values[::2] = 0
    needle = Needle("fp64", (values.tobytes(),), item=8)
    assert kinds([needle], values[40:42].tobytes() + bytes(32))
    monkeypatch.setattr("perfit_cloud.audit.search._Table._compare", lambda *_: pytest.fail("compared"))
    assert not kinds([needle], bytes(4096))


def test_the_same_bytes_in_two_secrets_are_found_for_both() -> None:
    assert kinds([raw("one", SECRET), raw("two", SECRET[32:96])], SECRET[40:80]) == {"one", "two"}


def test_what_is_cut_out_of_a_needle_is_not_found_and_its_neighbours_are() -> None:
    piece = WORD + "".join(canary_words(RNG, 3))
    needle = next(iter(text("t", [piece]))).without([(0, 0, 10)])
    assert not kinds([needle], piece[:10].encode() + bytes(32))
    for at in range(3, len(piece) - 8):
        assert kinds([needle], piece[at : at + 8].encode() + bytes(32)), at


def test_arrays_in_files_are_found_at_any_offset() -> None:
    needle = Needle("fp64", (np.frombuffer(SECRET, np.float32).astype(np.float64).tobytes(),), item=8)
    for offset in range(8):
        found = Index([needle]).search_unaligned(bytes(offset) + needle.pieces[0][:16] + bytes(16))
        assert found[0].first == offset


# -- needles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_shift_is_found_in_every_form_that_a_server_may_hold(dtype: str) -> None:
    sent = random_shift(SPEC, 3, seed=4).to_bytes(dtype=dtype)
    needles = list(tensor_forms(sent, SPEC))
    for layer in ShiftTensors.from_bytes(sent, SPEC, 3).layers.values():
        for array in (*layer, layer.source - layer.rotation)[: 2 if dtype == "int8" else 4]:
            value = torch.tensor(array)
            if value.numel() < 8:
                continue
            for name, form in (
                ("tensor fp64", value.double()),
                ("tensor fp32", value),
                ("tensor bf16", value.bfloat16()),
                ("tensor fp16", value.half()),
            ):
                assert name in kinds(needles, _bytes(form))
                assert name in kinds(needles, _bytes(form.T))
    header = 8 + int.from_bytes(sent[:8], "little")
    assert kinds(needles, sent[header + 5 : header + 45]) >= {"tensor as sent"}
    assert not kinds(needles, sent[:header])
    assert not kinds(needles, random_shift(SPEC, 3, seed=5).to_bytes(dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_is_found_as_it_was_made_and_as_it_came(dtype: str) -> None:
    gradient = random_shift(SPEC, 3, seed=6)
    forms = list(gradient_forms(gradient))
    source = torch.tensor(gradient.layers[1].source)
    for name, form in (("fp32", source), ("fp16", source.half()), ("bf16", source.bfloat16())):
        assert f"gradient {name}" in kinds(forms, _bytes(form))
    reply = gradient_to_bytes(gradient, dtype)
    assert kinds(forms, _aligned(reply)) >= {
        "gradient fp32" if dtype == "float32" else "gradient fp16 scaled"
    }
    assert kinds([gradient_sent(reply)], reply) == {"gradient as sent"}


def test_words_are_found_in_every_encoding() -> None:
    needles = list(text("t", [WORD, "größerer"]))
    for kind, codec in (("utf-8", "utf-8"), ("ucs-2", "utf-16-le"), ("ucs-4", "utf-32-le")):
        assert kinds(needles, f"  {WORD}.".encode(codec) + bytes(8)) == {f"t {kind}"}
        assert kinds(needles, "größerer".encode(codec) + bytes(8)) == {f"t {kind}"}
    assert kinds(needles, "größerer".encode("latin-1")) == {"t latin-1"}
    assert not kinds(needles, WORD[:7].encode() + bytes(25))


def test_ids_are_found_as_integers_of_both_sizes() -> None:
    needles = list(token_ids("ids", [[5, 900, 31, 7, 12000]]))
    assert kinds(needles, np.array([900, 31, 7, 12000], np.int32).tobytes() + bytes(8)) == {"ids int32"}
    assert kinds(needles, np.array([900, 31, 7, 12000], np.int64).tobytes()) == {"ids int64"}
    assert not kinds(needles, np.array([900, 31, 7, 12001], np.int64).tobytes())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _aligned(data: bytes) -> bytes:
    """safetensors bytes without their header: their arrays where a loaded array would lie."""
    return data[8 + int.from_bytes(data[:8], "little") :]


# -- memory --------------------------------------------------------------------------------------

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
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONMALLOC": "malloc", "MALLOC_PERTURB_": "165",
             "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
    )  # fmt: skip

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
    monkeypatch.setattr(memory, "_PIECE", 4096)
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
    monkeypatch.setattr(memory, "_PIECE", 4096)
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


# -- scenarios -----------------------------------------------------------------------------------


class Refusal(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT


def test_a_call_that_ends_in_another_way_than_it_should_shows_nothing() -> None:
    """Answers that were refused were searched for, not found, and taken for forgotten."""

    def refused() -> Iterator[None]:
        raise Refusal
        yield

    answered = Generate.__new__(Generate)
    _ended(Running(lambda _: refused()), answered, "refused", "Generate refused")
    _ended(Running(lambda _: iter([None])), answered, "done", "Generate done")
    with pytest.raises(PerfitError, match="Generate done: the call ended with INVALID_ARGUMENT"):
        _ended(Running(lambda _: refused()), answered, "done", "Generate done")


# -- what rows mean ------------------------------------------------------------------------------

TENSOR, TEXT = {"tensor fp32": ("heap",)}, {"prompt text utf-8": ("heap",)}
SOUGHT = ("tensor fp16", "tensor fp32", "prompt text utf-8", "device key")


def row(hardening: str, moment: str, found: dict[str, tuple[str, ...]]) -> Row:
    return Row(hardening, "Generate", "done", moment, found, SOUGHT, 1, ())


CONTROL, CLEAN = row("off", "closed", TENSOR), row("on", "closed", {})
DURING = row("on", "during", TENSOR | TEXT)


@pytest.mark.parametrize(("rows", "kept"), [
    ([CONTROL, DURING, CLEAN], True),
    ([CONTROL, DURING, row("on", "after", TEXT), CLEAN], True),
    ([CONTROL, DURING, row("on", "during", TENSOR | {"example ids int64": ("heap",)}), CLEAN], True),
    ([CONTROL, DURING, CLEAN, row("on", "closed", TEXT)], False),
    ([CONTROL, DURING, CLEAN, row("on", "before", TEXT)], False),
    ([CONTROL, DURING, CLEAN, row("on", "during", TENSOR)], False),
    ([CONTROL, DURING, CLEAN, row("on", "during", TEXT)], False),
    ([row("off", "closed", {}), DURING, CLEAN], False),  # nothing says that it would have been found
    ([DURING, CLEAN], False),
    ([CONTROL, DURING], False),  # nobody looked at what the promise is about
    ([CONTROL, CLEAN], False),  # no look found any text
    ([CONTROL, row("off", "before", TEXT), CLEAN], False),
])  # fmt: skip
def test_the_promise_is_kept_only_where_every_control_finds(rows: list[Row], kept: bool) -> None:
    assert is_kept(rows) is kept


def test_it_is_said_which_needles_no_look_found() -> None:
    rows = [row("off", "before", TEXT), CONTROL, row("on", "after", {"tensor fp16": ("heap",)}), CLEAN]
    assert forms_seen(rows) == {
        "tensor": {"fp16": True, "fp32": True}, "prompt text": {"utf-8": False},
        "device key": {"as sent": False},
    }  # fmt: skip
    assert unseen(rows) == ["prompt text"]  # a device's key is not to be found by any
