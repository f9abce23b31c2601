"""The codec: what a device sends becomes what it meant, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from tests.support.hostile import LIMITS, hostile_tensors
from tests.support.models import random_shift

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.interface import Gradient
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service import codec
from perfit_cloud.service.catalog import Catalog
from perfit_shared.errors import (
    ConfigError,
    InvalidInput,
    InvalidPrompt,
    InvalidTensors,
    NotFound,
    PerfitError,
    ShiftMismatch,
)
from perfit_shared.shifts import ShiftSpec, ShiftTensors, gradient_from_bytes, wire_dtype
from perfit_shared.tasks import Task
from perfit_shared.types import Chunk, Finish, Mode, Sampling, Score
from perfit_shared.wire import personalization_pb2 as pb


@pytest.fixture
def base(load: Callable[[str], BaseModel]) -> BaseModel:
    return load("llama")


@pytest.fixture
def artefact(base: BaseModel, make_artefact: Callable[..., Artefact]) -> Artefact:
    return make_artefact(base)


@pytest.fixture
def reader(base: BaseModel) -> codec.PromptReader:
    return codec.PromptReader(base, LIMITS)


# -- shifts --------------------------------------------------------------------------------------


def test_specs_are_written_whole() -> None:
    spec = ShiftSpec((3, 5), "f7+l7", 8, 4, 64)
    message = codec.encode_spec(spec)
    fields = {of.name: value for of, value in message.ListFields()}
    assert fields == asdict(spec) | {"layers": [3, 5]}


def shift_message(artefact: Artefact, /, **change: Any) -> pb.Shift:
    spec = artefact.spec
    fields: dict[str, Any] = {
        "mode": pb.SHIFT_MODE_PERSONAL,
        "artefact": artefact.name,
        "version": artefact.version,
        "personal": random_shift(spec, spec.personal_rank, 1).to_bytes(),
    }
    return pb.Shift(**{**fields, **change})


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_personal_shift_arrives(artefact: Artefact, dtype: str) -> None:
    """What a form itself costs is tests/shared/test_shifts.py's."""
    spec = artefact.spec
    data = random_shift(spec, spec.personal_rank, 1).to_bytes(dtype=dtype)
    message = shift_message(artefact, personal=data)
    use = codec.decode_shift(pb.Shift.FromString(message.SerializeToString()), {artefact.name: artefact})
    assert use.mode is Mode.PERSONAL
    assert use.artefact is artefact
    assert use.personal is not None
    assert use.personal.digest() == ShiftTensors.from_bytes(data, spec, spec.personal_rank).digest()


def test_base_and_collective(artefact: Artefact) -> None:
    there = {artefact.name: artefact}
    base = codec.decode_shift(pb.Shift(mode=pb.SHIFT_MODE_BASE), there)
    assert (base.mode, base.artefact, base.personal) == (Mode.BASE, None, None)
    for version in (artefact.version, ""):
        message = shift_message(artefact, mode=pb.SHIFT_MODE_COLLECTIVE, personal=b"", version=version)
        use = codec.decode_shift(message, there)
        assert (use.mode, use.artefact, use.personal) == (Mode.COLLECTIVE, artefact, None)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"mode": pb.SHIFT_MODE_UNSPECIFIED}, InvalidInput, "mode"),
        ({"mode": 17}, InvalidInput, "mode"),
        ({"mode": pb.SHIFT_MODE_BASE}, InvalidInput, "base mode takes no"),
        ({"mode": pb.SHIFT_MODE_COLLECTIVE}, InvalidInput, "collective mode takes no tensors"),
        ({"personal": b""}, InvalidTensors, "needs the tensors"),
        ({"artefact": "nothing"}, NotFound, "news_headline"),
        ({"artefact": ""}, NotFound, "news_headline"),
        ({"version": "0" * 16}, ShiftMismatch, "perfit update"),
        ({"version": ""}, ShiftMismatch, "perfit update"),
        ({"mode": pb.SHIFT_MODE_COLLECTIVE, "personal": b"", "version": "x"}, ShiftMismatch, "update"),
        ({"personal": b"noise" * 9}, InvalidTensors, "safetensors"),
        ({"personal": b"\xff" * 8}, InvalidTensors, "safetensors"),
        ({"personal": b"\0" * 5_000_000}, InvalidTensors, "more bytes"),
    ],
)
def test_shifts_that_are_refused(
    artefact: Artefact, change: dict[str, Any], error: type[PerfitError], says: str
) -> None:
    with pytest.raises(error, match=says):
        codec.decode_shift(shift_message(artefact, **change), {artefact.name: artefact})


@pytest.mark.parametrize(
    "kind",
    [
        "nan",
        "infinite",
        "huge",
        "not orthonormal",
        "shape",
        "transposed",
        "name",
        "another layer",
        "float64",
        "integers",
        "missing",
    ],
)
def test_tensors_that_are_refused(artefact: Artefact, kind: str) -> None:
    message = shift_message(artefact, personal=hostile_tensors(artefact.spec)[kind])
    with pytest.raises(InvalidTensors):
        codec.decode_shift(message, {artefact.name: artefact})


