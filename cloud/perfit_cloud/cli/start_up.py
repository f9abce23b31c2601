"""From settings to what a server puts on the network: artefacts, the model, a memory plan, and engines.

It imports torch and transformers, so import it only to serve, once the process is hardened.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import torch

from perfit_cloud.cli.roles import issuer_of, sealing_keys
from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.factory import engine_kind
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.interface import EngineKind, GenerationSettings
from perfit_cloud.hardening.allocator import cache_at_most, return_free_memory
from perfit_cloud.hardening.process import Hardening
from perfit_cloud.hardening.scrubber import MemoryScrubber
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.packed import packed_bytes
from perfit_cloud.model.placement import Placement
from perfit_cloud.model.shipped import shipped_for
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.memory import MemoryPlan, kept_bytes, machine_bytes, plan_memory, resident_bytes
from perfit_cloud.service.settings import ServerParts
from perfit_cloud.service.signatures import check_signature
from perfit_cloud.service.telemetry import Engines
from perfit_shared.errors import ConfigError

__all__ = ["load_artefacts", "load_parts", "with_torch"]

_log = logging.getLogger(__name__)
# Libraries whose messages may quote what they work on: prompts, as ids or text.
_QUOTING_LIBRARIES = ("transformers",)
_MIB = 2**20
_MOST_PACKED = 1 / 8  # of the memory that there is, for weights packed beside those as they are


def load_parts(config: CloudConfig, authenticator: Authenticator) -> tuple[ServerParts, MemoryScrubber]:
    """All that is loaded, not started yet, and what overwrites its memory after calls.

    Raises PerfitError on settings, files or memory that will not do.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    artefacts = load_artefacts(config)
    base = _load_model(config)
    catalog = Catalog.build(config, base, artefacts or shipped_for(base.fingerprint), authenticator.cloud_id)
    # Who answers nobody needs no copy of the weights for it.
    answers = "answers" in config.roles
    kind = engine_kind(base, *((config.engine, config.tensor_parallel) if answers else ("own",)))
    machine = machine_bytes()
    memory, packs = _planned(config, catalog, kind, machine, may_pack=answers)
    cache_at_most(memory.freed)
    settings = GenerationSettings(
        cache_tokens=memory.cache_tokens,
        batch_tokens=config.batch_tokens,
        max_requests=config.max_requests,
        alone=config.apart == "bits",
        tensor_parallel=config.tensor_parallel,
        pack_weights=packs,
    )
    device_lock = DeviceLock()
    generation = kind(base, catalog.artefacts, settings, device_lock)
    # Where the model is on the host, it is all one memory.
    is_host = base.device.type == "cpu"
    updates = UpdateEngine(
        base,
        keep_bytes=memory.kept if is_host else kept_bytes(config, base.devices, machine),
        spill_bytes=0 if is_host else memory.kept,
        device_lock=device_lock,
        pass_tokens=memory.pass_tokens,
        parts=config.adaptations if config.apart == "bits" else 0,
    )
    scheduler = GradientScheduler(
        updates,
        waiting=config.adaptations + 1 + config.gradient_waiting,
        retry_ms=config.retry_ms,
        alone=config.apart == "bits",
    )
    scrubber = MemoryScrubber(base.devices, device_lock)
    parts = ServerParts(
        authenticator=authenticator,
        issuer=issuer_of(authenticator),
        catalog=catalog,
        generation=generation,
        scheduler=scheduler,
        memory=memory,
        roles=config.roles,
        engines=Engines(generation, scheduler, updates, device_lock),
        ended=scrubber.call_ended,
        sealing_keys=sealing_keys(authenticator, config),
    )
    return parts, scrubber


def _planned(
    config: CloudConfig, catalog: Catalog, kind: EngineKind, machine: int, *, may_pack: bool
) -> tuple[MemoryPlan, bool]:
    """What each part of the process gets, and whether the engine packs weights. Raises ConfigError."""
    base, resident = catalog.base, resident_bytes()
    copied = kind.weight_bytes(base, config.tensor_parallel)
    if copied:
        _log.info("vLLM has a copy of the weights of its own: %d MiB", copied // _MIB)
    packed = packed_bytes(base.model) if kind.packs and may_pack else 0
    if 0 < packed <= _MOST_PACKED * min(machine, config.memory_bytes or machine):
        with contextlib.suppress(ConfigError):  # the ceiling has no room for them
            process = resident + packed
            plan = plan_memory(config, catalog, process=process, continuous=kind.continuous, machine=machine)
            _log.info("weights are packed for faster decoding: %d MiB more", packed // _MIB)
            return plan, True
    process = resident + copied
    return plan_memory(config, catalog, process=process, continuous=kind.continuous, machine=machine), False


def load_artefacts(config: CloudConfig) -> list[Artefact]:
    """Those that the settings name. Raises InvalidData on one that is not as it was signed."""
    folders = [Path(folder).expanduser() for folder in config.artefacts]
    if config.artefact_key:
        for folder in folders:
            check_signature(folder, Path(config.artefact_key).expanduser())
    return [Artefact.load(folder) for folder in folders]


def _load_model(config: CloudConfig) -> BaseModel:
    """The model, without the memory that its loading took beside it."""
    cache_at_most(0)  # what is freed meanwhile has not the sizes of what passes make
    placement = Placement(config.device_map, config.max_memory, config.state / "offload")
    base = load_base(config.model, dtype=config.dtype, device=config.device, placement=placement)
    return_free_memory()
    for name in _QUOTING_LIBRARIES:  # after loading, which sets a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return base


def with_torch(hardening: Hardening, scrubber: MemoryScrubber) -> Hardening:
    """What holds now that torch is there; logs what does not, and the help."""
    held = replace(hardening, overwrites_stacks=scrubber.overwrites_stacks())
    if not held.overwrites_stacks:
        _log.warning(
            "threads that multiply matrices keep copies of them on their stacks until those are used again; "
            "serve with a C compiler at hand, or with one thread (--threads 1)"
        )
    if held.overwrites_freed and not scrubber.overwrites_tensors():
        held = replace(held, overwrites_freed=False)
        _log.warning(
            "this build of torch has an allocator of its own, so traces of tensors stay in memory until it "
            "is used again; serve with a build that takes its memory from glibc"
        )
    return held
