"""What the cloud remembers of invites, identities and challenges: the interface that every store offers.

    invites      a hash of each, when it ends and whether it was used; nothing that leads to an identity
    enrolments   the answer to an invite, because replies get lost; deleted when its certificate is first
                 used, and with it the link from invite to identity
    identities   dates of the newest certificate, how many there were, the newest that was used
    challenges   the keys that challenges are made with, and hashes of the challenges that were used

A store has no rule about who may call. Each method reads or writes whole or not at all, also when several
processes share the store. Every store passes `tests/support/store_contract.py`.

Every method raises Busy when the store is not free in time, StoreFailed when it is damaged or gone, and
Unavailable once it is closed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "MOST_CHALLENGES",
    "UNUSED",
    "ChallengeKey",
    "Changes",
    "Device",
    "Enrolment",
    "IdentityState",
    "IdentityStore",
    "InviteState",
    "OpenInvite",
]

UNUSED = -1  # no certificate was used yet; certificates older than generations count as generation 0
MOST_CHALLENGES = 10_000  # used ones that a store holds for one key


class IdentityState(NamedTuple):
    """What a call asks of an identity."""

    used: int  # newest generation of its certificates that was used, or UNUSED
    is_revoked: bool = False
    superseded: int | None = None  # unix seconds of the day a retired certificate was last presented


@dataclass(frozen=True)
class Device:
    """What the operator sees of an identity: dates, and a label."""

    identity: str  # 32 hex digits, in its certificate
    issued: int  # unix seconds, of its newest certificate
    expires: int
    revoked: int | None  # unix seconds, None while welcome
    superseded: int | None  # unix seconds of the day a retired certificate was last presented
    label: str = ""  # the operator's own words


@dataclass(frozen=True)
class OpenInvite:
    """An invite that was not used."""

    secret_hash: bytes
    expires: int  # unix seconds
    label: str


@dataclass(frozen=True)
class Enrolment:
    """The answer to an invite."""

    identity: str
    key_hash: bytes  # sha-256 of the device's public key
    certificate: bytes  # DER


@dataclass(frozen=True)
class InviteState:
    expires: int  # unix seconds
    is_used: bool
    enrolment: Enrolment | None  # None before the invite is used, and after its certificate was


@dataclass(frozen=True)
class Changes:
    """What became of identities since a reader last asked."""

    sequence: int  # to ask with next time
    states: Mapping[str, IdentityState]  # by identity
    is_complete: bool  # these are all: an identity that is not among them is gone


@dataclass(frozen=True)
class ChallengeKey:
    number: int  # 1, 2, …
    key: bytes
    made: int  # unix seconds


class IdentityStore(ABC):
    """Thread-safe, and shared by several processes."""

    @abstractmethod
    def close(self) -> None:
        """Close the store. Later calls raise Unavailable."""

    @abstractmethod
    def setting(self, key: str, default: str) -> str:
        """The stored value of `key`; the first process to ask stores its default."""

    # -- invites ---------------------------------------------------------------------------------

    @abstractmethod
    def add_invite(self, secret_hash: bytes, expires: int, label: str = "") -> None:
        """Remember an invite. Only the hash of its secret: whoever reads the store cannot enrol."""

    @abstractmethod
    def invite(self, secret_hash: bytes) -> InviteState | None:
        """One invite. This only reads, for anybody may guess secrets."""

    @abstractmethod
    def open_invites(self) -> list[OpenInvite]:
        """Those that were not used, whether or not they ended; the first to end first."""

    @abstractmethod
    def delete_invite(self, secret_hash: bytes) -> bool:
        """Forget an invite that was not used. False when there is none, or it was used meanwhile."""

    @abstractmethod
    def enroll(self, secret_hash: bytes, enrolment: Enrolment, *, issued: int, expires: int) -> bool:
        """Spend the invite on a new identity, whose first certificate has these dates (unix seconds).

        The invite's label becomes the identity's, and leaves the invite, so that it links nothing.

        Returns False and changes nothing when the invite is unknown or used. Of several who try at once, one
        succeeds.
        """

    # -- identities ------------------------------------------------------------------------------

    @abstractmethod
    def renew(self, identity: str, *, generation: int, issued: int, expires: int) -> int | None:
        """The generation of the identity's next certificate, which has these dates (unix seconds).

        No two calls get the same, and none gets less than `generation` + 1, with that of the certificate that
        asks: certificates may be ahead of a store restored from an old copy. None when the identity is
        unknown or revoked.
        """

    @abstractmethod
    def write_marks(self, marks: Mapping[str, IdentityState]) -> None:
        """Note which generations were used, and the days on which retired certificates were presented.

        `used` only grows, a day of None changes nothing, and `is_revoked` is ignored. Deletes the enrolment
        of an identity whose certificate was used.
        """

    @abstractmethod
    def matching(self, prefix: str) -> list[str]:
        """Identities that start with `prefix`, two at most."""

    @abstractmethod
    def revoke(self, identity: str, at: int) -> None:
        """Withdraw an identity at that time (unix seconds). May be repeated."""

    @abstractmethod
    def restore(self, identity: str) -> None:
        """Welcome an identity again that was withdrawn. May be repeated."""

    @abstractmethod
    def set_label(self, identity: str, label: str) -> None:
        """The operator's own words about an identity."""

    @abstractmethod
    def changes(self, since: int) -> Changes:
        """The identities that came, were revoked or used a new certificate after that sequence number.

        0 asks for all. Numbers become visible in order, so a reader that asks with the last number it got
        misses nothing, whoever writes meanwhile.
        """

    def on_change(self, wake: Callable[[], None]) -> None:  # noqa: B027 - a store need not
        """Call `wake`, from any thread, soon after another process revoked somebody. It may come too often.

        A store that cannot know does nothing: whoever must know looks by `changes`.
        """

    @abstractmethod
    def devices(self) -> list[Device]:
        """All identities, newest certificate first."""

    @abstractmethod
    def prune(self, *, identities_before: int, invites_before: int) -> tuple[int, int]:
        """Delete what ended before those unix seconds: how many identities, and how many invites.

        Nothing else deletes them, because a clock may be wrong. An invite stays while its enrolment does.
        """

    # -- challenges ------------------------------------------------------------------------------

    @abstractmethod
    def challenge_keys(self) -> list[ChallengeKey]:
        """The keys that challenges are made with, newest first, two at most."""

    @abstractmethod
    def add_challenge_key(self, key: bytes, *, made: int, after: int) -> None:
        """Put a new key before the key of number `after` (0: before none), and drop all older ones.

        Challenges used under a dropped key are forgotten, because nothing is accepted under it. Changes
        nothing when another process was faster, so that `after` is no longer the newest.
        """

    @abstractmethod
    def use_challenge(self, key_number: int, challenge_hash: bytes) -> bool:
        """Whether this is its first use, and its key still there; it is used from now on.

        Raises Busy when MOST_CHALLENGES were used under one key.
        """
