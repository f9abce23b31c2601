from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class EnrollRequest(_message.Message):
    __slots__ = ("secret", "csr")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    secret: bytes
    csr: bytes
    def __init__(self, secret: _Optional[bytes] = ..., csr: _Optional[bytes] = ...) -> None: ...

class Credentials(_message.Message):
    __slots__ = ("certificate", "server_ca", "address", "cloud_id", "other_server_ca")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_CA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CLOUD_ID_FIELD_NUMBER: _ClassVar[int]
    OTHER_SERVER_CA_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    server_ca: bytes
    address: str
    cloud_id: str
    other_server_ca: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., server_ca: _Optional[bytes] = ..., address: _Optional[str] = ..., cloud_id: _Optional[str] = ..., other_server_ca: _Optional[bytes] = ...) -> None: ...

class ChallengeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChallengeResponse(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class RenewLapsedRequest(_message.Message):
    __slots__ = ("certificate", "nonce", "signature", "csr", "not_here")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    NOT_HERE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    nonce: bytes
    signature: bytes
    csr: bytes
    not_here: bool
    def __init__(self, certificate: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., csr: _Optional[bytes] = ..., not_here: _Optional[bool] = ...) -> None: ...

class RenewServerRequest(_message.Message):
    __slots__ = ("certificate", "nonce", "signature", "csr")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    nonce: bytes
    signature: bytes
    csr: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., csr: _Optional[bytes] = ...) -> None: ...

class ServerCredentials(_message.Message):
    __slots__ = ("certificate", "server_ca", "device_ca")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_CA_FIELD_NUMBER: _ClassVar[int]
    DEVICE_CA_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    server_ca: _containers.RepeatedScalarFieldContainer[bytes]
    device_ca: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, certificate: _Optional[bytes] = ..., server_ca: _Optional[_Iterable[bytes]] = ..., device_ca: _Optional[_Iterable[bytes]] = ...) -> None: ...

class CertifySealingKeyRequest(_message.Message):
    __slots__ = ("certificate", "nonce", "signature", "x25519", "mlkem", "life_seconds", "key_id")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    X25519_FIELD_NUMBER: _ClassVar[int]
    MLKEM_FIELD_NUMBER: _ClassVar[int]
    LIFE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    nonce: bytes
    signature: bytes
    x25519: bytes
    mlkem: bytes
    life_seconds: int
    key_id: str
    def __init__(self, certificate: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., x25519: _Optional[bytes] = ..., mlkem: _Optional[bytes] = ..., life_seconds: _Optional[int] = ..., key_id: _Optional[str] = ...) -> None: ...

class CertifySealingKeyResponse(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
