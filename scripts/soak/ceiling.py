"""All limits full at once under a ceiling of memory: nothing is killed, and every honest call succeeds.

    sudo PYTHONPATH=scripts .venv/bin/python -m soak.ceiling --mib 2048 --json ceiling.json

A cloud runs in a control group of its own, which the kernel ends when it takes more than
the ceiling, and is told of the ceiling by `memory_bytes`. Devices fill every limit at the same time: all
updates there may be with all examples, all answers at full length, the line of gradients and scores, each
with all tokens there may be. Whoever is told to come back does. Ends with 1 when a call failed or the cloud
was killed. Needs root, for the control group.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.common import finish
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import Artefact, CloudInfo, ShiftUse
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Identity
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.retry import TRANSIENT
from perfit_device.history import HistoryItem, Split
from perfit_device.training.gradients import GradientSource
from perfit_shared.errors import PerfitError
from perfit_shared.invites import Invite
from perfit_shared.types import Sampling
from soak.attacking.common import serving

__all__ = ["main"]

_MIB = 2**20
_TEXT = "The council will decide on the new bridge over the river on Thursday, its speaker said. "
_PROMPT = _TEXT * 6  # some 250 tokens
_SETTINGS = {"adapt_examples": 100, "adapt_tokens": 32_768, "call_tokens": 16_384}
_UPDATERS, _ASKERS, _SCORERS = 8, 4, 4  # devices; two updates, 12 answers and four passes each
_PATIENCE = 600.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048, help="the ceiling")
    parser.add_argument("--without", action="store_true", help="do not tell the cloud of the ceiling")
    parser.add_argument("--code", type=Path, help="a checkout whose cloud serves instead of this one's")
    parser.add_argument("--json", type=Path, help="where the result goes")
    args = parser.parse_args(arguments)
    settings = _SETTINGS if args.without or args.code else _SETTINGS | {"memory_bytes": args.mib * _MIB}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with (
        tempfile.TemporaryDirectory() as folder,
        _group(args.mib * _MIB) as (prefix, peak),
        serving(Path(folder), code=args.code, flags=flags, prefix=prefix) as cloud,
    ):
        load = _Load(cloud.said, [cloud.invite() for _ in range(_UPDATERS + _ASKERS + _SCORERS)])
        load.run()
        ended = cloud.process.poll()
        result = {
            "ceiling_mib": args.mib,
            "peak_mib": peak() / _MIB,
            "seconds": load.seconds,
            "memory": {k: v / _MIB for k, v in cloud.said.get("memory", {}).items() if "_" not in k},
            "done": dict(load.done),
            "told_to_wait": dict(load.waits),
            "failed": load.failed,
            "server": "alive" if ended is None else f"ended with {ended}",
        }
    print(json.dumps(result, indent=1))
    if args.json is not None:
        finish(result, args.json)
    return 1 if load.failed or ended is not None else 0


class _Load:
    """All limits full, once."""

    def __init__(self, said: dict[str, Any], invites: Sequence[str]) -> None:
        self.done: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._enrolments = [enroll(Invite.decode(invite), Identity.create()) for invite in invites]

    def run(self) -> None:
        begun = time.monotonic()
        devices = iter(self._enrolments)
        work: list[tuple[str, Callable[[Cloud, CloudInfo], object], int]] = [
            *[("updates", self._update, 2)] * _UPDATERS,
            *[("answers", self._ask, 1)] * _ASKERS,
            *[("scores", self._score, 2)] * _SCORERS,
        ]
        threads = []
        for kind, act, times in work:
            enrolment = next(devices)
            for number in range(times):
                acts = [(kind, act)] if kind != "scores" else [(kind, act), ("gradients", self._gradient)]
                for name, each in acts:
                    threads.append(
                        threading.Thread(
                            target=self._until_done,
                            args=(name, each, enrolment),
                            daemon=True,
                            name=f"{name}{number}",
                        )
                    )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_PATIENCE + 60)
            if thread.is_alive():
                self.failed.append(f"{thread.name} hangs")
        self.seconds = time.monotonic() - begun

    def _until_done(self, kind: str, act: Callable[[Cloud, CloudInfo], object], enrolment: Any) -> None:
        end = time.monotonic() + _PATIENCE
        with Cloud(enrolment) as cloud:
            while True:
                try:
                    act(cloud, cloud.describe())
                except TRANSIENT as error:
                    with self._lock:
                        self.waits[f"{kind}: {type(error).__name__}"] += 1
                    if time.monotonic() < end:
                        time.sleep(max(0.5, error.retry_ms / 1000))
                        continue
                    self._fail(kind, error)
                except PerfitError as error:
                    self._fail(kind, error)
                else:
                    with self._lock:
                        self.done[kind] += 1
                return

    def _fail(self, kind: str, error: PerfitError) -> None:
        with self._lock:
            self.failed.append(f"{kind}: {type(error).__name__}: {error}")

    def _update(self, cloud: Cloud, info: CloudInfo) -> None:
        """All examples there may be, and steps over all of them and over few."""
        artefact = _headlines(info)
        items = [
            HistoryItem.make(artefact.task, {"text": _PROMPT[n % 40 :], "title": f"Bridge {n}"})
            for n in range(info.limits.adapt_examples)
        ]
        split = Split(tuple(items[:-1]), tuple(items[-1:]), ())
        tensors = cloud.fetch_seed(artefact)
        with GradientSource(cloud, artefact, info.limits, split) as source:
            for rows in (range(64), range(16)):
                source.gradient(rows, tensors)()

    def _ask(self, cloud: Cloud, info: CloudInfo) -> None:
        artefact = _headlines(info)
        use = ShiftUse(artefact, cloud.fetch_seed(artefact))
        sampling = Sampling(200, temperature=1.0, seed=1)
        ask_all(cloud, use, [(_PROMPT, sampling)] * info.limits.questions, in_flight=info.limits.questions)

    def _score(self, cloud: Cloud, info: CloudInfo) -> None:
        artefact = _headlines(info)
        cloud.score([(_PROMPT[:400], _PROMPT[:270])] * 40, ShiftUse(artefact, cloud.fetch_seed(artefact)))

    def _gradient(self, cloud: Cloud, info: CloudInfo) -> None:
        artefact = _headlines(info)
        cloud.compute_gradient([(_PROMPT[:400], _PROMPT[:270])] * 40, artefact, cloud.fetch_seed(artefact))


def _headlines(info: CloudInfo) -> Artefact:
    return next(artefact for artefact in info.artefacts if artefact.name == "news_headline")


@contextmanager
def _group(size: int) -> Iterator[tuple[list[str], Callable[[], int]]]:
    """A control group of so many bytes: the command that runs another in it, and the most it ever took."""
    root, limit, most = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"
    if not root.is_dir():
        root, limit, most = Path("/sys/fs/cgroup"), "memory.max", "memory.peak"
    group = root / f"perfit-ceiling-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(size), "ascii")
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        yield ["sh", "-c", enter, "sh"], lambda: int((group / most).read_text("ascii"))
    finally:
        group.rmdir()


if __name__ == "__main__":
    sys.exit(main())
