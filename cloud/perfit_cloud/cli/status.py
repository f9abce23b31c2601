"""`perfit-cloud status`: a glance at a cloud, from its own machine."""

from __future__ import annotations

import contextlib
import json
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_cloud.cli.authority import opened
from perfit_cloud.cli.common import ConfigFile, StateFolder
from perfit_cloud.config import CloudConfig, load_config, parse_address
from perfit_shared.errors import ConfigError, PerfitError
from perfit_shared.grpc_environment import prepare_grpc

if TYPE_CHECKING:
    from perfit_cloud.service.identity.authority import Authority
    from perfit_cloud.service.state_folder import Addresses

__all__ = ["status"]

_HEALTH_SECONDS = 5.0
_NO_ANSWER = "no answer"
_DAY = 86400
_EVERY = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


def status(
    check: Annotated[bool, typer.Option("--check", help="Fail unless the server answers SERVING.")] = False,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say at a glance whether the cloud answers, what it serves, for whom, and what ends when.

    perfit-cloud status

    perfit-cloud status --json --check
    """
    settings = load_config(file=config, flags={"state": state})
    with opened(settings) as authority:
        found = _found(authority, settings)
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))
    if check and found["health"] != "SERVING":
        raise PerfitError(
            f"the cloud does not serve: {found['health']}; see its log, or `perfit-cloud serve`"
        )


def _found(authority: Authority, config: CloudConfig) -> dict[str, Any]:
    from perfit_cloud.service.state_folder import SERVING, Addresses, is_served

    now, is_running = time.time(), is_served(config.state)
    addresses: Addresses | None = None
    with contextlib.suppress(ConfigError):  # no server has run yet
        addresses = Addresses.load(config.state)
    devices = authority.devices()
    return {
        "state": str(config.state),
        "health": _health(config, addresses, authority.server_ca_der) if is_running else "not running",
        "address": addresses and addresses.address,
        "enrol_address": addresses and addresses.enrol_address,
        **_serving(config.state / SERVING),
        "devices": {
            "welcome": sum(1 for d in devices if d.revoked is None and d.expires > now),
            "lapsed": sum(1 for d in devices if d.revoked is None and d.expires <= now),
            "revoked": sum(1 for d in devices if d.revoked is not None),
        },
        "open_invites": len(authority.open_invites()),
        "certificate_days_left": {
            name: round((end - now) / _DAY, 1) for name, end in authority.ends().items()
        },
    }


def _serving(path: Path) -> dict[str, Any]:
    """What the last start said of model and artefacts."""
    try:
        said = json.loads(path.read_text("utf-8"))
        return {key: said[key] for key in ("model", "fingerprint", "artefacts")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"model": None, "fingerprint": None, "artefacts": []}


def _health(config: CloudConfig, addresses: Addresses | None, server_ca: bytes) -> str:
    """What the standard health check says on the enrolment listener, which takes no certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    if addresses is None:
        return "starting"
    root = x509.load_der_x509_certificate(server_ca).public_bytes(Encoding.PEM)
    if config.proxy_networks:  # only balancers may connect
        return _ready(config)
    first, *_ = addresses.enrol_address.split(",")
    name, _ = parse_address(first)
    answer = _ask(first, name, root)
    if answer.startswith(_NO_ANSWER):
        # A public address need not be dialled from here; the server listens on this one, unless flags
        # say otherwise.
        host, port = parse_address(config.enrol_address)
        host = "127.0.0.1" if host in _EVERY else host
        answer = _ask(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", name, root)
    return answer


def _ready(config: CloudConfig) -> str:
    """What the operator's page says, for a server that takes connections from balancers alone."""
    from http.client import HTTPConnection

    if not config.metrics_address:
        return f"{_NO_ANSWER} (behind a balancer, status needs metrics_address)"
    host, port = parse_address(config.metrics_address)
    connection = HTTPConnection("127.0.0.1" if host in _EVERY else host, port, timeout=_HEALTH_SECONDS)
    try:
        connection.request("GET", "/ready")
        return "SERVING" if connection.getresponse().status == HTTPStatus.OK else "NOT_SERVING"
    except OSError:
        return f"{_NO_ANSWER} (metrics_address {config.metrics_address})"
    finally:
        connection.close()


def _ask(address: str, name: str, root: bytes) -> str:
    prepare_grpc()
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    options = [("grpc.ssl_target_name_override", name), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(root), options=options) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_HEALTH_SECONDS)
        except grpc.RpcError as error:
            return f"{_NO_ANSWER} ({error.code().name})"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def _lines(found: dict[str, Any]) -> list[str]:
    days = found["certificate_days_left"]
    devices = ", ".join(f"{count} {kind}" for kind, count in found["devices"].items())
    model = f"{found['model']} ({found['fingerprint'][:12]})" if found["model"] else "nothing served yet"
    return [
        f"{found['health']}  {found['address'] or 'no address yet'}"
        + (f", enrolment on {found['enrol_address']}" if found["enrol_address"] else ""),
        f"model         {model}",
        f"artefacts     {', '.join(found['artefacts']) or 'none'}",
        f"devices       {devices}",
        f"open invites  {found['open_invites']}",
        "days left     " + ", ".join(f"{name} {left:g}" for name, left in days.items()),
        f"state         {found['state']}",
    ]