def test_no_artefacts_at_all() -> None:
    with pytest.raises(NotFound, match="it serves none"):
        codec.find_artefact("x" * 500, {})


# -- prompts -------------------------------------------------------------------------------------


def text(words: str) -> pb.Prompt:
    return pb.Prompt(text=words)


def chat(*turns: tuple[str, str]) -> pb.Prompt:
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns]))


def test_prompts_are_what_the_model_reads(base: BaseModel, reader: codec.PromptReader) -> None:
    assert reader.prompt(text("the cat")) == base.encode("the cat")
    assert reader.prompt(chat(("user", "the cat"))) == base.encode_chat([("user", "the cat")])


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        (pb.Prompt(), InvalidPrompt, "empty"),
        (text(""), InvalidPrompt, "empty"),
        (text("  \n"), InvalidPrompt, "empty"),
        (chat(), InvalidPrompt, "chat needs messages"),
        (chat(("user", "")), InvalidPrompt, "none of them empty"),
        (chat(("root", "hi")), InvalidInput, "system, user, assistant"),
        (text("xyzq" * 30), InvalidPrompt, r"has \d+ tokens and this cloud takes at most 40"),
        (text("x" * 641), InvalidPrompt, "641 characters"),
        (chat(("user", "x" * 400), ("user", "x" * 400)), InvalidPrompt, "800 characters"),
    ],
)
def test_prompts_that_are_refused(
    reader: codec.PromptReader, prompt: pb.Prompt, error: type[PerfitError], says: str
) -> None:
    with pytest.raises(error, match=says):
        reader.prompt(prompt)


def test_huge_prompt_is_refused_without_being_tokenized(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(base), "encode", lambda *_: pytest.fail("it was tokenized"))
    with pytest.raises(InvalidPrompt):
        codec.PromptReader(base, LIMITS).prompt(text("x" * 10_000_000))


def test_chat_that_the_template_refuses(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2 import TemplateError

    def refuse(*_: object) -> list[int]:
        raise TemplateError("secret words")

    monkeypatch.setattr(type(base), "encode_chat", refuse)
    with pytest.raises(InvalidPrompt, match="should alternate") as caught:
        codec.PromptReader(base, LIMITS).prompt(chat(("user", "secret words")))
    assert "secret" not in str(caught.value)


# -- examples ------------------------------------------------------------------------------------


def test_examples_are_read_in_order(base: BaseModel, reader: codec.PromptReader) -> None:
    pairs = [(text("the cat"), " sat"), (text("the dog"), " ran")]
    wanted = [(base.encode(p.text), base.encode_target(target)) for p, target in pairs]
    assert reader.examples([pb.Example(prompt=p, target=target) for p, target in pairs]) == wanted
    assert reader.candidates([pb.Candidate(prompt=p, answer=target) for p, target in pairs]) == wanted
    assert reader.update(pb.Example(prompt=p, target=target) for p, target in pairs) == wanted


@pytest.mark.parametrize(
    ("pairs", "error", "says"),
    [
        ([], InvalidInput, "no examples"),
        ([("the cat", " sat")] * 4, InvalidInput, "holds 4 examples and this cloud takes at most 3"),
        ([("the cat", " sat"), ("", " sat")], InvalidPrompt, "example 2: the prompt is empty"),
        ([("the cat", " ")], InvalidPrompt, "example 1: the answer is empty"),
        ([("the cat", "xyzq" * 9)], InvalidPrompt, "example 1: the answer is longer than the 20"),
        ([("the cat", "x" * 9999)], InvalidPrompt, "longer than the 20"),
        ([("xyzqj " * 6, "xyzqj" * 3)], InvalidPrompt, "the model takes at most 50"),
        ([("xyzqj " * 5, "xyzqj" * 2)] * 3, InvalidInput, "more than 100 tokens together"),
    ],
)
def test_examples_that_are_refused(
    reader: codec.PromptReader, pairs: list[tuple[str, str]], error: type[PerfitError], says: str
) -> None:
    with pytest.raises(error, match=says):
        reader.examples([pb.Example(prompt=text(prompt), target=target) for prompt, target in pairs])


# -- sampling ------------------------------------------------------------------------------------


def sampling(**change: Any) -> Sampling:
    message = pb.Sampling(**{"max_new_tokens": 5, **change})
    return codec.decode_sampling(message, prompt_tokens=40, limits=LIMITS)


def test_sampling_is_what_was_asked() -> None:
    assert sampling() == Sampling(5, 0.0, 0, 1.0, 0, ())
    asked = sampling(
        temperature=0.5, top_k=10, top_p=0.25, seed=2**64 - 1, stop=["\n", "é" * 32], logprobs=20
    )
    assert asked == Sampling(5, 0.5, 10, 0.25, 2**64 - 1, ("\n", "é" * 32), 20)
    assert sampling(frequency_penalty=-2, presence_penalty=2) == replace(
        sampling(), frequency_penalty=-2.0, presence_penalty=2.0
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": 0}, "1 to 20"),
        ({"max_new_tokens": 21}, "1 to 20"),
        ({"max_new_tokens": 11}, "exceeds the 50"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 10.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        *(
            ({key: value}, "penalties should be -2 to 2")
            for key in ("frequency_penalty", "presence_penalty")
            for value in (2.1, -2.1, math.nan, math.inf, -math.inf)
        ),
        ({"top_k": 2**31}, "top_k"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["é" * 33]}, "stop"),
    ],
)
def test_sampling_that_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        sampling(**change)


