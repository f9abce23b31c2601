"""The vault's cryptography: how the data key is wrapped, and how a row is sealed.

    key-encryption key ── Argon2id(passphrase, salt), or random in the OS keyring
        └ wraps the data key (random, once a vault), bound to the header's public fields
            └ wraps a row key (random, once a version of a row) ── seals the row

A change of passphrase rewraps one key. A forgotten row's key goes with its row, so even a copy of
the sealed bytes that survived somewhere stays shut.

AES-256-GCM everywhere: its nonce must never repeat under one key. Wrapping uses a random nonce of
96 bits, good for 2³² wraps; sealing uses a fixed one, safe there since a row key seals once.

Keys lie in bytearrays, which are overwritten after use, and OpenSSL clears its own copies. What Python
keeps as `str` or `bytes` cannot be: the passphrase, what the system's random source gave before it was
copied, a key in the OS keyring, the two keys that name and list rows, and what rows held.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import unicodedata
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from perfit_shared.errors import ConfigError, VaultDamaged, VaultError, WrongPassphrase

__all__ = [
    "COSTLIEST",
    "FORMAT",
    "OLDEST_FORMAT",
    "DataKey",
    "Header",
    "KdfParams",
    "forget_keyring_key",
    "new_key",
    "wipe",
    "wiped",
]

FORMAT, OLDEST_FORMAT = 2, 1  # what new vaults are of, and what can still be opened
_KEY_BYTES, _NONCE_BYTES, _TAG_BYTES, _SALT_BYTES = 32, 12, 16, 16
_WRAPPED_BYTES = _NONCE_BYTES + _KEY_BYTES + _TAG_BYTES
_VAULT_ID = re.compile(r"[0-9a-f]{32}")
_SEAL_NONCE = bytes(_NONCE_BYTES)
_KEYRING_SERVICE = "perfit"


@dataclass(frozen=True)
class KdfParams:
    """Argon2id's cost: RFC 9106's second recommended option, as Bitwarden and others use it.

    Raises VaultDamaged on values that no honest vault has: they are read before anything is
    authenticated, and must not make a device allocate gigabytes.
    """

    memory_kib: int = 64 * 1024
    iterations: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        bounds = ((self.memory_kib, 32, 1 << 20), (self.iterations, 1, 32), (self.lanes, 1, 16))
        for value, low, high in bounds:
            if type(value) is not int or not low <= value <= high:
                raise VaultDamaged("the vault's header asks for an impossible key derivation")
        if self.memory_kib < 8 * self.lanes:
            raise VaultDamaged("the vault's header asks for an impossible key derivation")

    def check(self, most: KdfParams) -> None:
        """Raises VaultError when this costs more than `most`, before any of that cost is paid."""
        if any(value > limit for value, limit in zip(astuple(self), astuple(most), strict=True)):
            raise VaultError(
                f"opening this vault takes {self.memory_kib >> 10} MiB, {self.iterations} passes and "
                f"{self.lanes} lanes of Argon2id, more than perfit's own; if it is yours, "
                "PERFIT_COSTLY_VAULT=1 opens it"
            )

    def derive(self, passphrase: str, salt: bytes) -> bytearray:
        """A key."""
        key = bytearray(_KEY_BYTES)
        Argon2id(
            salt=salt,
            length=len(key),
            iterations=self.iterations,
            lanes=self.lanes,
            memory_cost=self.memory_kib,
        ).derive_into(passphrase.encode(), key)
        return key


COSTLIEST = KdfParams(memory_kib=1 << 20, iterations=32, lanes=16)  # of a header that can be read at all


def passphrase_forms(passphrase: str) -> list[str]:
    """The form that vaults are locked by, then those that earlier versions may have taken.

    Files and variables end in line breaks that nobody typed, and keyboards compose accents in two ways.
    """
    plain = passphrase.rstrip("\r\n")
    forms = [unicodedata.normalize("NFC", plain), passphrase, unicodedata.normalize("NFD", plain)]
    return list(dict.fromkeys(forms))


@dataclass(frozen=True)
class Header:
    """What a vault says before it is open. All but the wrapped key is bound to it as associated data."""

    vault_id: str  # 32 hex digits, random
    lock: str  # "passphrase" or "keyring"
    salt: bytes  # 16 bytes
    kdf: KdfParams
    wrapped: bytes = bytes(_WRAPPED_BYTES)  # nonce + sealed data key
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Raises VaultDamaged: whoever can write the file can make its digest fit, too."""
        if (
            not _VAULT_ID.fullmatch(self.vault_id)
            or self.lock not in ("passphrase", "keyring")
            or len(self.salt) != _SALT_BYTES
            or len(self.wrapped) != _WRAPPED_BYTES
        ):
            raise VaultDamaged("the vault's header cannot be read; restore a copy of the file")

    @classmethod
    def create(cls, data_key: bytes | bytearray, passphrase: str | None, kdf: KdfParams) -> Header:
        """Wrap a data key by `passphrase`, or by a new key in the OS keyring when it is None."""
        lock = "keyring" if passphrase is None else "passphrase"
        header = cls(secrets.token_hex(16), lock, secrets.token_bytes(_SALT_BYTES), kdf)
        return header._wrap(data_key, passphrase, new=True)

    def rewrap(self, data_key: bytes | bytearray, passphrase: str) -> Header:
        """The same vault under another passphrase."""
        header = replace(self, lock="passphrase", salt=secrets.token_bytes(_SALT_BYTES))
        return header._wrap(data_key, passphrase, new=True)

    def in_todays_format(self, data_key: bytes | bytearray, passphrase: str | None) -> Header:
        """The same vault under the same passphrase or key of the keyring. The format is bound to the wrap."""
        return replace(self, format=FORMAT)._wrap(data_key, passphrase, new=False)

    def unwrap(self, passphrase: str | None) -> bytearray:
        """The data key. Raises WrongPassphrase, or VaultError when the keyring has no key."""
        nonce, sealed, key = self.wrapped[:_NONCE_BYTES], self.wrapped[_NONCE_BYTES:], bytearray(_KEY_BYTES)
        for form in [None] if passphrase is None else passphrase_forms(passphrase):
            try:
                with wiped(self._key(form, new=False)) as wrapping:
                    AESGCM(wrapping).decrypt_into(nonce, sealed, self._bound(), key)
                return key
            except InvalidTag:
                continue
        if self.lock == "keyring":
            raise VaultError("the key in the OS keyring is not this vault's")
        raise WrongPassphrase("wrong passphrase; nothing was changed")

    def _wrap(self, data_key: bytes | bytearray, passphrase: str | None, *, new: bool) -> Header:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        if passphrase is not None:
            passphrase = passphrase_forms(passphrase)[0]
            if not passphrase:
                raise ConfigError("an empty passphrase protects nothing; choose another")
        with wiped(self._key(passphrase, new=new)) as wrapping:
            return replace(self, wrapped=nonce + AESGCM(wrapping).encrypt(nonce, data_key, self._bound()))

    def _key(self, passphrase: str | None, *, new: bool) -> bytearray:
        if self.lock == "keyring":
            return _keyring_key(self.vault_id, new=new)
        if passphrase is None:
            raise WrongPassphrase("this vault needs its passphrase")
        return self.kdf.derive(passphrase, self.salt)

    def _public(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "vault_id": self.vault_id,
            "lock": self.lock,
            "salt": _b64(self.salt),
            "kdf": "argon2id",
            "memory_kib": self.kdf.memory_kib,
            "iterations": self.kdf.iterations,
            "lanes": self.kdf.lanes,
        }

    def _bound(self) -> bytes:
        return json.dumps(self._public(), sort_keys=True).encode()

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """sha-256 + JSON. The digest tells damage from a wrong passphrase; it keeps out no one
        who changes both, and then the wrapped key does not open."""
        body = json.dumps({**self._public(), "wrapped": _b64(self.wrapped)}, sort_keys=True).encode()
        return hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes, most: KdfParams = COSTLIEST) -> Header:
        """Raises VaultDamaged, or VaultError on a format of another version.

        VaultError too where the key derivation costs more than `most`: whoever can write the file
        could keep its owner waiting for a minute, and take a gigabyte.
        """
        digest, body = data[:32], data[32:]
        if not hmac.compare_digest(hashlib.sha256(body).digest(), digest):
            raise VaultDamaged("the vault's header was changed or lost; restore a copy of the file")
        try:
            values = json.loads(body)
            number = values["format"]
            if (
                type(number) is not int
                or not OLDEST_FORMAT <= number <= FORMAT
                or values["kdf"] != "argon2id"
            ):
                raise VaultError(
                    f"the vault is of format {int(number)}, and this perfit knows only {OLDEST_FORMAT} to "
                    f"{FORMAT}; use the version of perfit that wrote it, or a newer one"
                )
            header = cls(
                vault_id=values["vault_id"],
                lock=values["lock"],
                salt=base64.b64decode(values["salt"]),
                kdf=KdfParams(values["memory_kib"], values["iterations"], values["lanes"]),
                wrapped=base64.b64decode(values["wrapped"]),
                format=number,
            )
            header.kdf.check(most)
            return header
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise VaultDamaged("the vault's header cannot be read; restore a copy of the file") from error


