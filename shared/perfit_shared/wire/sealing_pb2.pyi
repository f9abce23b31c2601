from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SealedRequest(_message.Message):
    __slots__ = ("opening", "chunk")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    opening: SealedOpening
    chunk: bytes
    def __init__(self, opening: _Optional[_Union[SealedOpening, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SealedOpening(_message.Message):
    __slots__ = ("time_ms", "artefact", "encapsulated", "proof")
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    ARTEFACT_FIELD_NUMBER: _ClassVar[int]
    ENCAPSULATED_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    time_ms: int
    artefact: str
    encapsulated: bytes
    proof: bytes
    def __init__(self, time_ms: _Optional[int] = ..., artefact: _Optional[str] = ..., encapsulated: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class SealedProof(_message.Message):
    __slots__ = ("certificate", "fingerprint", "signature")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    fingerprint: bytes
    signature: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., fingerprint: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SealedResponse(_message.Message):
    __slots__ = ("random", "chunk")
    RANDOM_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    random: bytes
    chunk: bytes
    def __init__(self, random: _Optional[bytes] = ..., chunk: _Optional[bytes] = ...) -> None: ...