# -- answers -------------------------------------------------------------------------------------


def test_pieces_and_scores() -> None:
    message = codec.encode_chunk(Chunk("ab"))
    assert (message.text, message.finish) == ("ab", pb.FINISH_REASON_UNSPECIFIED)
    message = codec.encode_chunk(Chunk("", Finish.LENGTH, 7, 9))
    assert (message.finish, message.prompt_tokens, message.answer_tokens) == (pb.FINISH_REASON_LENGTH, 7, 9)
    assert codec.encode_chunk(Chunk("", Finish.END)).finish == pb.FINISH_REASON_END
    scores = codec.encode_scores([Score(-1.5, 3), Score(-2.5, 4)]).scores
    assert [(s.log_likelihood, s.tokens) for s in scores] == [(-1.5, 3), (-2.5, 4)]


def test_gradients_go_out_whole_or_not_at_all(artefact: Artefact) -> None:
    spec = artefact.spec
    tensors = random_shift(spec, spec.personal_rank, 3)
    whole = tensors.to_bytes()
    message = codec.encode_gradient(Gradient(1.25, 7, tensors), whole)
    got = gradient_from_bytes(message.gradient, spec, spec.personal_rank)
    assert (message.loss, message.tokens, got.digest()) == (1.25, 7, tensors.digest())
    for dtype in ("float16", "int8"):  # of the tensors that came
        rounded = codec.encode_gradient(Gradient(1.25, 7, tensors), tensors.to_bytes(dtype=dtype))
        assert wire_dtype(rounded.gradient) == "float16"
    with pytest.raises(InvalidTensors):
        codec.encode_gradient(Gradient(math.nan, 7, tensors), whole)
    layer = spec.layers[0]
    spoilt = tensors.layers[layer]._replace(bias=np.full(spec.personal_rank, np.inf, np.float32))
    with pytest.raises(InvalidTensors):
        codec.encode_gradient(Gradient(1.0, 7, ShiftTensors({**tensors.layers, layer: spoilt})), whole)


def test_description_and_seed(base: BaseModel, artefact: Artefact) -> None:
    message = codec.encode_description(
        Catalog(base, {artefact.name: artefact}, LIMITS, "c0"), continuous=False, caches_activations=True
    )
    assert (message.continuous, message.keeps) == (False, True)
    assert (message.base_model, message.fingerprint, message.cloud_id) == (base.name, base.fingerprint, "c0")
    (told,) = message.artefacts
    assert (told.name, told.version) == (artefact.name, artefact.version)
    assert told.spec == codec.encode_spec(artefact.spec)
    assert Task.from_json(told.task_json) == artefact.task
    assert (round(told.learning_rate, 6), told.epochs, told.batch_size) == (5e-3, 2, 4)
    assert (message.limits.prompt_tokens, message.limits.examples) == (40, 3)
    seed = codec.encode_seed(artefact)
    spec = artefact.spec
    assert ShiftTensors.from_bytes(seed.seed, spec, spec.personal_rank).digest() == artefact.seed.digest()
    assert seed.version == artefact.version


# -- what fits together --------------------------------------------------------------------------


def test_served_refuses_what_does_not_fit(base: BaseModel, artefact: Artefact) -> None:
    config = CloudConfig()
    catalog = Catalog.build(config, base, [artefact], "c0")
    assert catalog.artefacts == {artefact.name: artefact}
    assert catalog.limits.context == base.context
    assert catalog.limits.prompt_tokens == base.context - 1  # never more than the model allows
    with pytest.raises(ConfigError, match="two artefacts"):
        Catalog.build(config, base, [artefact, artefact], "c0")
    with pytest.raises(ShiftMismatch, match="trained on another model"):
        Catalog.build(config, base, [replace(artefact, fingerprint="0" * 64)], "c0")
    with pytest.raises(ShiftMismatch, match="layers or hidden size"):
        Catalog.build(config, base, [replace(artefact, spec=replace(artefact.spec, layers=(99,)))], "c0")
    with pytest.raises(ConfigError, match="message_bytes"):
        Catalog.build(replace(config, message_bytes=1000), base, [artefact], "c0")
