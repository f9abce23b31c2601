"""What an operator says of where a model's weights go, in the words of transformers and accelerate."""

from __future__ import annotations

import atexit
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from perfit_shared.errors import ConfigError

__all__ = ["ONE_DEVICE", "Placement"]

_INFERRED = ("auto", "balanced", "balanced_low_0", "sequential")
_ENTRY = re.compile(r"\s*([a-z]+|\d+)\s*=\s*(\d+(\.\d+)?\s*[KMGT]i?B)\s*", re.IGNORECASE)
_WEIGHTLESS = ("cpu", "disk")  # where weights lie that a GPU computes with


@dataclass(frozen=True)
class Placement:
    """Raises ConfigError when built with what cannot be. By default a model is on one device, whole."""

    # none; auto, balanced, balanced_low_0 or sequential, as accelerate places weights; or a JSON file with an
    # object of module names and devices: a GPU's number, "cpu" or "disk".
    device_map: str = "none"
    max_memory: str = ""  # of weights, by device: "0=70GiB,1=70GiB,cpu=200GiB"; what is free
    # Of weights on "disk" that their own files do not have as they are needed; a new temporary one.
    offload_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.device_map == "none":
            if self.max_memory:
                raise ConfigError("max_memory goes with a device_map, such as auto")
            return
        if self.device_map not in _INFERRED and not self.device_map.endswith(".json"):
            choices, given = ", ".join(("none", *_INFERRED)), self.device_map[:60]
            raise ConfigError(f'device_map should be {choices} or a .json file, not "{given}"')
        self._limits()

    @property
    def splits(self) -> bool:
        return self.device_map != "none"

    def main_device(self) -> str:
        """The kind of device that computes: "cuda" or "cpu". Raises ConfigError on a map that cannot be."""
        if self.device_map in _INFERRED:
            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cuda" if set(self._from_file().values()) - {*_WEIGHTLESS} else "cpu"

    def arguments(self) -> dict[str, Any]:
        """Of `from_pretrained`. Makes the folder for weights on the disk."""
        if not self.splits:
            return {}
        return {
            "device_map": self.device_map if self.device_map in _INFERRED else self._from_file(),
            "max_memory": self._limits() or None,
            "offload_folder": str(self._folder()),
        }

    def _folder(self) -> Path:
        """0700, without the weights of an earlier process."""
        folder = self.offload_folder
        if folder is None:
            folder = Path(mkdtemp(prefix="perfit-offload-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        return folder

    def _limits(self) -> dict[int | str, str]:
        found: dict[int | str, str] = {}
        for entry in filter(None, self.max_memory.split(",")):
            parts = _ENTRY.fullmatch(entry)
            if parts is None or not (parts[1].isdecimal() or parts[1] == "cpu"):
                raise ConfigError(f'max_memory should read like "0=70GiB,cpu=200GiB", not "{entry[:60]}"')
            found[int(parts[1]) if parts[1].isdecimal() else parts[1]] = parts[2].replace(" ", "")
        return found

    def _from_file(self) -> dict[str, int | str]:
        path = Path(self.device_map).expanduser()
        try:
            found = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the device map {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, dict) or not found:
            raise ConfigError(f'{path} should be an object such as {{"model.layers.0": 0, "lm_head": "cpu"}}')
        for module, device in found.items():
            is_number = isinstance(device, int) and not isinstance(device, bool)
            if is_number and 0 <= device < torch.cuda.device_count():
                continue
            if device not in _WEIGHTLESS:
                raise ConfigError(f"{path}: {module} is on {device!r}, which is no device here")
        return found


ONE_DEVICE = Placement()
