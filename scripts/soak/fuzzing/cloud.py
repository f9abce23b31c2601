"""Targets in the cloud without a server: codec, certificates, artefact folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import strategies as st

from perfit_cloud.config import CloudConfig
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.codec import PromptReader, decode_sampling, decode_shift, decode_step, find_version
from perfit_cloud.service.identity.certificates import (
    CertificateAuthority,
    generation_of,
    identity_of,
    read_certificate,
    read_csr,
)
from perfit_cloud.service.limits import Limits
from perfit_device.cloud.identity import Identity
from perfit_shared.types import LARGEST_PENALTY
from perfit_shared.wire import personalization_pb2 as pb
from soak.fuzzing import counts
from soak.fuzzing.checking import Target, Unsound
from soak.fuzzing.hints import Known, hints_for
from soak.fuzzing.mutation import TEXT, edited, edited_json, messages, mostly, tensor_bytes
from tiny import Tiny

__all__ = ["targets"]

_FILES = ("artefact.json", "collective.safetensors", "seed.safetensors")


def targets(tiny: Tiny, work: Path) -> list[Target]:
    base = load_base(str(tiny.model))
    artefacts = [Artefact.load(folder) for folder in tiny.artefacts]
    catalog = Catalog.build(CloudConfig(model="tiny", new_tokens=16, examples=8), base, artefacts, "0" * 32)
    codec = _Codec(catalog)
    known = Known.of(artefacts[0].name, artefacts[0].version, artefacts[0].spec)
    hints = hints_for(known)
    csr = Identity.create().csr()
    return [
        Target("cloud: Generate and questions", 6, messages(pb.GenerateRequest, hints), codec.generate),
        Target(
            "cloud: examples and candidates", 5, messages(pb.ComputeGradientRequest, hints), codec.gradient
        ),
        Target("cloud: steps of an update", 4, messages(pb.AdaptStep, hints), codec.step),
        Target("cloud: certificate requests", 3, edited([csr, csr + b"\0"]), _csr),
        Target("cloud: certificates", 3, edited(_certificates(work)), _certificate),
        *counts.targets(catalog),
        Target("artefact folders", 3, _folders(tiny), _Folder(tiny, work / "artefact").check),
    ]


class _Codec:
    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._limits: Limits = catalog.limits
        self._base: BaseModel = catalog.base
        self._reader = PromptReader(catalog.base, catalog.limits)

    def generate(self, message: pb.GenerateRequest) -> None:
        self._shift(message.shift)
        prompt = self._reader.prompt(message.prompt)
        self._ids(prompt, self._limits.prompt_tokens)
        sampling = decode_sampling(message.sampling, prompt_tokens=len(prompt), limits=self._limits)
        sound = (
            1 <= sampling.max_new_tokens <= self._limits.new_tokens
            and len(prompt) + sampling.max_new_tokens <= self._limits.context
            and math.isfinite(sampling.temperature)
            and sampling.temperature >= 0
            and 0 < sampling.top_p <= 1
            and sampling.top_k >= 0
            and abs(sampling.frequency_penalty) <= LARGEST_PENALTY
            and abs(sampling.presence_penalty) <= LARGEST_PENALTY
            and all(sampling.stop)
        )
        if not sound:
            raise Unsound("sampling out of bounds")

    def gradient(self, message: pb.ComputeGradientRequest) -> None:
        self._shift(message.shift)
        for prompt, target in self._reader.examples(message.examples):
            self._ids(prompt, self._limits.prompt_tokens)
            self._ids(target, self._limits.new_tokens + 1)

    def step(self, message: pb.AdaptStep) -> None:
        artefact = next(iter(self._catalog.artefacts.values()))
        rows, tensors = decode_step(message, artefact.spec, 5)
        tensors.check(artefact.spec, artefact.spec.personal_rank)
        if not rows or len(set(rows)) != len(rows) or not all(0 <= row < 5 for row in rows):
            raise Unsound("rows that are no examples")

    def _shift(self, message: pb.Shift) -> None:
        use = decode_shift(message, self._catalog.artefacts)
        if use.personal is not None and use.artefact is not None:
            use.personal.check(use.artefact.spec, use.artefact.spec.personal_rank)
            find_version(message.artefact, message.version, self._catalog.artefacts)

    def _ids(self, ids: list[int], most: int) -> None:
        vocabulary = self._base.model.config.vocab_size
        if not 0 < len(ids) <= most or not all(0 <= i < vocabulary for i in ids):
            raise Unsound("tokens that the model has not, or too many")


def _csr(data: bytes) -> str:
    return read_csr(data).curve.name


def _certificates(work: Path) -> list[bytes]:
    import datetime

    work.mkdir(parents=True, exist_ok=True)
    authority = CertificateAuthority.open(work / "ca.pem", "fuzz CA")
    device = authority.issue_device(
        read_csr(Identity.create().csr()), "ab" * 16, datetime.timedelta(days=7), generation=2
    )
    server = authority.issue_server(
        read_csr(Identity.create().csr()), ["localhost", "127.0.0.1"], datetime.timedelta(days=90)
    )
    return [device.public_bytes(Encoding.DER), server.public_bytes(Encoding.DER), authority.der]


def _certificate(data: bytes) -> None:
    certificate: x509.Certificate = read_certificate(data)
    if not isinstance(identity_of(certificate), str) or generation_of(certificate) < 0:
        raise Unsound("an identity that is no text")


def _folders(tiny: Tiny) -> st.SearchStrategy[Mapping[str, bytes]]:
    """The files of an artefact of which one is bad."""
    data = {name: (tiny.artefacts[0] / name).read_bytes() for name in _FILES}
    card = edited_json([json.loads(data["artefact.json"])]).map(
        lambda text: {"artefact.json": text.encode("utf-8", "surrogatepass")}
    )
    tensors = tensor_bytes([data["collective.safetensors"], data["seed.safetensors"]])
    return mostly(
        card,
        st.builds(lambda name, bad: {name: bad}, st.sampled_from(_FILES[1:]), tensors),
        edited([data["artefact.json"]]).map(lambda bad: {"artefact.json": bad}),
        TEXT.map(lambda _: {}),
    )


class _Folder:
    def __init__(self, tiny: Tiny, folder: Path) -> None:
        shutil.copytree(tiny.artefacts[0], folder, dirs_exist_ok=True)
        self._folder = folder
        self._sound = {name: (folder / name).read_bytes() for name in _FILES}

    def check(self, bad: Mapping[str, bytes]) -> None:
        for name, data in {**self._sound, **bad}.items():
            (self._folder / name).write_bytes(data)
        artefact = Artefact.load(self._folder)
        artefact.collective.check(artefact.spec, artefact.spec.collective_rank)
        artefact.seed.check(artefact.spec, artefact.spec.personal_rank)
        numbers: tuple[Any, ...] = (artefact.epochs, artefact.batch_size)
        if any(type(n) is not int or not 0 < n < 2**32 for n in numbers):
            raise Unsound("an artefact whose defaults cannot travel")
        if not (math.isfinite(artefact.learning_rate) and artefact.learning_rate > 0):
            raise Unsound("an artefact whose learning rate is no rate")
        if not all(isinstance(text, str) for text in (artefact.name, artefact.fingerprint, artefact.version)):
            raise Unsound("an artefact whose names are no text")
