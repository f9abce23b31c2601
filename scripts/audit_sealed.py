"""The audit of a server whose devices seal their calls: `perfit-cloud audit`, through perfit's own client.

    python scripts/audit_sealed.py --model build/tiny/model --artefact build/tiny/news_headline --quick

It needs both sides in one process, so it is a script and no option of the command. Code 1 when something is
left after a call and its channel have ended, or a control fails. Needs Linux and CAP_SYS_PTRACE.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import torch

from perfit_cloud.audit.memory import check_allowed
from perfit_cloud.audit.reference import ReferenceEngines
from perfit_cloud.audit.rows import Row, passed
from perfit_cloud.audit.scenarios import ENDINGS, RPCS, Plan, audit
from perfit_cloud.audit.server import DeviceKey
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import load_base
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud.sealed_channel import SealedChannel
from perfit_device.cloud.sealing import Sealer, Sealing
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services

_SECONDS = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--artefact", required=True, type=Path, help="folder")
    parser.add_argument("--rpc", action="append", choices=RPCS, help="only this one; several times")
    parser.add_argument("--devices", type=int, default=16, help="at once, in the scenario of load")
    parser.add_argument("--quick", action="store_true", help="fewer calls, and no load")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what each look found")
    args = parser.parse_args()
    check_allowed()
    torch.set_num_threads(1)
    base = load_base(args.model, dtype=args.dtype)
    with tempfile.TemporaryDirectory(prefix="perfit-audit-") as folder:
        plan = Plan(
            model=args.model,
            artefact=args.artefact,
            folder=Path(folder),
            rpcs=args.rpc or RPCS,
            endings=ENDINGS,
            devices=args.devices,
            is_quick=args.quick,
            flags=("--threads", "1", "--dtype", args.dtype),
            sealed=sealed,
        )
        with ReferenceEngines(base, Artefact.load(args.artefact)) as reference:
            rows = audit(plan, reference, tell)
    if args.json is not None:
        args.json.write_text(
            json.dumps([asdict(row) for row in rows], indent=1, default=list) + "\n", "utf-8"
        )
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} looks at sealed calls, {len(faults)} faults")
    sys.exit(0 if passed(rows) else 1)


def sealed(channel: grpc.Channel, device: DeviceKey, server_ca: bytes) -> grpc.Channel:
    """What seals this device's calls, with its key from the channel's own cloud."""
    enrolment = Enrolment(Identity(device.key), device.certificate, server_ca, "", "", "")

    def keys() -> Any:
        stub: Any = services.PersonalizationStub(channel)
        return stub.Describe(pb.DescribeRequest(), timeout=_SECONDS).sealing_keys

    return SealedChannel(channel, Sealer(enrolment, Sealing(), keys))


def tell(row: Row) -> None:
    found = ", ".join(sorted(row.found)) or "nothing"
    print(
        f"{row.hardening:3} {row.rpc} {row.ending} {row.moment}: {found[:120]} {row.fault or ''}", flush=True
    )


if __name__ == "__main__":
    main()
