"""Engines by name. Nothing else says which engine serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.static import BatchedEngine
from perfit_cloud.engine.interface import Engine, EngineKind, GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import ConfigError

__all__ = ["build_engine", "engine_kind"]


def _own(base: BaseModel) -> EngineKind:
    """The continuous batch where the model's family can share one, else answers in batches."""
    return GenerationEngine if can_share(base) else BatchedEngine


_KINDS: dict[str, Callable[[BaseModel], EngineKind]] = {"auto": _own, "own": _own}


def engine_kind(base: BaseModel, name: str = "auto") -> EngineKind:
    """The engines of this name for this model. Raises ConfigError on an unknown name."""
    if name not in _KINDS:
        raise ConfigError(f'there is no engine "{name}"; take one of {", ".join(_KINDS)}')
    return _KINDS[name](base)


def build_engine(
    base: BaseModel,
    artefacts: Mapping[str, Artefact],
    settings: GenerationSettings,
    device_lock: DeviceLock | None = None,
    name: str = "auto",
) -> Engine:
    """An engine of `engine_kind`. All engines on the base's device share `device_lock`."""
    return engine_kind(base, name)(base, artefacts, settings, device_lock)
