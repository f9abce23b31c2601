"""How much a message may hold: every field has a bound, and the bytes are walked before they are parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from tests.support.adapt_calls import EXAMPLES, examples, opening
from tests.support.cloud import BASE, INVALID, TIMEOUT, Device, Running, failure, generate, personal
from tests.support.hostile import LIMITS, PATH, Honest

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.bounds import MessageBounds, fields_of, request_types
from perfit_shared.errors import Busy, InvalidInput, InvalidPrompt
from perfit_shared.wire import personalization_pb2 as pb
from soak.attacking.counts import repeated, wrapped

TENSORS = 4096
DEVICES, ENROLMENT = MessageBounds.of_devices(LIMITS, TENSORS), MessageBounds.of_enrolment()


def bounds_of(path: str) -> MessageBounds:
    return ENROLMENT if ".Enrollment/" in path or ".Servers/" in path else DEVICES


def checked(path: str, message: Any) -> list[int]:
    """What the walk charged for. Raises what it raises."""
    charged: list[int] = []
    data = message if isinstance(message, bytes) else message.SerializeToString()
    bounds_of(path).check(path, data, charged.append)
    return charged


# -- the table ------------------------------------------------------------------------------------


FIELDS = [
    (path, name, field) for path, kind in request_types().items() for name, field in fields_of(kind).items()
]


def name_of(value: object) -> str:
    """The part of a test's name, the same in every process."""
    return value if isinstance(value, str) else ""


def test_the_walk_over_the_protos_finds_what_there_is() -> None:
    names = {name for _, name, _ in FIELDS}
    assert {"ScoreRequest.candidates", "AdaptStep.rows", "ChatMessage.content", "RenewRequest.csr"} <= names
    assert len(names) > 40


@pytest.mark.parametrize(("path", "name", "field"), FIELDS, ids=name_of)
def test_every_field_that_can_be_large_has_a_bound(path: str, name: str, field: FieldDescriptor) -> None:
    """A field added to the protos is refused until somebody says how large it may be."""
    bound = bounds_of(path).fields[name]
    assert 0 < bound.size <= LIMITS.message_bytes
    assert (bound.times == 1) == (not field.is_repeated)
    assert bound.times <= max(LIMITS.adapt_examples, LIMITS.prompt_tokens)


def within(kind: Any, limits: Callable[[str], Any], name: str) -> bytes:
    """A message in which the field `name` is as large as it may be, at the first place it stands."""
    for field in kind.fields:
        own = f"{kind.name}.{field.name}"
        if own == name:
            made = GetMessageClass(kind)()
            bound = limits(own)
            value: Any = "x" * bound.size if field.type == FieldDescriptor.TYPE_STRING else bytes(bound.size)
            if field.type == FieldDescriptor.TYPE_UINT32:
                value = 1
            if field.message_type is not None:
                return repeated(field.number, bound.times)
            if field.is_repeated:
                getattr(made, field.name).extend([value] * bound.times)
            else:
                setattr(made, field.name, value)
            return made.SerializeToString()
    for field in kind.fields:
        if field.message_type is not None and name in fields_of(field.message_type):
            return wrapped(field.number, within(field.message_type, limits, name))
    raise AssertionError(name)


@pytest.mark.parametrize(("path", "name", "field"), FIELDS, ids=name_of)
def test_a_field_at_its_bound_passes_and_one_more_does_not(
    path: str, name: str, field: FieldDescriptor
) -> None:
    bounds, kind = bounds_of(path), request_types()[path]
    for extra in (0, 1):

        def limits(own: str, more: int = extra) -> Any:
            bound = bounds.fields[own]
            if own != name or not more:
                return bound
            if field.is_repeated or field.message_type is not None:
                return bound._replace(times=bound.times + 1)
            return bound._replace(size=bound.size + 1)

        data = within(kind, limits, name)
        if extra:
            with pytest.raises(InvalidInput):
                checked(path, data)
        else:
            checked(path, data)


# -- the walk -------------------------------------------------------------------------------------


def test_texts_are_charged_before_they_are_looked_at() -> None:
    prompt, short = pb.Prompt(text="the cat sat"), pb.Prompt(text="a")
    request = pb.ScoreRequest(
        candidates=[pb.Candidate(prompt=prompt, answer=" here"), pb.Candidate(prompt=short, answer="")],
        shift=BASE,
    )
    assert checked(PATH + "Score", request) == [prompt.ByteSize(), 5, short.ByteSize()]
    broken = wrapped(1, wrapped(1, b"\xff" * 30))  # a prompt that breaks off
    charged: list[int] = []
    with pytest.raises(InvalidInput):
        DEVICES.check(PATH + "Score", broken, charged.append)
    assert charged == [30]

    def poor(_: int) -> None:
        raise Busy("no more")

    with pytest.raises(Busy):
        DEVICES.check(PATH + "Score", request.SerializeToString(), poor)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 50,
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x0b" * 2000,
        b"\x0d\x00",
        b"\x08" + b"\x80" * 11,
        b"\x09abc",
    ],
)
def test_what_breaks_off_is_no_message(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        checked(PATH + "Score", data)


def test_fields_of_later_versions_pass_in_small_numbers() -> None:
    strange = b"\x9a\x06\x80\x01" + bytes(128)  # field 99, of 128 bytes
    checked(PATH + "Score", strange * 16)
    with pytest.raises(InvalidInput, match="does not know"):
        checked(PATH + "Score", strange * 17)


def test_they_are_counted_over_the_whole_message() -> None:
    """16 in each of 2,048 turns of each candidate were 400,000 in one message."""
    strange = b"\x9a\x06\x00"
    candidate = wrapped(1, strange * 6 + wrapped(1, strange * 2))
    checked(PATH + "Score", candidate * 2)
    with pytest.raises(InvalidInput, match="does not know"):
        checked(PATH + "Score", candidate * 2 + strange)


TEXT, CHAT = pb.Prompt(text="hi"), pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(content="hi")]))


