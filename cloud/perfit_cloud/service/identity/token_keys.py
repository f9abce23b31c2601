"""Keys of authorities in a PKCS#11 token (an HSM, or SoftHSM): made there, and never to leave it.

`ca_token` names it as RFC 7512 does:

    pkcs11:token=perfit?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=/run/secrets/pin
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

import pkcs11
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11.util import ec as encoding

from perfit_shared.errors import Busy, ConfigError

__all__ = ["TokenKeys"]

_REFERENCE = b"perfit-token-key: "
_RETRY_MS = 1000
_T = TypeVar("_T")


class TokenKeys:
    """One session, for one thread at a time, opened anew after an error."""

    def __init__(self, uri: str) -> None:
        """Opens nothing yet. Raises ConfigError."""
        path, _, query = uri.partition("?")
        named = dict(part.split("=", 1) for part in path.removeprefix("pkcs11:").split(";") if "=" in part)
        options = dict(part.split("=", 1) for part in query.split("&") if "=" in part)
        if not path.startswith("pkcs11:") or "token" not in named or "module-path" not in options:
            raise ConfigError("ca_token should read pkcs11:token=NAME?module-path=FILE&pin-source=FILE")
        self._token, self._module = unquote(named["token"]), unquote(options["module-path"])
        self._pin_source = unquote(options.get("pin-source", "")).removeprefix("file:")
        self._lock = threading.Lock()
        self._session: Any = None

    def create(self) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        label = f"perfit-{secrets.token_hex(8)}"

        def make(session: Any) -> None:
            parameters = session.create_domain_parameters(
                pkcs11.KeyType.EC,
                {pkcs11.Attribute.EC_PARAMS: encoding.encode_named_curve_parameters("secp256r1")},
                local=True,
            )
            parameters.generate_keypair(label=label, store=True)

        self._do(make)
        reference = _REFERENCE + label.encode() + b"\n"
        return self.load(reference), reference

    def load(self, data: bytes) -> ec.EllipticCurvePrivateKey:
        label = _label(data)
        public = self._do(lambda session: self._found(session, label, pkcs11.ObjectClass.PUBLIC_KEY))
        key = serialization.load_der_public_key(encoding.encode_ec_public_key(public))
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ConfigError(f"the token's key {label} is not P-256")
        return _TokenKey(self, label, key)

    def delete(self, data: bytes) -> None:
        label = _label(data)

        def destroy(session: Any) -> None:
            for found in list(session.get_objects({pkcs11.Attribute.LABEL: label})):
                found.destroy()

        self._do(destroy)

    def sign(self, label: str, digest: bytes) -> bytes:
        """ECDSA over a digest, in DER. Raises ConfigError, Busy."""

        def raw(session: Any) -> bytes:
            key = self._found(session, label, pkcs11.ObjectClass.PRIVATE_KEY)
            return bytes(key.sign(digest, mechanism=pkcs11.Mechanism.ECDSA))

        return bytes(encoding.encode_ecdsa_signature(self._do(raw)))

    def _found(self, session: Any, label: str, kind: Any) -> Any:
        objects = {pkcs11.Attribute.LABEL: label, pkcs11.Attribute.CLASS: kind}
        for found in session.get_objects(objects):
            return found
        raise ConfigError(f"the token {self._token} holds no key {label}")

    def _do(self, act: Callable[[Any], _T]) -> _T:
        with self._lock:
            try:
                if self._session is None:
                    self._session = self._opened()
                return act(self._session)
            except pkcs11.PKCS11Error as error:
                self._session = None
                raise Busy("the authorities' token does not answer; try again", retry_ms=_RETRY_MS) from error

    def _opened(self) -> Any:
        try:
            token = pkcs11.lib(self._module).get_token(token_label=self._token)
            pin = Path(self._pin_source).read_text("utf-8").strip() if self._pin_source else None
            try:
                return token.open(rw=True, user_pin=pin)
            except pkcs11.UserAlreadyLoggedIn:  # logins hold for all sessions of a process
                return token.open(rw=True)
        except (OSError, RuntimeError, pkcs11.NoSuchToken, pkcs11.PinIncorrect) as error:
            raise ConfigError(f"cannot open the token {self._token}: {type(error).__name__}") from error


def _label(data: bytes) -> str:
    """Raises ValueError where the file names no key of a token."""
    found = re.match(_REFERENCE + rb"(perfit-[0-9a-f]{16})\n", data)
    if found is None:
        raise ValueError("names no key of a token")
    return found[1].decode()


def _never() -> UnsupportedAlgorithm:
    return UnsupportedAlgorithm("a token's key signs, and never leaves it")


class _TokenKey(ec.EllipticCurvePrivateKey):
    """Signs, and does nothing else."""

    def __init__(self, keys: TokenKeys, label: str, public: ec.EllipticCurvePublicKey) -> None:
        self._keys, self._label, self._public = keys, label, public

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        if not isinstance(signature_algorithm, ec.ECDSA) or not isinstance(
            signature_algorithm.algorithm, hashes.SHA256
        ):
            raise UnsupportedAlgorithm("a token's key signs by ECDSA with SHA-256")
        return self._keys.sign(self._label, hashlib.sha256(data).digest())

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> NoReturn:
        raise _never()

    def private_numbers(self) -> NoReturn:
        raise _never()

    def private_bytes(self, *_: object) -> NoReturn:
        raise _never()

    def __copy__(self) -> _TokenKey:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> _TokenKey:
        return self
