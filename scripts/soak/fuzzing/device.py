"""Targets on the device without a vault: what clouds, files and operators hand it."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import strategies as st

from perfit_cloud.service.identity.certificates import CertificateAuthority, read_csr
from perfit_device import shift_files
from perfit_device.cloud.channels import MESSAGE_BYTES, address_of, readable, translate
from perfit_device.cloud.codec import (
    Artefact,
    chunk_from_wire,
    cloud_info_from_wire,
    part_from_wire,
    scores_from_wire,
    tensors_from_wire,
)
from perfit_device.cloud.enrolment import wants_renewal
from perfit_device.cloud.identity import Enrolment, Identity, certificate_life, identity_in, life_left, pem
from perfit_device.history import HistoryItem
from perfit_device.history.importers import read_history
from perfit_shared.errors import PerfitError
from perfit_shared.invites import Invite
from perfit_shared.shifts import gradient_from_bytes
from perfit_shared.tasks import TASKS
from perfit_shared.wire import personalization_pb2 as pb
from soak.fuzzing.checking import Target, Unsound
from soak.fuzzing.mutation import TEXT, edited, edited_json, messages, tensor_bytes
from soak.fuzzing.shared import SPEC, TENSORS

__all__ = ["targets"]

_TASK = TASKS["news_headline"]
_ARTEFACT = Artefact("news_headline", "v1", SPEC, _TASK, 5e-3, 1, 4)
_EXAMPLES = [{"text": f"words {i}", "title": "a title", "date": "2024-05-01", "part": ""} for i in range(3)]
_LAMP = [
    {
        "user_id": "7",
        "profile": [{"id": "p0", "text": "words", "title": "a title", "date": "2024-05-01"}],
        "query": [
            {"id": "q0", "input": "Generate a headline for the following article: words", "gold": "gold"}
        ],
    }
]


def targets(work: Path) -> list[Target]:
    work.mkdir(parents=True, exist_ok=True)
    history, exported = _History(work), _Exported(work)
    enrolment = _enrolment(work)
    values = json.loads(enrolment.to_bytes())
    described = {
        "task_json": st.just(_TASK.to_json()) | edited_json([json.loads(_TASK.to_json())]),
        "name": st.just("news_headline"),
        "positions": st.just("l7"),
        "layers": st.integers(0, 30),
        "hidden_size": st.just(64),
    }
    shifts = [TENSORS[0].to_bytes(metadata={"artefact": "news_headline", "version": "v1"})]
    return [
        Target("device: what a cloud serves", 6, messages(pb.DescribeResponse, described), _described),
        Target("device: parts of answers", 3, messages(pb.AskResponse, {}), _part),
        Target("device: scores", 2, messages(pb.ScoreResponse, {}), _scores),
        Target("device: gradients of a cloud", 3, tensor_bytes([TENSORS[1].to_bytes()]), _gradient),
        Target("device: errors of a cloud", 3, _errors(), lambda e: _error(e, enrolment)),
        Target("device: enrolments", 4, edited_json([values]).map(_utf8), _enrolled),
        Target("device: keys", 2, edited([enrolment.identity.to_der()]), _key),
        Target(
            "device: certificates",
            4,
            edited([enrolment.certificate, enrolment.server_ca]),
            lambda data: _certificate(data, enrolment.identity),
        ),
        Target("device: addresses", 2, TEXT | st.from_regex(r"[a-z.\[\]:0-9]{1,20}:[0-9]{0,6}"), _address),
        Target("history files", 8, _files(), history.check),
        Target("shift files", 4, tensor_bytes(shifts), exported.check),
    ]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# -- from the cloud --------------------------------------------------------------------------------


def _described(message: pb.DescribeResponse) -> None:
    info = cloud_info_from_wire(message)
    for artefact in info.artefacts:
        if not (math.isfinite(artefact.learning_rate) and artefact.epochs > 0 and artefact.batch_size > 0):
            raise Unsound("defaults that no update can take")
        artefact.task.example(dict.fromkeys(artefact.task.field_names, "words"))
    if info.limits.examples < 1 or info.limits.new_tokens < 1:
        raise Unsound("limits that let nothing through")


def _part(message: pb.AskResponse) -> str:
    _, part = part_from_wire(message)
    if isinstance(part, PerfitError):
        _check_readable(str(part))
        return f"a question's {type(part).__name__}"
    if chunk_from_wire(message.part) != part:
        raise Unsound("a part of an answer that is none")
    return "a piece"


def _scores(message: pb.ScoreResponse) -> None:
    if not all(math.isfinite(s.log_likelihood) for s in scores_from_wire(message, 2)):
        raise Unsound("a score that is no number")


def _gradient(data: bytes) -> None:
    gradient = tensors_from_wire(gradient_from_bytes, data, _ARTEFACT, "a gradient")
    if not math.isfinite(gradient.norm()) and gradient.norm() < MESSAGE_BYTES:
        raise Unsound("a gradient that is no number")


class _Refusal(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A call that a cloud ended in its own way."""

    def __init__(self, status: grpc.StatusCode, details: str, trailing: list[tuple[str, str]]) -> None:
        self._status, self._details, self._trailing = status, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing

    def initial_metadata(self) -> Any: ...
    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None: ...
    def cancel(self) -> None: ...
    def add_callback(self, callback: Any) -> None: ...


