"""How much a message may hold, checked on its bytes before it is parsed.

An empty message in a repeated field takes two bytes on the wire and some fifty when it is parsed, and gzip
makes a thousand of them one byte. So the bytes are walked first, by the descriptors of the protos: the walk
ends at the first field that is over its bound, and takes as many steps as the bounds allow at most. One
table says what they are; a test fails for a field of a request that is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_health.v1 import health_pb2

from perfit_cloud.service.limits import Limits
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.wire import enrollment_pb2, personalization_pb2

__all__ = [
    "CHARACTERS_A_TOKEN",
    "STOP_BYTES",
    "STOP_TEXTS",
    "Bound",
    "MessageBounds",
    "fields_of",
    "request_types",
]

CHARACTERS_A_TOKEN = 16  # a text with more than this for each token allowed is not even tokenized
STOP_TEXTS = 8
STOP_BYTES = 64  # of UTF-8
_UTF8_BYTES = 4  # of one character, at most
_NAME_BYTES = 256  # of an artefact, a version, a role, a service
_DER_BYTES = 16 * 1024  # of a certificate or a request for one, which take 1 KB
_FRAMING = 64  # bytes around a text: tags, lengths, roles
_OVERHEAD = 16 * 1024  # bytes of a message beside texts and tensors
_EXAMPLES_BYTES = 2 * 2**20  # of a message of an update's examples; devices send them by 1 MiB
_UNKNOWN = 16  # fields that a later version may have, in a whole message
_HIGH = bytes(range(128, 256))  # bytes that do not end a varint

Charge = Callable[[int], None]  # called with the bytes of every text before it is parsed


class Bound(NamedTuple):
    """Of one field."""

    size: int = 0  # bytes of each of its values, where they have a length
    times: int = 1  # values
    is_text: bool = False  # whether it is paid for


class MessageBounds:
    """The bounds of all requests of one listener."""

    def __init__(self, fields: Mapping[str, Bound], sizes: Mapping[str, int]) -> None:
        """`fields`: by "Message.field". `sizes`: bytes of one message of each method, by its name."""
        self.fields, self._sizes = fields, sizes
        known: dict[str, _Kind] = {}
        self._kinds = {path: _kind(type_, fields, known) for path, type_ in request_types().items()}

    @classmethod
    def of_devices(cls, limits: Limits, tensor_bytes: int) -> MessageBounds:
        """`tensor_bytes`: of the largest personal shift there is."""
        prompt = limits.prompt_tokens * CHARACTERS_A_TOKEN * _UTF8_BYTES
        target = limits.new_tokens * CHARACTERS_A_TOKEN * _UTF8_BYTES
        turns = limits.prompt_tokens  # each takes a token at least
        whole = Bound(prompt + turns * _FRAMING + target + _OVERHEAD)  # a prompt with what is around it
        name, shift = Bound(_NAME_BYTES), Bound(tensor_bytes + _OVERHEAD)
        fields = {
            **_RENEWAL,
            "FetchSeedRequest.artefact": name,
            "Shift.artefact": name,
            "Shift.version": name,
            "Shift.personal": Bound(tensor_bytes),
            "Prompt.text": Bound(prompt),
            "Prompt.chat": Bound(prompt + turns * _FRAMING),
            "Chat.messages": Bound(prompt + _FRAMING, turns),
            "ChatMessage.role": name,
            "ChatMessage.content": Bound(prompt),
            "Sampling.stop": Bound(STOP_BYTES, STOP_TEXTS),
            **{f"{of}.prompt": whole._replace(is_text=of != "Question") for of in _WITH_PROMPTS},
            **{f"{of}.shift": shift for of in _WITH_SHIFTS},
            **{f"{of}.sampling": Bound(_OVERHEAD) for of in ("GenerateRequest", "Question")},
            "AskRequest.question": whole._replace(is_text=True),  # so that one without a prompt is paid for
            "ScoreRequest.candidates": whole._replace(times=limits.examples),
            "Candidate.answer": Bound(target, is_text=True),
            "ComputeGradientRequest.examples": whole._replace(times=limits.examples),
            "Example.target": Bound(target, is_text=True),
            "AdaptRequest.open": Bound(_OVERHEAD),
            "AdaptRequest.examples": Bound(limits.message_bytes),
            "AdaptRequest.step": Bound(tensor_bytes + 10 * limits.adapt_examples + _OVERHEAD),
            "AdaptOpen.artefact": name,
            "AdaptOpen.version": name,
            "AdaptExamples.examples": whole._replace(times=limits.adapt_examples),
            "AdaptStep.personal": Bound(tensor_bytes),
            "AdaptStep.rows": Bound(10 * limits.adapt_examples, limits.adapt_examples),
        }
        one, many = shift.size + whole.size, _several(limits, shift.size)
        sizes = {
            "Generate": one,
            "Ask": one,
            "Score": many,
            "ComputeGradient": many,
            "Adapt": limits.message_bytes,
            "Renew": _OVERHEAD + _DER_BYTES,
        }
        return cls(fields, {name: min(size, limits.message_bytes) for name, size in sizes.items()})

    @classmethod
    def of_enrolment(cls) -> MessageBounds:
        sizes = {"Enroll": 2 * _DER_BYTES, "RenewLapsed": 3 * _DER_BYTES, "RenewServer": 3 * _DER_BYTES}
        sizes["CertifySealingKey"] = 3 * _DER_BYTES
        return cls(_RENEWAL, sizes)

    @staticmethod
    def largest(limits: Limits, tensor_bytes: int) -> int:
        """Bytes of the largest message that any method needs."""
        tensors = tensor_bytes + _OVERHEAD
        one = (limits.prompt_tokens + limits.new_tokens) * CHARACTERS_A_TOKEN * _UTF8_BYTES
        return max(tensors + one + _OVERHEAD, _several(limits, tensors), _EXAMPLES_BYTES)

    def check(self, path: str, data: bytes, charge: Charge) -> int:
        """The number of fields in a message, which is what the walk took.

        Raises InvalidInput on a message that is over a bound or that is none, and what `charge` raises.
        `charge` is called for every text before anything in it is parsed.
        """
        most = self._sizes.get(path.rpartition("/")[2], _OVERHEAD)
        if len(data) > most:
            raise InvalidInput(f"the message has {len(data)} bytes, and this call takes at most {most}")
        kind = self._kinds.get(path)
        if kind is None:  # a method that is not ours has no field that anybody reads
            raise InvalidInput("the cloud cannot read this message; update perfit")
        walk = _Walk(data, charge)
        try:
            walk.over(0, len(data), kind)
        except IndexError:
            raise InvalidInput("the cloud cannot read this message; update perfit") from None
        return walk.fields


def request_types() -> dict[str, Descriptor]:
    """What each method of each service takes, by its path."""
    files = (enrollment_pb2.DESCRIPTOR, personalization_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
    return {
        f"/{service.full_name}/{method.name}": method.input_type
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


def fields_of(kind: Descriptor) -> dict[str, FieldDescriptor]:
    """All fields of a message and of what it holds that can be large, by "Message.field"."""
    found: dict[str, FieldDescriptor] = {}
    waiting = [kind]
    while waiting:
        of = waiting.pop()
        for field in of.fields:
            name = f"{of.name}.{field.name}"
            if name in found or not (field.is_repeated or field.type in _WITH_LENGTH):
                continue
            found[name] = field
            if field.message_type is not None:
                waiting.append(field.message_type)
    return found


_WITH_LENGTH = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
_WITH_PROMPTS = ("GenerateRequest", "Question", "Candidate", "Example")
_WITH_SHIFTS = ("GenerateRequest", "AskRequest", "ScoreRequest", "ComputeGradientRequest")
# Fields that hold what a person wrote, and what to call it.
_TEXTS = {
    **{f"{of}.prompt": "a prompt" for of in _WITH_PROMPTS},
    **dict.fromkeys(("Prompt.text", "Prompt.chat", "Chat.messages", "ChatMessage.content"), "a prompt"),
    **dict.fromkeys(("Candidate.answer", "Example.target"), "an answer"),
}
# What both listeners take.
_RENEWAL = {
    "EnrollRequest.secret": Bound(_NAME_BYTES),
    "EnrollRequest.csr": Bound(_DER_BYTES),
    "RenewLapsedRequest.certificate": Bound(_DER_BYTES),
    "RenewLapsedRequest.nonce": Bound(_NAME_BYTES),
    "RenewLapsedRequest.signature": Bound(_NAME_BYTES),
    "RenewLapsedRequest.csr": Bound(_DER_BYTES),
    **{f"RenewServerRequest.{field}": Bound(_DER_BYTES) for field in ("certificate", "csr")},
    **{f"RenewServerRequest.{field}": Bound(_NAME_BYTES) for field in ("nonce", "signature")},
    **{f"CertifySealingKeyRequest.{field}": Bound(_DER_BYTES) for field in ("certificate", "mlkem")},
    **{
        f"CertifySealingKeyRequest.{field}": Bound(_NAME_BYTES)
        for field in ("nonce", "signature", "x25519", "key_id")
    },
    "RenewRequest.csr": Bound(_DER_BYTES),
    "HealthCheckRequest.service": Bound(_NAME_BYTES),
}


def _several(limits: Limits, tensors: int) -> int:
    """Bytes of a Score or ComputeGradient."""
    return tensors + limits.call_tokens * CHARACTERS_A_TOKEN + limits.examples * _FRAMING + _OVERHEAD


# -- the walk ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    name: str  # "Chat.messages"
    bound: Bound
    kind: _Kind | None  # of a message
    is_packed: bool  # whether its values are packed numbers
    group: str  # the oneof it is counted with; a parser holds only the last member


@dataclass(frozen=True)
class _Kind:
    name: str
    fields: dict[int, _Field]  # by number; those without a bound are single numbers


# A later version may have fields that this one has not; the message's own size bounds theirs.
_UNKNOWN_FIELD = _Field("", Bound(2**31, _UNKNOWN), None, is_packed=False, group="")
_VARINT, _LENGTH, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types


def _kind(of: Descriptor, bounds: Mapping[str, Bound], known: dict[str, _Kind]) -> _Kind:
    if of.full_name in known:
        return known[of.full_name]
    made = known[of.full_name] = _Kind(of.name, {})
    for field in of.fields:
        name = f"{of.name}.{field.name}"
        inner = None if field.message_type is None else _kind(field.message_type, bounds, known)
        is_packed = field.is_repeated and field.type not in _WITH_LENGTH
        group = name if field.containing_oneof is None else f"{of.name}.{field.containing_oneof.name}"
        made.fields[field.number] = _Field(name, bounds.get(name, Bound()), inner, is_packed, group)
    return made


class _Walk:
    """Over the fields of one message and of all that it holds."""

    def __init__(self, data: bytes, charge: Charge) -> None:
        self._data, self._charge = data, charge
        self._unknown = {"": 0}  # unknown fields, in the whole message
        self.fields = 0  # so far

    def over(self, at: int, end: int, kind: _Kind) -> None:
        """All of `data[at:end]`, of this kind. Raises InvalidInput, IndexError where it breaks off."""
        data, own = self._data, dict[str, int]()
        while at < end:
            self.fields += 1
            tag, at = _varint(data, at)
            field = kind.fields.get(tag >> 3, _UNKNOWN_FIELD)
            bound = field.bound
            first, at = _value(data, at, tag & 7)
            if at > end:
                raise IndexError
            size = at - first
            if size > bound.size:
                raise _too_large(field.name or kind.name, size, bound.size)
            several = max(1, len(data[first:at].translate(None, _HIGH))) if field.is_packed else 1
            times = self._unknown if field is _UNKNOWN_FIELD else own
            times[field.group] = times.get(field.group, 0) + several
            if times[field.group] > bound.times:
                what = field.group or f"a field of {kind.name} that this cloud does not know"
                raise InvalidInput(f"{what} is there more than the {bound.times} times it may be")
            if bound.is_text:
                self._charge(size)
            if field.kind is not None:
                self.over(first, at, field.kind)


def _too_large(name: str, size: int, most: int) -> InvalidInput:
    """InvalidPrompt for what a person wrote: a device leaves such an example out."""
    if name in _TEXTS:
        return InvalidPrompt(
            f"{_TEXTS[name]} of {size} bytes is longer than the {most} that this cloud takes; shorten it"
        )
    return InvalidInput(f"{name} has {size} bytes and may have {most}")


def _value(data: bytes, at: int, wire: int) -> tuple[int, int]:
    """Where the value of a field begins and ends; one without a length is at its end. Raises IndexError."""
    if wire == _LENGTH:
        size, at = _varint(data, at)
        return at, at + size
    if wire == _VARINT:
        _, at = _varint(data, at)
    elif wire in _FIXED:
        at += _FIXED[wire]
    else:  # groups, which no version has
        raise IndexError
    return at, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(a number, where it ends). Raises IndexError."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while shift < 70:
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
        shift += 7
    raise IndexError
