"""X.509 for perfit: two certificate authorities, server certificates, device certificates.

Everything is P-256 with SHA-256: gRPC's handshake refuses Ed25519. One CA signs servers, another
devices, and every leaf has exactly one extended key usage, so that neither can pose as the other (a
device certificate with a host name and no key usage was accepted as a server in a trial).
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import secrets
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from perfit_cloud.service.identity.authority_keys import FILE_KEYS, AuthorityKeys
from perfit_shared.errors import CertificateExpired, ConfigError, InvalidInput, NotAuthenticated
from perfit_shared.files import write_whole
from perfit_shared.sealing.keys import MLKEM_HALF, SEALING_USAGE, PublicSealingKey

__all__ = [
    "CertificateAuthority",
    "check_lapse",
    "check_proof",
    "fresh_identity",
    "generation_of",
    "identity_of",
    "key_hash",
    "read_certificate",
    "read_csr",
    "read_pair",
    "server_of",
]

_CA_LIFE = datetime.timedelta(days=3650)
_CLOCK_SKEW = datetime.timedelta(minutes=5)  # a new certificate is valid on clocks that are this much behind
_CSR_CAP = 8192  # bytes; a P-256 request needs 250
_IDENTITY_BYTES = 16


@dataclass(frozen=True)
class CertificateAuthority:
    """A root key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def open(
        cls, path: Path, common_name: str, *, trusts_group: bool = False, keys: AuthorityKeys = FILE_KEYS
    ) -> CertificateAuthority:
        """Load the authority in `path`, or make one there (its key, or where that is, and its certificate).

        `trusts_group`: the file's group may read it. Raises ConfigError when the file is damaged or
        readable by others; the file is never replaced.
        """
        if not path.exists():
            with suppress(FileExistsError):  # another process was faster
                write_whole(path, _new_authority(common_name, keys), mode=0o600, replaces=False)
        return cls.load(path, trusts_group=trusts_group, keys=keys)

    @classmethod
    def load(
        cls, path: Path, *, trusts_group: bool = False, keys: AuthorityKeys = FILE_KEYS
    ) -> CertificateAuthority:
        """As `open`, where the file must be there. Raises OSError, ConfigError."""
        return cls(*read_pair(path, trusts_group=trusts_group, keys=keys))

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue_server(
        self,
        key: ec.EllipticCurvePublicKey,
        names: Iterable[str],
        life: datetime.timedelta,
        *,
        identity: str = "",
    ) -> x509.Certificate:
        """A certificate for servers that are dialled by any of `names` (host names and IPs).

        `identity`: of a server that renews it itself (`server_of`).
        """
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys(names)])
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, "perfit cloud")]
        if identity:
            attributes.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, identity))
        subject = x509.Name(attributes)
        builder = self._leaf(subject, key, ExtendedKeyUsageOID.SERVER_AUTH, life)
        return builder.add_extension(alternatives, critical=False).sign(self.key, hashes.SHA256())

    def issue_device(
        self,
        key: ec.EllipticCurvePublicKey,
        identity: str,
        life: datetime.timedelta,
        *,
        generation: int,
        issued: int | None = None,
    ) -> x509.Certificate:
        """A client certificate whose only content is a random identity, and its generation (1, 2, …).

        `issued`: unix seconds from which its life counts, else now.
        """
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, identity),
                x509.NameAttribute(NameOID.DN_QUALIFIER, str(generation)),
            ]
        )
        builder = self._leaf(subject, key, ExtendedKeyUsageOID.CLIENT_AUTH, life, issued)
        return builder.sign(self.key, hashes.SHA256())

    def issue_sealing(self, key: PublicSealingKey, key_id: str, life: datetime.timedelta) -> x509.Certificate:
        """A certificate for a key that calls are sealed to. It can sign nothing, and is no TLS server's."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, key_id)])
        half = x509.UnrecognizedExtension(MLKEM_HALF, key.mlkem.public_bytes_raw())
        builder = self._leaf(subject, key.x25519, SEALING_USAGE, life)
        return builder.add_extension(half, critical=True).sign(self.key, hashes.SHA256())

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether this authority signed it, whatever its dates and revocation."""
        return self.signed(self.certificate, certificate)

    @staticmethod
    def signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
        """Whether that authority signed it."""
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            return False
        return True

    def _leaf(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey | X25519PublicKey,
        usage: x509.ObjectIdentifier,
        life: datetime.timedelta,
        issued: int | None = None,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.fromtimestamp(time.time() if issued is None else issued, datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_leaf_usage(key), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )


def read_csr(data: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a PKCS#10 request in DER. Subject and extensions are ignored.

    Raises InvalidInput unless it is a P-256 key and the request is signed by it.
    """
    if len(data) > _CSR_CAP:
        raise InvalidInput("the certificate request is too large")
    try:
        request = x509.load_der_x509_csr(data)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise InvalidInput("not a certificate request in DER") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("a device's key should be P-256")
    if not signed:
        raise InvalidInput("the certificate request is not signed by its own key")
    return key


def read_certificate(data: bytes, *, pem: bool = False) -> x509.Certificate:
    """Raises NotAuthenticated on anything that is no certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(data) if pem else x509.load_der_x509_certificate(data)
        _ = certificate.subject  # the library parses it only when asked
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise NotAuthenticated("not a certificate; enrol with `perfit enroll`") from error
    return certificate


def identity_of(certificate: x509.Certificate) -> str:
    """The identity in a device's certificate. Raises NotAuthenticated when it has none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise NotAuthenticated("this certificate names no device; enrol with `perfit enroll`")
    return names[0].value


def server_of(certificate: x509.Certificate) -> tuple[str, list[str]]:
    """(identity, names) in the certificate of a server that renews it itself.

    Raises NotAuthenticated when it is none.
    """
    serials = certificate.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        names = None
    if len(serials) != 1 or not isinstance(serials[0].value, str) or names is None:
        raise NotAuthenticated("this is no certificate of a server; make one with `perfit-cloud server`")
    return serials[0].value, [str(name.value) for name in names]


def generation_of(certificate: x509.Certificate) -> int:
    """Which certificate of its identity it is: 1, 2, …; 0 for those from before there were numbers.

    Raises NotAuthenticated when it is no number.
    """
    numbers = certificate.subject.get_attributes_for_oid(NameOID.DN_QUALIFIER)
    if not numbers:
        return 0
    number = numbers[0].value
    if len(numbers) != 1 or not isinstance(number, str) or not number.isdecimal() or len(number) > 18:
        raise NotAuthenticated("this certificate's number cannot be read; enrol with `perfit enroll`")
    return int(number)


def check_proof(certificate: x509.Certificate, signed: bytes, signature: bytes) -> None:
    """That the key of a certificate that we issued signed these bytes. Raises NotAuthenticated."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NotAuthenticated("this certificate's key is of a kind that is not ours")
    try:
        key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise NotAuthenticated("the request is not signed by the key of its certificate") from None


def check_lapse(certificate: x509.Certificate, lapse_seconds: int) -> None:
    """That it did not lapse too long ago to be renewed. Raises CertificateExpired."""
    if time.time() > certificate.not_valid_after_utc.timestamp() + lapse_seconds:
        days = lapse_seconds // 86400
        raise CertificateExpired(
            f"the certificate lapsed more than {days} days ago; ask the operator for an invite"
        )


def key_hash(key: ec.EllipticCurvePublicKey) -> bytes:
    """SHA-256 of a public key."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def fresh_identity() -> str:
    """A new random identity, 32 hex digits."""
    return secrets.token_hex(_IDENTITY_BYTES)


def read_pair(
    path: Path, *, trusts_group: bool = False, keys: AuthorityKeys = FILE_KEYS
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The key and its certificate that one file holds in PEM.

    `trusts_group`: the file's group may read it. Raises OSError, and ConfigError when the file is damaged or
    readable by others.
    """
    if stat.S_IMODE(path.stat().st_mode) & (0o007 if trusts_group else 0o077):
        raise ConfigError(f"{path} holds a private key and others may read it; run chmod 600 {path}")
    data = path.read_bytes()
    try:
        key = keys.load(data)
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged; restore it from a backup") from error
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{path} is damaged: its key and certificate differ; restore a backup")
    return key, certificate


def _leaf_usage(key: object) -> x509.KeyUsage:
    """X25519 signs nothing."""
    is_agreed = isinstance(key, X25519PublicKey)
    return _key_usage(digital_signature=not is_agreed, key_agreement=is_agreed)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, key_agreement: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=key_agreement,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError(f'"{name[:60]}" is no host name; write it in ASCII (xn--…)') from error


def _new_authority(common_name: str, keys: AuthorityKeys) -> bytes:
    key, kept = keys.create()
    # A random part gives every cloud's root a name of its own, so no chain leads to a wrong one.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{common_name} {secrets.token_hex(4)}")])
    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CA_LIFE)  # valid even if the clock was ahead
        .not_valid_after(now + _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return kept + certificate.public_bytes(serialization.Encoding.PEM)
