"""Engines by name. Nothing else says which engine serves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.static import BatchedEngine
from perfit_cloud.engine.interface import Engine, EngineKind, GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import ConfigError

__all__ = ["build_engine", "engine_kind"]


def _vllm(_base: BaseModel) -> EngineKind:
    """vLLM, its engine core in this process."""
    from perfit_cloud.engine.generation.vllm.core import check_installed
    from perfit_cloud.engine.generation.vllm.engine import VllmEngine

    check_installed()
    return VllmEngine


def _auto(base: BaseModel) -> EngineKind:
    """vLLM where it is installed and takes the model, else our own."""
    if base.is_split or importlib.util.find_spec("vllm") is None:
        return _own(base)
    from perfit_cloud.engine.generation.vllm.core import takes

    return _vllm(base) if takes(base) else _own(base)


def _own(base: BaseModel) -> EngineKind:
    """The continuous batch where the model's family can share one, else answers in batches."""
    return GenerationEngine if can_share(base) else BatchedEngine


_KINDS: dict[str, Callable[[BaseModel], EngineKind]] = {"auto": _auto, "own": _own, "vllm": _vllm}


def engine_kind(base: BaseModel, name: str = "auto", tensor_parallel: int = 1) -> EngineKind:
    """The engines of this name for this model. Raises ConfigError on an unknown name.

    With `tensor_parallel` over 1 also where that is not vLLM, or vLLM cannot divide the model.
    """
    if name not in _KINDS:
        raise ConfigError(f'there is no engine "{name}"; take one of {", ".join(_KINDS)}')
    if base.is_split and name.startswith("vllm"):
        raise ConfigError(
            f"engine {name} does not take a device_map; set engine to own, or leave out the map"
        )
    kind = _KINDS[name](base)
    if tensor_parallel > 1:
        if kind in {GenerationEngine, BatchedEngine}:
            raise ConfigError(
                f"tensor_parallel is vLLM's, and engine {name} is our own here; set engine to vllm"
            )
        _check_division(base, tensor_parallel)
    return kind


def _check_division(base: BaseModel, parts: int) -> None:
    """That vLLM's workers each get as much of every block. Raises ConfigError."""
    config = base.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "intermediate_size", None) or parts)
    # Where there are more workers than heads of keys, several have the same one.
    if heads % parts or max(groups, parts) % min(groups, parts) or width % parts:
        raise ConfigError(
            f"tensor_parallel is {parts}, which does not divide {base.name}: it has {heads} heads, {groups} "
            f"of keys, and blocks {width} wide"
        )
    if torch.cuda.is_available() and (cards := torch.cuda.device_count()) < parts:
        raise ConfigError(f"tensor_parallel is {parts}, and there are {cards} cards; take as many at most")


def build_engine(
    base: BaseModel,
    artefacts: Mapping[str, Artefact],
    settings: GenerationSettings,
    device_lock: DeviceLock | None = None,
    name: str = "auto",
) -> Engine:
    """An engine of `engine_kind`. All engines on the base's device share `device_lock`."""
    return engine_kind(base, name, settings.tensor_parallel)(base, artefacts, settings, device_lock)
