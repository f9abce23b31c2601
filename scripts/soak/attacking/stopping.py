"""A6: a cloud is told to stop while one device's calls run that take minutes.

PYTHONPATH=scripts .venv/bin/python -m soak.attacking.stopping --json stopping.json

Told are the seconds from SIGTERM to the end of the process, its exit code, and how long a call that was
nearly done when the signal came was let run: `drain_seconds` (5 here) are for that.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.common import finish, table
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_shared.errors import PerfitError
from perfit_shared.invites import Invite
from perfit_shared.types import Sampling
from soak.attacking.common import Attacker, serving
from soak.attacking.greedy import gradients

__all__ = ["run"]

_DRAIN_SECONDS = 5
_CALLS = 4
_UNDER_WAY_SECONDS = 3.0  # from the calls' beginning to SIGTERM
_PATIENCE = 240.0


def run(folder: Path, code: Path | None = None) -> dict[str, Any]:
    flags = ("--set", f"drain_seconds={_DRAIN_SECONDS}")
    with serving(folder, code=code, flags=flags) as cloud:
        hostile = _enrolled(cloud.invite())
        attacker = Attacker(hostile, cloud.process.pid)
        calls = [
            threading.Thread(target=gradients, args=(attacker,), daemon=True) for _ in range(_CALLS)
        ]  # each of 64 examples of 500 tokens
        for call in calls:
            call.start()
        time.sleep(_UNDER_WAY_SECONDS)
        with Cloud(_enrolled(cloud.invite())) as honest:
            answer = honest.generate("The council will", ShiftUse(), Sampling(100, temperature=2.0))
            next(answer)  # it is under way
            begun = time.monotonic()
            cloud.process.send_signal(signal.SIGTERM)
            try:
                for _ in answer:
                    pass
                said = "answered"
            except PerfitError as error:
                said = type(error).__name__
        try:
            exit_code: int | None = cloud.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            exit_code = None
        seconds = time.monotonic() - begun
        attacker.channel.close()
    return {"seconds": seconds, "exit_code": exit_code, "answer_under_way": said}


def _enrolled(invite: str) -> Enrolment:
    return enroll(Invite.decode(invite), Identity.create())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--code", type=Path, help="a checkout whose cloud is stopped instead of this one's")
    parser.add_argument(
        "--json", type=Path, help='where the result goes, as "before" with --code, else "after"'
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), args.code)
    print(table(tuple(found), [(f"{found['seconds']:.1f}", found["exit_code"], found["answer_under_way"])]))
    if args.json is not None:
        known = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
        finish({**known, "before" if args.code else "after": found}, args.json)
    return 0 if found["exit_code"] == 0 and found["seconds"] < _DRAIN_SECONDS + 10 else 1


if __name__ == "__main__":
    sys.exit(main())
