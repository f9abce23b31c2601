"""What the scanner looks for, and that it finds every run of it in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.models import random_shift

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
from perfit_cloud.audit.search import Index
from perfit_shared.shifts import ShiftSpec, ShiftTensors, gradient_to_bytes

SPEC = ShiftSpec((1, 2), "f3+l3", 6, 3, hidden_size=32)
RNG = np.random.default_rng(11)
SECRET = RNG.standard_normal(300).astype(np.float32).tobytes()
WORD = "qzvxkjwy"


def kinds(needles: list[Needle], data: bytes) -> set[str]:
    """What is found of the needles in bytes that lie at a multiple of 8."""
    index = Index(needles)
    return {needles[number].kind for number in index.search(np.frombuffer(data, np.uint8))}


@pytest.mark.parametrize(
    "needle",
    [raw("wire", SECRET), *text("text", [WORD]), *token_ids("ids", [[901, 17, 4000, 33]])],
    ids=lambda needle: needle.kind,
)
def test_the_shortest_run_is_found_at_every_offset(needle: Needle) -> None:
    index = Index([needle])
    secret = needle.parts[0][: needle.run] if needle.kind == "wire" else needle.parts[0]
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
    parts = Needle("two", (SECRET[:12], SECRET[12:24], SECRET[24:60]))
    assert not kinds([parts], SECRET[:24] + bytes(64))
    assert kinds([parts], bytes(8) + SECRET[24:60] + bytes(64))


def test_runs_across_the_bounds_of_what_is_searched_are_found() -> None:
    data = np.frombuffer(bytes(256) + SECRET[:24] + bytes(256), np.uint8)
    index = Index([raw("wire", SECRET)])
    assert index.search(data, 0, 264)
    assert index.search(data, 264, 512)


def test_runs_across_the_chunks_of_a_search_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perfit_cloud.audit.search._CHUNK", 64)
    for needle in (raw("wire", SECRET[:16]), *text("t", [WORD]), *token_ids("i", [[9, 8, 70000, 5]])):
        for offset in range(0, 200, needle.item):
            data = bytes(offset) + needle.parts[0] + bytes(200)
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
        found = Index([needle]).search_unaligned(bytes(offset) + needle.parts[0][:16] + bytes(16))
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
