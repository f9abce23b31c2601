"""Everything that perfit raises on purpose, and how each travels over gRPC.

PerfitError
├── InvalidInput              a request, a file or a flag is wrong
│   ├── InvalidTensors        names, shapes, dtypes, values of a shift
│   ├── InvalidPrompt         empty, or longer than the cloud takes
│   ├── InvalidData           a history or dataset file; names file, item and field
│   │   └── ExamplesRefused   the cloud refuses these examples, whatever else it is asked
│   ├── InvalidInvite         not an invite, or altered on the way
│   └── CertificateValid      renewed as if it had lapsed, and it has not
├── NotFound                  no such artefact, task or profile
├── NotHere                   another server of the same cloud does this
├── ShiftMismatch             spec, artefact version or model fingerprint differ
├── InviteRefused             unknown, expired or already used by another device
├── NotAuthenticated          no certificate, or none that this cloud issued
│   ├── CertificateExpired    it was issued here, and its time is over
│   ├── CertificateSuperseded a newer one of the same identity is in use
│   └── SealRequired          unsealed where calls have to be sealed
├── SealBroken                what was sealed is altered, cut off, out of order, out of time or sent again
├── IdentityRevoked           this device's identity was withdrawn, by its operator or by itself
├── Busy                      a limit is reached; `retry_ms` says when to come back
├── TooSlow                   a deadline passed
├── Unavailable               the cloud cannot be reached, or is stopping
│   ├── SealUnknown           sealed to a key, or by a certificate, that the server which got it does not know
│   └── BrokenOff             a trusted server ended the connection: it stops, or refuses our certificate
├── Cancelled                 the caller left
├── VaultError                the device's sealed store
│   ├── WrongPassphrase
│   ├── VaultDamaged          bytes were changed or lost; nothing was touched
│   ├── VaultBusy             another process holds it
│   ├── VaultUnswept          the change is made; traces of what was deleted still lie in the file
│   └── Locked                its agent has no key until the owner unlocks it
├── Fault                     something inside perfit's agent that should not have happened
├── StoreFailed               the cloud's record of devices cannot be read or written
├── UpdateFailed              an update cannot go on; its state is kept
│   └── Diverged              its loss is no longer a number
└── ConfigError               an unknown key, or a value that cannot be

Both programs end with an exit code by the class of the error (`exit_code`):

    0    done
    1    anything else: a file, a value or a name that cannot be, an output that cannot be written
    2    wrong usage: an unknown command or option
    3    the cloud cannot be reached, is busy or too slow; again later
    4    the cloud refuses this device: not enrolled, revoked, an invite that does not hold
    5    the update ran, and its gate kept the new version out
    6    the vault: locked, a wrong passphrase, damage, another process, no room
    7    the update stopped half-way, and resumes
    70   a fault inside perfit
    130  Ctrl-C; 143 SIGTERM, 129 SIGHUP

A message of these classes is written to be read by the person at the other end: it holds no
prompt, no number from a tensor and no path of the cloud. Anything else that is raised inside the
cloud reaches a device as "internal error".
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "INTERNAL",
    "INTERRUPTED",
    "KEPT_OUT",
    "STATUS",
    "USAGE",
    "BrokenOff",
    "Busy",
    "Cancelled",
    "CertificateExpired",
    "CertificateSuperseded",
    "CertificateValid",
    "ConfigError",
    "Diverged",
    "ExamplesRefused",
    "Fault",
    "IdentityRevoked",
    "InvalidData",
    "InvalidInput",
    "InvalidInvite",
    "InvalidPrompt",
    "InvalidTensors",
    "InviteRefused",
    "Locked",
    "NotAuthenticated",
    "NotFound",
    "NotHere",
    "PerfitError",
    "SealBroken",
    "SealRequired",
    "SealUnknown",
    "ShiftMismatch",
    "StoreFailed",
    "TooSlow",
    "Unavailable",
    "UpdateFailed",
    "VaultBusy",
    "VaultDamaged",
    "VaultError",
    "VaultUnswept",
    "WrongPassphrase",
    "exit_code",
    "from_code",
    "to_status",
]


INTERNAL = "internal"
USAGE, KEPT_OUT, INTERRUPTED = 2, 5, 130  # exit codes that no class below stands for
_FAULT = 70  # EX_SOFTWARE of sysexits.h


class PerfitError(Exception):
    """Root of the tree. `code` is the word that travels in the trailing metadata."""

    code = INTERNAL

    def __init__(self, message: str, *, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class InvalidInput(PerfitError):
    code = "invalid_input"


class InvalidTensors(InvalidInput):
    code = "invalid_tensors"


class InvalidPrompt(InvalidInput):
    code = "invalid_prompt"


class InvalidData(InvalidInput):
    code = "invalid_data"


class ExamplesRefused(InvalidData):
    """`names` are those of the examples."""

    code = "examples_refused"

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


class InvalidInvite(InvalidInput):
    code = "invalid_invite"


class NotFound(PerfitError):
    code = "not_found"


class NotHere(PerfitError):
    code = "not_here"


class ShiftMismatch(PerfitError):
    code = "shift_mismatch"


class InviteRefused(PerfitError):
    code = "invite_refused"


class NotAuthenticated(PerfitError):
    code = "not_authenticated"


class CertificateExpired(NotAuthenticated):
    code = "certificate_expired"


class CertificateSuperseded(NotAuthenticated):
    code = "certificate_superseded"


class SealRequired(NotAuthenticated):
    code = "seal_required"


class SealBroken(PerfitError):
    code = "seal_broken"


class CertificateValid(InvalidInput):
    code = "certificate_valid"


class IdentityRevoked(PerfitError):
    code = "identity_revoked"


class Busy(PerfitError):
    code = "busy"


class TooSlow(PerfitError):
    code = "too_slow"


class Unavailable(PerfitError):
    code = "unavailable"


class SealUnknown(Unavailable):
    code = "seal_unknown"


class BrokenOff(Unavailable):
    code = "broken_off"


class Cancelled(PerfitError):
    code = "cancelled"


class VaultError(PerfitError):
    code = "vault"


class WrongPassphrase(VaultError):
    code = "wrong_passphrase"


class VaultDamaged(VaultError):
    code = "vault_damaged"


class VaultBusy(VaultError):
    code = "vault_busy"


class VaultUnswept(VaultError):
    code = "vault_unswept"


class Locked(VaultError):
    code = "locked"


class Fault(PerfitError):
    code = "fault"


class StoreFailed(PerfitError):
    code = "store_failed"


class UpdateFailed(PerfitError):
    code = "update_failed"


class Diverged(UpdateFailed):
    """`index` is that of the training, where several go on together."""

    code = "diverged"

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class ConfigError(PerfitError):
    code = "config"


# The nearest class above an error's own that has a row here says how the program ends.
_EXIT_CODES: dict[type[BaseException], int] = {
    Unavailable: 3,
    Busy: 3,
    TooSlow: 3,
    NotAuthenticated: 4,
    IdentityRevoked: 4,
    InviteRefused: 4,
    VaultError: 6,
    UpdateFailed: 7,
    Fault: _FAULT,
    PerfitError: 1,
    OSError: 1,
    MemoryError: 1,
    BaseException: _FAULT,
}


def exit_code(error: BaseException) -> int:
    """How both programs end after an error that nobody handled."""
    return next(_EXIT_CODES[cls] for cls in type(error).__mro__ if cls in _EXIT_CODES)


# The one table, by the names of grpc.StatusCode (importing grpc here would slow every command
# down). Errors that never leave their side have no row.
STATUS: dict[type[PerfitError], str] = {
    InvalidInput: "INVALID_ARGUMENT",
    InvalidTensors: "INVALID_ARGUMENT",
    InvalidPrompt: "INVALID_ARGUMENT",
    NotFound: "NOT_FOUND",
    NotHere: "UNIMPLEMENTED",
    ShiftMismatch: "FAILED_PRECONDITION",
    InviteRefused: "PERMISSION_DENIED",
    NotAuthenticated: "UNAUTHENTICATED",
    CertificateExpired: "UNAUTHENTICATED",
    CertificateSuperseded: "UNAUTHENTICATED",
    SealRequired: "UNAUTHENTICATED",
    SealBroken: "INVALID_ARGUMENT",
    CertificateValid: "INVALID_ARGUMENT",
    IdentityRevoked: "PERMISSION_DENIED",
    Busy: "RESOURCE_EXHAUSTED",
    TooSlow: "DEADLINE_EXCEEDED",
    Unavailable: "UNAVAILABLE",
    SealUnknown: "UNAVAILABLE",
    Cancelled: "CANCELLED",
}
_BY_CODE: dict[str, type[PerfitError]] = {cls.code: cls for cls in STATUS}
# For statuses that gRPC itself made, without our code.
_BY_STATUS: dict[str, type[PerfitError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": ShiftMismatch,
    "UNAUTHENTICATED": NotAuthenticated,
    "PERMISSION_DENIED": NotAuthenticated,
    "RESOURCE_EXHAUSTED": Busy,
    "DEADLINE_EXCEEDED": TooSlow,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Cancelled,
}


def to_status(error: BaseException) -> tuple[str, str, str, int]:
    """(gRPC status name, code word, public message, retry delay in ms) of any exception."""
    if isinstance(error, PerfitError) and type(error) in STATUS:
        return STATUS[type(error)], error.code, str(error), error.retry_ms
    return "INTERNAL", PerfitError.code, "internal error", 0


def from_code(status: str, code: str | None, message: str, retry_ms: int = 0) -> PerfitError:
    """The exception that a status name stands for: by its code word, else by the status alone."""
    cls = _BY_CODE.get(code or "") or _BY_STATUS.get(status, PerfitError)
    return cls(message, retry_ms=retry_ms)
