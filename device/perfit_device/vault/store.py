"""The device's sealed store: one SQLite file of rows that only its owner's passphrase opens.

    header(data, list_mac)                             crypto.Header, MAC over the list of rows
    rows(kind, id, version, wrapped_key, sealed)       crypto.DataKey

Promises: a crash at any byte leaves the old or the new version (a rollback journal, synchronous=FULL,
one transaction a change); every row is bound to its kind and id, and the list of rows to the key, so a
changed, swapped, dropped or revived row is VaultDamaged on opening; nothing of a deleted or replaced
row stays in the file or its journal; two processes never hold one vault at once. A whole file of an
earlier day, put back, is not noticed.

How rows are written and removed is in `sealed_rows`; here are opening, closing and passphrases.
"""

from __future__ import annotations

import contextlib
import sqlite3
import weakref
from collections.abc import Callable
from pathlib import Path

from perfit_device.migration import migrate
from perfit_device.vault import checksum
from perfit_device.vault.crypto import COSTLIEST, FORMAT, DataKey, Header, KdfParams, new_key, wiped
from perfit_device.vault.file import WAIT_SECONDS, attach, lock_in_process, make, translated
from perfit_device.vault.sealed_rows import RESERVE, SealedRows
from perfit_shared.errors import VaultDamaged, VaultError, VaultUnswept

__all__ = ["Vault"]

_OUR_KDF = KdfParams()  # what `create` locks by


class Vault(SealedRows):
    """An open vault; `create` or `open` one, and close it or use `with`. Several threads may share it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, header: Header, key: bytearray) -> None:
        super().__init__(path, connection, DataKey(key, header.vault_id))
        self.closed = False
        self._file = path.open("rb", buffering=0)  # for the checksum
        self._header = header
        self._unlock: Callable[[], object] | None = None  # lets another thread open the file

    # -- opening and closing -------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, passphrase: str | None, *, kdf: KdfParams | None = None) -> Vault:
        """A new vault, locked by `passphrase`, or by the OS keyring when it is None.

        Raises VaultError when there is one already. It appears at `path` only when it is whole.
        """
        if path.exists():
            raise VaultError(f"there is a vault at {path} already")
        key = new_key()
        header = Header.create(key, passphrase, kdf or KdfParams())
        make(path, header, DataKey(key, header.vault_id).list_mac(b""))
        return cls._open(path, key=key, passphrase=None, wait_seconds=WAIT_SECONDS, most=header.kdf)

    @classmethod
    def open(
        cls,
        path: Path,
        passphrase: str | None,
        *,
        key: bytes | bytearray | None = None,
        wait_seconds: float = WAIT_SECONDS,
        costly: bool = False,
    ) -> Vault:
        """`key` is that of `copy_key`, in place of a passphrase: it costs no key derivation.

        Raises NotFound, VaultBusy, WrongPassphrase or VaultDamaged; none of them changes a byte.

        A vault of an earlier format becomes one of today's, whole or not at all. VaultError where the disk
        does not take that, and where the key derivation costs more than that of `create` and `costly` does
        not allow it.
        """
        copy = None if key is None else bytearray(key)
        return cls._open(
            path, key=copy, passphrase=passphrase, wait_seconds=wait_seconds, most=_most(costly=costly)
        )

    @staticmethod
    def lock_of(path: Path, *, costly: bool = False) -> str:
        """ "passphrase" or "keyring", without opening. Raises as `open` does."""
        lock = lock_in_process(path, WAIT_SECONDS)
        try:
            connection, header = attach(path, WAIT_SECONDS, _most(costly=costly))
            connection.close()
        finally:
            lock.release()
        return header.lock

    @classmethod
    def _open(
        cls,
        path: Path,
        *,
        key: bytearray | None,
        passphrase: str | None,
        wait_seconds: float,
        most: KdfParams,
    ) -> Vault:
        lock = lock_in_process(path, wait_seconds)
        try:
            connection, header = attach(path, wait_seconds, most)
            try:
                vault = cls(path, connection, header, key or header.unwrap(passphrase))
            except BaseException:
                connection.close()
                raise
        except BaseException:
            lock.release()
            raise
        vault._unlock = weakref.finalize(vault, lock.release)
        try:
            with translated(path):
                vault._verify()
                is_swept = vault._is_swept()
                vault._checksum_current = checksum.check(vault._file, path, is_swept=is_swept)
                vault._clean_up(is_swept=is_swept)
                vault._migrate(passphrase)
        except BaseException:
            vault._release()
            raise
        return vault

    def _clean_up(self, *, is_swept: bool) -> None:
        """Remove what a kill left behind. Where the disk takes no change, another opening does it."""
        try:
            if not self.delete(*RESERVE) and not is_swept:
                self._sweep()
        except VaultDamaged:
            raise
        except VaultError:
            return

    def _migrate(self, passphrase: str | None) -> None:
        """Bring a vault of an earlier format to today's, rows and header in one transaction."""
        if self._header.format == FORMAT:
            return
        header = self._key.in_todays_format(self._header, passphrase)
        with contextlib.suppress(VaultUnswept), self.transaction():  # another opening sweeps it
            migrate(self, self._header.format)
            self._write_header(header)

    @property
    def lock(self) -> str:
        """ "passphrase" or "keyring"."""
        return self._header.lock

    def copy_key(self) -> bytearray:
        """The data key, to open this vault again by. The caller overwrites it."""
        return self._key.copy()

    def close(self) -> None:
        """Write the checksum and release the file."""
        if self.closed:
            return
        self.closed = True
        try:
            with contextlib.suppress(sqlite3.Error, VaultError):
                if not self._is_swept():
                    self._sweep()
                # Not for an unswept file: after a crash SQLite restores all but its free pages.
                if not self._checksum_current and self._is_swept():
                    checksum.write(self._file, self.path)
        finally:
            self._release()

    def _release(self) -> None:
        self._connection.close()
        self._file.close()
        self._key.wipe()
        if self._unlock is not None:
            self._unlock()  # behind the last handle of the file

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- passphrases ---------------------------------------------------------------------------

    def check_passphrase(self, passphrase: str | None) -> None:
        """Raises WrongPassphrase unless it opens this vault; None opens one that the keyring locks."""
        with wiped(self._header.unwrap(passphrase)):
            return

    def change_passphrase(self, passphrase: str) -> None:
        """Rewrap the data key; no row is touched. A keyring vault becomes a passphrase vault."""
        self._write_header(self._key.rewrap(self._header, passphrase))

    def _write_header(self, header: Header) -> None:
        with self.transaction():
            self._execute("UPDATE header SET data = ?", header.to_bytes())
            self._removed = self._sweeps = True
        self._header = header


def _most(*, costly: bool) -> KdfParams:
    return COSTLIEST if costly else _OUR_KDF
