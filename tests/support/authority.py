"""An authority, and what a device sends it: keys, requests and renewals."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from perfit_cloud.service.identity.authority import Authority

DAY = 86400
Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def csr_of(key: Key | ed25519.Ed25519PrivateKey, *, name: str = "me", san: str | None = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(san)]), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.DER)


def open_authority(state: Path, *, life: int = DAY, lapse: int = 30 * DAY) -> Authority:
    return Authority(state, certificate_seconds=life, lapse_seconds=lapse)


def enrolled(authority: Authority, key: Key | None = None) -> x509.Certificate:
    secret, _ = authority.invite(60)
    return x509.load_der_x509_certificate(authority.enroll(secret, csr_of(key or new_key())))


def renewed(authority: Authority, old: x509.Certificate, key: Key | None = None) -> x509.Certificate:
    return x509.load_der_x509_certificate(authority.renew(old, csr_of(key or new_key())))


def renew_lapsed(authority: Authority, old: x509.Certificate, key: Key) -> x509.Certificate:
    csr, nonce = csr_of(new_key()), authority.challenge()
    signature = key.sign(b"perfit-renew-v1" + nonce + csr, ec.ECDSA(hashes.SHA256()))
    der = old.public_bytes(serialization.Encoding.DER)
    answer = authority.renew_lapsed(certificate=der, nonce=nonce, signature=signature, csr=csr)
    return x509.load_der_x509_certificate(answer)