@contextlib.contextmanager
def wiped(key: bytearray) -> Iterator[bytearray]:
    """The key for the length of a with block, and zeros in its place afterwards."""
    try:
        yield key
    finally:
        wipe(key)


def wipe(data: bytearray) -> None:
    """Zeros in its place."""
    data[:] = bytes(len(data))


class DataKey:
    """An open vault's key: seals rows, names them, and authenticates the list of all rows.

    `key` is taken over, and overwritten by `wipe`: nothing can be sealed or opened after it.
    """

    def __init__(self, key: bytearray, vault_id: str) -> None:
        self._key = key
        self._vault_id = vault_id
        self._wrapping = AESGCM(key)
        self._naming = hmac.digest(key, b"perfit vault row names", "sha256")
        self._listing = hmac.digest(key, b"perfit vault row list", "sha256")

    def wipe(self) -> None:
        with wiped(self._key):
            del self._wrapping

    def copy(self) -> bytearray:
        return bytearray(self._key)

    def rewrap(self, header: Header, passphrase: str) -> Header:
        """The header with this key under another passphrase."""
        return header.rewrap(self._key, passphrase)

    def in_todays_format(self, header: Header, passphrase: str | None) -> Header:
        return header.in_todays_format(self._key, passphrase)

    def row_id(self, kind: str, name: str) -> bytes:
        """16 bytes that tell nothing of the name without the key."""
        return hmac.digest(self._naming, f"{kind}\0{name}".encode(), "sha256")[:16]

    def seal(self, kind: str, row_id: bytes, version: int, plain: bytes) -> tuple[bytes, bytes]:
        """(wrapped row key, sealed row) under a new row key."""
        bound = self._bound(kind, row_id, version)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with wiped(new_key()) as row_key:
            wrapped = nonce + self._wrapping.encrypt(nonce, row_key, bound)
            return wrapped, AESGCM(row_key).encrypt(_SEAL_NONCE, plain, bound)

    def unseal(self, kind: str, row_id: bytes, version: int, wrapped: bytes, sealed: bytes) -> bytes:
        """Raises VaultDamaged unless these very bytes were sealed for this row."""
        bound = self._bound(kind, row_id, version)
        try:
            with wiped(bytearray(_KEY_BYTES)) as row_key:
                self._wrapping.decrypt_into(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], bound, row_key)
                return AESGCM(row_key).decrypt(_SEAL_NONCE, sealed, bound)
        except (InvalidTag, ValueError) as error:
            raise VaultDamaged("a row of the vault was changed; restore a copy of the file") from error

    def list_mac(self, rows: bytes) -> bytes:
        """32 bytes over the encoded list of all rows, so that none can vanish or come back unseen."""
        return hmac.digest(self._listing, rows, "sha256")

    def _bound(self, kind: str, row_id: bytes, version: int) -> bytes:
        return json.dumps([self._vault_id, kind, row_id.hex(), version]).encode()


