"""What a person sets once for all commands: `config.toml` in perfit's home.

    profile = "work"            # the profile that commands use

    [task]                      # the task of each profile, where it has several
    work = "reply"

    [sealed]                    # whether a profile's calls are sealed; unset: they are not
    work = true

    [front_ca]                  # PEM file: who vouches for the front that ends TLS, beside the cloud's own CA
    work = "/etc/ssl/certs/company.pem"

    [examples]                  # own ones that stand before a question; unset: 4 where answers are one line
    work = 0

    [agent]
    lock_minutes = 15           # idle, after which it locks itself; 0: never
    start = "auto"              # when a command needs it; or "never"

    [update]
    auto = true                 # an agent trains by itself what is due
    unlock_by_keyring = false   # a locked one may unlock itself for that

`KEYS` is the one list of what may be set. `DeviceSettings` lays the environment over the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from perfit_shared.errors import ConfigError
from perfit_shared.terminal import one_line

__all__ = ["KEYS", "Config", "is_profile_name"]

Value = str | int | float
_LARGEST = 64 * 1024  # bytes
_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TASK_CHARACTERS = 64
_MOST_MINUTES = 7 * 24 * 60
_STARTS = ("auto", "never")
# With the name of a profile behind them.
_TASK, _SEALED, _FRONT_CA, _OWN_EXAMPLES = "task.", "sealed.", "front_ca.", "examples."


def is_profile_name(name: str) -> bool:
    """Whether it can be a folder's name."""
    return _PROFILE.fullmatch(name) is not None


def _profile(value: Value) -> str:
    if not isinstance(value, str) or not is_profile_name(value):
        raise ConfigError("a profile's name should be letters, digits, dots, dashes or underscores")
    return value


def _task(value: Value) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _TASK_CHARACTERS:
        raise ConfigError("a task should be the name of one; `perfit status` lists them")
    return value


def _file(value: Value) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise ConfigError("front_ca should be the path of a PEM file")
    return value


def _examples(value: Value) -> int:
    from perfit_shared.retrieval import MOST_EXAMPLES

    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 3 and int(text) <= MOST_EXAMPLES):
        raise ConfigError(f"examples should be a number from 0 to {MOST_EXAMPLES}")
    return int(text)


def _minutes(value: Value) -> float:
    try:
        minutes = float(value)
    except (ValueError, OverflowError):
        minutes = -1.0
    if isinstance(value, bool) or not 0 <= minutes <= _MOST_MINUTES:
        raise ConfigError(f"agent.lock_minutes should be a number of minutes, 0 to {_MOST_MINUTES}")
    return minutes


def _start(value: Value) -> str:
    if value not in _STARTS:
        raise ConfigError(f"agent.start should be {' or '.join(_STARTS)}")
    return str(value)


def _switch(key: str) -> Callable[[Value], Value]:
    def check(value: Value) -> bool:
        if str(value).lower() not in ("true", "false"):
            raise ConfigError(f"{key} should be true or false")
        return str(value).lower() == "true"

    return check


KEYS: Mapping[str, Callable[[Value], Value]] = {  # → checks a value of the file, or a text for it
    "profile": _profile,
    "task.PROFILE": _task,
    "sealed.PROFILE": _switch("sealed"),
    "front_ca.PROFILE": _file,
    "examples.PROFILE": _examples,
    "agent.lock_minutes": _minutes,
    "agent.start": _start,
    "update.auto": _switch("update.auto"),
    "update.unlock_by_keyring": _switch("update.unlock_by_keyring"),
}


