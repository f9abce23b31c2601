"""Where a profile lives and what the environment says. The environment is read here alone."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from perfit_device.config import Config, is_profile_name
from perfit_shared.errors import ConfigError, InvalidInput, NotFound
from perfit_shared.grpc_environment import prepare_grpc
from perfit_shared.terminal import utf8

if TYPE_CHECKING:
    from perfit_device.cloud.sealing import Sealing

__all__ = ["DeviceSettings", "prepare_process"]

_LONGEST_PASSPHRASE = 64 << 10  # bytes of a file
# Variables that stand over what the config file says.
_VARIABLES = {"agent.lock_minutes": "PERFIT_AGENT_LOCK_MINUTES", "agent.start": "PERFIT_AGENT_START"}


@dataclass(frozen=True)
class DeviceSettings:
    """A flag stands over a variable, a variable over the config file, and the file over what perfit takes.

    Raises ConfigError when the profile's name cannot be a folder's.
    """

    profile: str = "default"
    home: Path = Path("~/.perfit")
    config: Config = field(default_factory=Config)  # the file's, under the variables

    def __post_init__(self) -> None:
        if not is_profile_name(self.profile):
            raise ConfigError("a profile's name should be letters, digits, dots, dashes or underscores")

    @classmethod
    def from_environment(cls, profile: str | None) -> DeviceSettings:
        """The profile named, else PERFIT_PROFILE's, else the config file's, else "default"."""
        home = Path(os.environ.get("PERFIT_HOME") or "~/.perfit")
        with contextlib.suppress(RuntimeError):  # without a known home "~" is a folder's name
            home = home.expanduser()
        config = Config.read(home / "config.toml")
        settings = cls(profile or os.environ.get("PERFIT_PROFILE") or config.profile, home)
        for key, variable in {**_VARIABLES, f"task.{settings.profile}": "PERFIT_TASK"}.items():
            if given := os.environ.get(variable):
                config = config.with_value(key, utf8(given, variable))
        return replace(settings, config=config)

    @property
    def config_path(self) -> Path:
        return self.home / "config.toml"

    @property
    def task(self) -> str | None:
        """The name of the artefact that is meant where a command names none."""
        return self.config.task_of(self.profile)

    def sealing(self) -> Sealing | None:
        """How this profile's calls are sealed, as the config file has it now; None: they are not.

        Raises ConfigError when what should vouch for a front cannot be read.
        """
        config = Config.read(self.config_path)
        if not config.is_sealed(self.profile):
            return None
        from perfit_device.cloud.sealing import Sealing

        file = config.front_ca_of(self.profile)
        try:
            return Sealing(front_roots=Path(file).expanduser().read_bytes() if file else b"")
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"front_ca cannot be read: {error}") from error

    def examples(self) -> int | None:
        """How many own examples stand before a question, as the config file has it now; None: unset."""
        return Config.read(self.config_path).examples_of(self.profile)

    @property
    def vault_path(self) -> Path:
        return self._vault_of(self.profile)

    def check_exists(self) -> None:
        """Raises NotFound when there is no such profile."""
        if not self.vault_path.exists():
            raise NotFound(
                f'there is no profile "{self.profile}"; `perfit enroll INVITE` makes one, '
                "--profile chooses another, and `perfit profiles` lists them"
            )

    @property
    def profiles_folder(self) -> Path:
        return self.home / "profiles"

    def profiles(self) -> list[str]:
        """The names of all profiles that have a vault, sorted."""
        folder = self.profiles_folder
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return sorted(n for n in names if is_profile_name(n) and self._vault_of(n).is_file())

    def _vault_of(self, profile: str) -> Path:
        return self.profiles_folder / profile / "vault.db"

    @property
    def runtime_folder(self) -> Path:
        """Where a socket's path is short: in the user's own runtime folder, else in /tmp.

        Not by the environment: a command of cron's has to find the agent that a desktop started.
        """
        runtime = Path(f"/run/user/{os.geteuid()}")
        return runtime / "perfit" if runtime.is_dir() else Path(f"/tmp/perfit-{os.geteuid()}")  # noqa: S108

    @property
    def systemd_folder(self) -> Path:
        """Where a user's own units lie."""
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"

    @property
    def starts_agent(self) -> bool:
        """Whether a passphrase that a person typed starts an agent."""
        return self.config.agent_start != "never"

    @property
    def agent_idle_seconds(self) -> float:
        """Unused for so long an agent locks itself; 0: never."""
        return 60 * self.config.lock_minutes

    @property
    def costly_vault(self) -> bool:
        """PERFIT_COSTLY_VAULT: whether a vault may be opened whose key costs more than perfit's own."""
        return os.environ.get("PERFIT_COSTLY_VAULT", "") not in ("", "0")

    @property
    def has_passphrase(self) -> bool:
        """Whether the environment has one, so that nobody need type it."""
        return _secret("PERFIT_PASSPHRASE") is not None or any(os.environ.get(name) for name in _SOURCES)

    def passphrase(self) -> str | None:
        """PERFIT_PASSPHRASE, or what the file of PERFIT_PASSPHRASE_FILE holds, or what the command of
        PERFIT_PASSPHRASE_COMMAND prints; None where none of them is set.

        Raises InvalidInput when it is no text, and ConfigError when the file or the command gives none.
        """
        given = _secret("PERFIT_PASSPHRASE")
        for name, read in _SOURCES.items() if given is None else ():
            if value := os.environ.get(name):
                data = read(value)
                if not data.strip(b"\r\n"):
                    raise ConfigError(f"{name} gave no passphrase")
                try:
                    return data.decode()
                except UnicodeDecodeError as error:
                    raise InvalidInput(f"what {name} gave is not text in UTF-8") from error
        return given

    def new_passphrase(self) -> str | None:
        """PERFIT_NEW_PASSPHRASE, or None: for `perfit passphrase` in scripts."""
        return _secret("PERFIT_NEW_PASSPHRASE")

    def backup_passphrase(self) -> str | None:
        """PERFIT_BACKUP_PASSPHRASE, or None: that of a backup's file."""
        return _secret("PERFIT_BACKUP_PASSPHRASE")


def _secret(name: str) -> str | None:
    """A line break alone, as an empty file gives it, is none."""
    value = utf8(os.environ.get(name, ""), name)
    return value if value.strip("\r\n") else None


def _from_file(name: str) -> bytes:
    try:
        with Path(name).expanduser().open("rb") as file:
            return file.read(_LONGEST_PASSPHRASE)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"PERFIT_PASSPHRASE_FILE cannot be read: {error}") from error


def _from_command(command: str) -> bytes:
    """No shell reads the command: its words are split as one would, and nothing is expanded."""
    import shlex
    import subprocess

    try:
        words = shlex.split(command, posix=os.name != "nt")
        return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"it ended with code {error.returncode}"
        raise ConfigError(f"PERFIT_PASSPHRASE_COMMAND failed: {reason}") from error


_SOURCES = {"PERFIT_PASSPHRASE_FILE": _from_file, "PERFIT_PASSPHRASE_COMMAND": _from_command}


def prepare_process() -> None:
    """No core dumps, which would hold keys; and settings of libraries that must stand before they are
    imported, where what the user set stays."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prepare_grpc()
    # The largest matrix here is 32 × 4096: threads cost more memory than they save time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
