"""Changes to a vault whose outcome is known: the state after n of them is a function of seed and n."""

from __future__ import annotations

import base64
import random
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from perfit_device.vault.crypto import Header, KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import WrongPassphrase
from soak.killing.child import start

__all__ = ["State", "carved", "kill_changes", "pieces_of", "pieces_through"]

_CHEAP = KdfParams(memory_kib=32, iterations=1, lanes=4)
_KINDS = ("shift", "example", "checkpoint")
_LONGEST_SECONDS = 0.25  # from the first change to the kill
_RUN = 16  # bytes

Rows = dict[tuple[str, str], bytes]


@dataclass(frozen=True)
class State:
    """What the vault holds after `number` changes, and the last of them."""

    seed: int
    number: int
    passphrase: str
    rows: Rows

    @classmethod
    def start(cls, seed: int) -> State:
        rng = random.Random(seed)
        rows = {("example", f"e{n}"): rng.randbytes(rng.randrange(20, 900)) for n in range(30)}
        return cls(seed, 0, "first", rows)

    def next(self) -> State:
        """One more change: another passphrase, or rows that are written, replaced and removed together."""
        number = self.number + 1
        rng = random.Random(self.seed * 1_000_003 + number)
        if rng.random() < 0.1:
            return replace(self, number=number, passphrase=f"passphrase {number}")
        rows = dict(self.rows)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = (rng.choice(_KINDS), f"e{rng.randrange(40)}")
            if place in rows and rng.random() < 0.4:
                del rows[place]
            else:
                rows[place] = rng.randbytes(rng.choice((0, 30, 500, 5_000, 40_000)))
        return replace(self, number=number, rows=rows)

    def make(self, vault: Vault) -> None:
        """The change that led here, as one of a vault that holds the state before."""
        before = State.at(self.seed, self.number - 1)
        if self.passphrase != before.passphrase:
            vault.change_passphrase(self.passphrase)
            return
        with vault.transaction():
            for kind, name in before.rows.keys() - self.rows.keys():
                vault.delete(kind, name)
            for (kind, name), data in self.rows.items():
                if before.rows.get((kind, name)) != data:
                    vault.put(kind, name, data)

    @classmethod
    def at(cls, seed: int, number: int) -> State:
        state = _RECENT.get(seed)
        if state is None or state.number > number:
            state = cls.start(seed)
        while state.number < number:
            state = state.next()
        _RECENT[seed] = state
        return state


_RECENT: dict[int, State] = {}  # by seed: states are asked for in their order


def kill_changes(folder: Path, seed: int, rng: random.Random) -> str | None:
    """Make a vault in `folder`, change it, kill that at a random moment, look. What is wrong, or None."""
    path = folder / "vault.db"
    state = State.start(seed)
    with Vault.create(path, state.passphrase, kdf=_CHEAP) as vault, vault.transaction():
        for (kind, name), data in state.rows.items():
            vault.put(kind, name, data)
    with start("changes", str(path), str(seed)) as child:
        told = child.stdout.readline() if child.stdout is not None else ""
        time.sleep(rng.uniform(0.0, _LONGEST_SECONDS))
        child.send_signal(signal.SIGKILL)
        told += child.stdout.read() if child.stdout is not None else ""
    lines = [line.split() for line in told.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        return "the process that should be killed did not work"
    acknowledged = int(lines[-1][0])
    try:
        found = _open(path, seed, acknowledged)
    except WrongPassphrase:
        return f"no passphrase opens the vault after change {acknowledged}"
    if found is None:
        return f"the vault holds neither the state of change {acknowledged} nor of the next"
    return carved(folder, {bytes.fromhex(piece) for _, *pieces in lines for piece in pieces})


def _open(path: Path, seed: int, acknowledged: int) -> int | None:
    """Which change the vault is at: the last that was told of, or the next. Raises WrongPassphrase."""
    candidates = [State.at(seed, number) for number in (acknowledged, acknowledged + 1)]
    for passphrase in {state.passphrase: None for state in candidates}:
        try:
            with Vault.open(path, passphrase) as vault:
                rows = {(kind, name): data for kind in _KINDS for name, data in vault.list(kind).items()}
        except WrongPassphrase:
            continue
        for state in candidates:
            if (state.passphrase, state.rows) == (passphrase, rows):
                return state.number
        return None
    raise WrongPassphrase("none of them opens it")


def carved(folder: Path, seen: set[bytes]) -> str | None:
    """Whether a file in `folder` still holds bytes of rows that are no more. `seen`: pieces of all rows."""
    kept = pieces_of(folder / "vault.db")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    if not all(piece in files["vault.db"] for piece in kept):
        return "the search does not find what is there, so it proves nothing"
    for piece in seen - kept:
        for name, data in files.items():
            if piece in data:
                return f"{name} still holds bytes of a row that was removed"
    return None


def pieces_of(path: Path) -> set[bytes]:
    """16 bytes of every sealed row's beginning and end, of its wrapped key, and of the vault's own key."""
    with closing(sqlite3.connect(path)) as connection:
        return pieces_through(connection)


def pieces_through(connection: sqlite3.Connection) -> set[bytes]:
    """The same of a vault that is open."""
    rows = connection.execute(
        "SELECT substr(wrapped_key, 1, 16), substr(sealed, 1, 16), substr(sealed, -16) FROM rows"
    )
    pieces = {piece for row in rows for piece in row}
    (header,) = connection.execute("SELECT data FROM header").fetchone()
    return pieces | {base64.b64encode(Header.from_bytes(header).wrapped)[:_RUN]}