def _errors() -> st.SearchStrategy[_Refusal]:
    # Without a code of ours UNAVAILABLE makes the device look again, over the network: not for here.
    statuses = [status for status in grpc.StatusCode if status is not grpc.StatusCode.UNAVAILABLE]
    words = st.sampled_from(["busy", "invalid_input", "internal", "vault_damaged", ""]) | TEXT
    keys = st.sampled_from(["perfit-code", "perfit-retry-ms", "perfit-retry-ms", "x"])
    metadata = st.lists(
        st.tuples(keys, words | st.sampled_from(["500", "9" * 400, "-1", "²", "٣"])), max_size=4
    )
    return st.builds(_Refusal, st.sampled_from(statuses), TEXT, metadata)


def _error(error: _Refusal, enrolment: Enrolment) -> str:
    made = translate(error, enrolment.address, enrolment.roots)
    _check_readable(str(made))
    if not 0 <= made.retry_ms < 10**9:
        raise Unsound("a delay without end")
    return type(made).__name__


def _check_readable(text: str) -> None:
    if not text or len(text) > 700 or not all(c.isprintable() for c in text):
        raise Unsound("a message that can steer a terminal")
    readable(text)


# -- keys and certificates ---------------------------------------------------------------------------


def _enrolment(work: Path) -> Enrolment:
    import datetime

    identity = Identity.create()
    authority = CertificateAuthority.open(work / "device-ca.pem", "fuzz CA")
    certificate = authority.issue_device(
        read_csr(identity.csr()), "ab" * 16, datetime.timedelta(days=7), generation=2
    )
    return Enrolment(
        identity,
        certificate.public_bytes(Encoding.DER),
        authority.der,
        "127.0.0.1:7443",
        "127.0.0.1:7444",
        "0" * 32,
    )


def _enrolled(data: bytes) -> None:
    enrolment = Enrolment.from_bytes(data)
    if Enrolment.from_bytes(enrolment.to_bytes()).certificate != enrolment.certificate:
        raise Unsound("an enrolment that does not encode to itself")
    address_of(enrolment.address)
    _certificate(enrolment.certificate, enrolment.identity)
    wants_renewal(enrolment)


def _key(data: bytes) -> None:
    identity = Identity.from_der(data)
    if Identity.from_der(identity.to_der()).to_pem() != identity.to_pem():
        raise Unsound("a key that does not encode to itself")
    identity.csr()


def _certificate(data: bytes, identity: Identity) -> None:
    certificate_life(data)
    pem(data)
    if not isinstance(identity_in(data), str) or not isinstance(life_left(data), float):
        raise Unsound("a certificate without a name or a life")
    identity.matches(data)


def _address(text: str) -> None:
    host, port = address_of(text)
    if not host or not 0 < port < 65536:
        raise Unsound("an address that cannot be dialled")
    Invite(text, b"x", 2**63 - 1, bytes(32)).check_expiry()


# -- files ---------------------------------------------------------------------------------------------


def _files() -> st.SearchStrategy[tuple[str, bytes]]:
    """(suffix, content) of JSON lines, CSV, and files of LaMP."""
    lines = "\n".join(json.dumps(example) for example in _EXAMPLES).encode()
    table = b'text,title,date,part\nwords,a title,2024-05-01,test\n"w,\n2",t,,\n'
    one = edited_json(_EXAMPLES).map(lambda text: _utf8(f"{text}\n{json.dumps(_EXAMPLES[0])}\n"))
    csv = edited([table, table.replace(b",", b"\t")])
    return st.one_of(
        st.tuples(st.just(".jsonl"), one | edited([lines])),
        st.tuples(st.sampled_from([".csv", ".tsv"]), csv),
        st.tuples(st.just(".json"), edited_json([_LAMP, _EXAMPLES]).map(_utf8)),
    )


class _History:
    def __init__(self, work: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=work))

    def check(self, file: tuple[str, bytes]) -> None:
        path = self._folder / f"history{file[0]}"
        path.write_bytes(file[1])
        for item in read_history(path, _TASK):
            if set(item.fields) != {"text", "title"} or not all(item.fields.values()):
                raise Unsound("an example without its fields")
            json.dumps([item.name, item.date, item.part, dict(item.fields)], ensure_ascii=False).encode()
            if not isinstance(item, HistoryItem) or item.part not in ("", "test"):
                raise Unsound("an example of no part")


class _Exported:
    def __init__(self, work: Path) -> None:
        self._path = Path(tempfile.mkdtemp(dir=work)) / "shift.safetensors"

    def check(self, data: bytes) -> None:
        self._path.write_bytes(data)
        read = shift_files.read(shift_files.read_bytes(self._path), "a file", _ARTEFACT)
        read.check(SPEC, SPEC.personal_rank)