@dataclass(frozen=True)
class Config:
    """What is set, by key. Raises ConfigError on an unknown key, or a value that cannot be."""

    values: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = {key: _check_of(key)(value) for key, value in self.values.items()}
        object.__setattr__(self, "values", checked)

    @property
    def profile(self) -> str:
        return str(self.values.get("profile", "default"))

    def task_of(self, profile: str) -> str | None:
        """The name of the artefact that a profile's commands take where none is named."""
        task = self.values.get(_TASK + profile)
        return None if task is None else str(task)

    def is_sealed(self, profile: str) -> bool:
        """Whether a profile's calls are sealed, or not sent."""
        return bool(self.values.get(_SEALED + profile, False))

    def front_ca_of(self, profile: str) -> str:
        """PEM file of who vouches for a front's TLS; "": the cloud's own CA alone."""
        return str(self.values.get(_FRONT_CA + profile, ""))

    def examples_of(self, profile: str) -> int | None:
        """How many own ones stand before a profile's questions; None: as the task, or the shift, wants it."""
        said = self.values.get(_OWN_EXAMPLES + profile)
        return None if said is None else int(said)

    @property
    def lock_minutes(self) -> float:
        """Idle, after which the agent locks itself; 0: never."""
        return float(self.values.get("agent.lock_minutes", 15.0))

    @property
    def agent_start(self) -> str:
        """ "auto": a command that needs an agent starts it; or "never"."""
        return str(self.values.get("agent.start", "auto"))

    @property
    def update_auto(self) -> bool:
        """Whether an agent trains by itself what is due."""
        return bool(self.values.get("update.auto", True))

    @property
    def update_unlock_by_keyring(self) -> bool:
        """Whether a locked agent may unlock itself for that, by the keyring."""
        return bool(self.values.get("update.unlock_by_keyring", False))

    def with_value(self, key: str, value: Value | None) -> Config:
        """None takes the key out."""
        _check_of(key)
        values = {of: had for of, had in self.values.items() if of != key}
        return replace(self, values=values if value is None else values | {key: value})

    def without_profile(self, name: str) -> Config:
        """Nothing of a profile that is gone."""
        without = self
        for table in (_TASK, _SEALED, _FRONT_CA, _OWN_EXAMPLES):
            without = without.with_value(f"{table}{name}", None)
        return without.with_value("profile", None) if without.values.get("profile") == name else without

    # -- the file ------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Config:
        """Empty where there is no file. Raises ConfigError, also when others could change the file."""
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > _LARGEST:
            raise ConfigError(f"{path} is larger than {_LARGEST >> 10} KiB, so it is no config file")
        import tomllib

        from perfit_shared.ownership import check_ownership

        check_ownership(path)

        try:
            return cls(_flat(tomllib.loads(data.decode())))
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
            raise ConfigError(f"{path} is no TOML: {one_line(str(error))[:200]}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; mend it, or remove the file") from error

    def write(self, path: Path) -> None:
        """Whole or not at all, for its owner alone. Comments of an earlier file are lost."""
        import tomli_w

        from perfit_shared.files import write_whole
        from perfit_shared.ownership import make_private_folder

        top: dict[str, Value] = {}
        tables: dict[str, dict[str, Value]] = {}
        for key, value in sorted(self.values.items()):
            table, dot, name = key.partition(".")
            within = tables.setdefault(table, {}) if dot else top
            within[name if dot else key] = value
        try:
            make_private_folder(path.parent)
            write_whole(path, tomli_w.dumps(top | tables).encode(), mode=0o600)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _check_of(key: str) -> Callable[[Value], Value]:
    """Raises ConfigError on an unknown key."""
    table, _, name = key.partition(".")
    if f"{table}.PROFILE" in KEYS and is_profile_name(name) and name != "PROFILE":
        return KEYS[f"{table}.PROFILE"]
    if key not in KEYS or key.endswith(".PROFILE"):
        raise ConfigError(f'there is no setting "{one_line(key)[:64]}"; there are {", ".join(KEYS)}')
    return KEYS[key]


def _flat(tables: Mapping[str, object]) -> dict[str, Value]:
    """Keys of tables joined by a dot. Raises ConfigError on a value of another kind."""
    flat: dict[str, Value] = {}
    for name, value in tables.items():
        within = value.items() if isinstance(value, Mapping) else ()
        for key, plain in [(f"{name}.{of}", inner) for of, inner in within] or [(name, value)]:
            if not isinstance(plain, str | int | float):
                raise ConfigError(f'"{one_line(key)[:64]}" should be a text or a number')
            flat[key] = plain
    return flat