@pytest.mark.parametrize(("first", "second"), [(CHAT, TEXT), (TEXT, CHAT), (TEXT, TEXT)])
def test_one_member_of_a_oneof_may_be_there(first: pb.Prompt, second: pb.Prompt) -> None:
    """The last is kept: a chat before a text was walked, and paid for as the text."""
    checked(PATH + "Generate", wrapped(1, first.SerializeToString()))
    with pytest.raises(InvalidInput, match=r"Prompt\.form is there more than the 1"):
        checked(PATH + "Generate", wrapped(1, first.SerializeToString() + second.SerializeToString()))


def test_the_bodies_of_a_stream_s_message_exclude_each_other() -> None:
    step = pb.AdaptRequest(step=pb.AdaptStep(rows=[1])).SerializeToString()
    more = pb.AdaptRequest(examples=pb.AdaptExamples()).SerializeToString()
    checked(PATH + "Adapt", more)
    with pytest.raises(InvalidInput, match=r"AdaptRequest\.body"):
        checked(PATH + "Adapt", step + more)


def test_the_walk_tells_how_many_fields_it_took() -> None:
    request = pb.ScoreRequest(candidates=[pb.Candidate(prompt=CHAT, answer="a")] * 3)
    data = request.SerializeToString()
    assert DEVICES.check(PATH + "Score", data, lambda _: None) == 3 * 6


def test_rows_are_counted_packed_and_not() -> None:
    one_by_one = b"".join(b"\x10" + bytes([row]) for row in range(64))
    for rows, fits in ((one_by_one, True), (one_by_one + b"\x10\x01", False), (wrapped(2, bytes(65)), False)):
        if fits:
            checked(PATH + "Adapt", wrapped(3, rows))
        else:
            with pytest.raises(InvalidInput, match="rows"):
                checked(PATH + "Adapt", wrapped(3, rows))


# -- over the wire --------------------------------------------------------------------------------


def bombs(artefact: Artefact, count: int) -> Iterator[tuple[str, list[bytes]]]:
    """(method, messages) that hold `count` of something."""
    shift, _ = personal(artefact)
    base = pb.ScoreRequest(shift=BASE).SerializeToString()
    head = generate().SerializeToString()
    update = [m.SerializeToString() for m in (opening(artefact), examples(EXAMPLES))]
    yield "Score", [repeated(1, count) + base]
    yield "ComputeGradient", [repeated(1, count) + pb.ComputeGradientRequest(shift=shift).SerializeToString()]
    yield "Generate", [wrapped(1, wrapped(2, repeated(1, count))) + base]
    yield "Generate", [head + wrapped(3, repeated(6, count))]
    yield (
        "Ask",
        [
            pb.AskRequest(shift=BASE).SerializeToString(),
            wrapped(2, wrapped(2, wrapped(2, repeated(1, count)))),
        ],
    )
    yield "Adapt", [update[0], wrapped(2, repeated(1, count))]
    yield "Adapt", [*update, wrapped(3, wrapped(2, bytes(count)))]
    for number in (1, 2, 3, 99):  # the same field again and again, and one that nobody knows
        yield "Describe", [repeated(number, count)]
        yield "Score", [repeated(number, count)]


def sent(device: Device, method: str, messages: list[bytes]) -> tuple[str, str]:
    call = device.channel.stream_stream(PATH + method)
    status, metadata, _ = failure(lambda: list(call(iter(messages), timeout=TIMEOUT)))
    return status, metadata.get("perfit-code", "")


def test_a_million_of_anything_is_refused_before_it_is_unpacked(
    run: Callable[..., Running], artefact: Artefact, honest: Callable[[Running], Honest]
) -> None:
    """One made lists of it: 3 GB and 7 s for an honest neighbour, or minutes of a handler."""
    running = run()
    good, device = honest(running), running.device()
    begin = psutil.Process().memory_info().rss
    for method, messages in bombs(artefact, 1_000_000):
        assert sent(device, method, messages)[0] in (INVALID, "RESOURCE_EXHAUSTED"), method
    for method, messages in bombs(artefact, 40_000):
        assert sent(device, method, messages) in (
            (INVALID, "invalid_input"),
            (INVALID, "invalid_prompt"),
            ("RESOURCE_EXHAUSTED", "busy"),
        ), method
    assert psutil.Process().memory_info().rss - begin < 100_000_000
    good.check()


LONG = "x" * 5_000
LONG_PROMPT, LONG_CHAT = (
    pb.Prompt(text=LONG),
    pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(content=LONG)])),
)
LONG_EXAMPLE = pb.Example(prompt=LONG_PROMPT)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Generate", pb.GenerateRequest(prompt=LONG_PROMPT)),
        ("Generate", pb.GenerateRequest(prompt=LONG_CHAT)),
        ("Score", pb.ScoreRequest(candidates=[pb.Candidate(answer=LONG)])),
        ("ComputeGradient", pb.ComputeGradientRequest(examples=[pb.Example(target=LONG)])),
        ("Adapt", pb.AdaptRequest(examples=pb.AdaptExamples(examples=[LONG_EXAMPLE]))),
    ],
)
def test_texts_that_are_too_long_are_invalid_prompts(method: str, message: Any) -> None:
    """By that word a device leaves such an example out; as any other refusal it ended every update."""
    with pytest.raises(InvalidPrompt, match="shorten it"):
        checked(f"/perfit.v1.Personalization/{method}", message)