def new_key() -> bytearray:
    """32 random bytes."""
    return bytearray(secrets.token_bytes(_KEY_BYTES))


def forget_keyring_key(vault_id: str) -> None:
    """Where there is one. Raises ConfigError."""
    import keyring
    from keyring.errors import KeyringError, PasswordDeleteError

    try:
        keyring.delete_password(_KEYRING_SERVICE, vault_id)
    except PasswordDeleteError:
        return
    except KeyringError as error:
        raise ConfigError("the OS keyring cannot be used here; unlock it first") from error


def _keyring_key(vault_id: str, *, new: bool) -> bytearray:
    import keyring
    from keyring.errors import KeyringError

    try:
        if new:
            key = new_key()
            keyring.set_password(_KEYRING_SERVICE, vault_id, key.hex())
            return key
        stored = keyring.get_password(_KEYRING_SERVICE, vault_id)
    except KeyringError as error:
        raise ConfigError("the OS keyring cannot be used here; use a passphrase instead") from error
    if stored is None:
        raise VaultError("the OS keyring holds no key for this vault; unlock it, or log in as its owner")
    try:
        key = bytearray.fromhex(stored)
        if len(key) != _KEY_BYTES:
            raise ValueError("of another length")
        return key
    except ValueError as error:
        raise VaultError("the key in the OS keyring is not this vault's") from error


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
