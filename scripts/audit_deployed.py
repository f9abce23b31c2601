"""`perfit-cloud audit` of a server as it is deployed: a replica of a fleet, sealed calls, or both.

    python scripts/audit_deployed.py --replica --sealed --model build/tiny/model \\
        --artefact build/tiny/news_headline --quick

Sealing needs both sides in one process, and a replica a PostgreSQL, so it is a script and no options of the
command. A replica answers and updates; another process enrols, and is not searched (its log and state are).
Needs Linux, CAP_SYS_PTRACE, and for --replica Debian's package postgresql.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from local_postgres import Cluster
from perfit_cloud.audit.scenarios import ENDINGS, RPCS
from perfit_cloud.audit.server import DeviceKey
from perfit_cloud.cli.audit import audit_as
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud.sealed_channel import SealedChannel
from perfit_device.cloud.sealing import Sealer, Sealing
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services

_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replica", action="store_true", help="of a fleet with a PostgreSQL of its own")
    parser.add_argument("--sealed", action="store_true", help="calls, through perfit's own client")
    parser.add_argument("--model", required=True, help="as the command's, and all that follow")
    parser.add_argument("--artefact", required=True, type=Path)
    parser.add_argument("--rpc", action="append", choices=RPCS)
    parser.add_argument("--ending", action="append", choices=ENDINGS)
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", dest="as_json")
    options = vars(parser.parse_args(arguments))
    is_replica, is_sealed = options.pop("replica"), options.pop("sealed")
    with ExitStack() as running:
        database: Callable[[], str] | None = None
        if is_replica:
            cluster = Cluster()
            running.callback(cluster.close)
            database = cluster.database
        kept = audit_as(**options, sealed=sealed if is_sealed else None, database=database)
    return 0 if kept else 1


def sealed(channel: grpc.Channel, device: DeviceKey, server_ca: bytes) -> grpc.Channel:
    """What seals this device's calls, with its key from the channel's own cloud."""
    enrolment = Enrolment(Identity(device.key), device.certificate, server_ca, "", "", "")

    def keys() -> Any:
        stub: Any = services.PersonalizationStub(channel)
        return stub.Describe(pb.DescribeRequest(), timeout=_SECONDS).sealing_keys

    return SealedChannel(channel, Sealer(enrolment, Sealing(), keys))


if __name__ == "__main__":
    sys.exit(main())
