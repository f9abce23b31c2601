"""What a server leaves in its state folder beside identities: where it is reached, and that it is the one.

It knows no model, so that `perfit-cloud invite`, and a second `serve`, say at once what they have to say.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from perfit_shared.errors import ConfigError

__all__ = ["Addresses", "only_server"]

_ADDRESSES = "addresses.json"


@dataclass(frozen=True)
class Addresses:
    """host:port that devices dial."""

    address: str  # mutual TLS
    enrol_address: str  # enrolment

    def save(self, state: Path) -> None:
        new = state / f"{_ADDRESSES}.new"
        new.write_text(json.dumps(asdict(self)), "utf-8")
        new.replace(state / _ADDRESSES)

    @classmethod
    def load(cls, state: Path) -> Addresses:
        """Where the server of this state folder was last reached. Raises ConfigError if none ran."""
        try:
            return cls(**json.loads((state / _ADDRESSES).read_text("utf-8")))
        except FileNotFoundError:
            raise ConfigError(
                f"no server has run with the state folder {state}; start `perfit-cloud serve` first, or "
                "name its folder with --state"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{state / _ADDRESSES} is damaged; start `perfit-cloud serve` again") from error


@contextmanager
def only_server(state: Path) -> Iterator[None]:
    """Hold the state folder as its only server; the lock ends with the process, however that ends.

    Raises ConfigError when another server holds it.
    """
    with (state / "serve.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another perfit-cloud serves from {state}; stop it, or give --state") from None
        yield
