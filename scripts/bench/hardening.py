"""What hardening costs: the latency of single calls to a cloud with it and to one without.

    python scripts/bench/hardening.py --model ../shared/models/newslm --json docs/results/bench/hardening.json

Two real `perfit-cloud serve` processes over mutual TLS, one with `hardening=on` (how it starts unless told
otherwise) and one with `hardening=off`, on the same model with a random artefact. A device calls them in
turns, one call after another, so that what else the machine does falls on both alike: an answer of 16
tokens to a prompt of about 60 words, log-likelihoods of 4 candidates, the gradient of 8 examples; the
tensors travel with each. The hardened cloud sweeps every two seconds meanwhile, as under any load. The
ratio is that of hardening over none: of the medians of both over the calls of one start of the clouds, and
of those the median over starts, for a process is a few per cent faster or slower from its start to its end.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from workload import artefact_for, load_model, parser

from perfit_cloud.model.base import load_base
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Identity
from perfit_shared.invites import Invite
from perfit_shared.types import Sampling

sys.path.append(str(Path(__file__).resolve().parents[1]))
from local import LocalCloud

_SETTINGS = ("on", "off")
_KINDS = ("answer", "score", "gradient")
_WORDS = ["the", "council", "said", "prices", "rose", "after", "rain", "on", "monday", "nobody", "paid"]


class Caller:
    """A device and one cloud; answer, score and gradient are one call each."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        (self._artefact,) = self._cloud.describe().artefacts
        self._shift = self._cloud.fetch_seed(self._artefact)
        rng = np.random.default_rng(0)
        self._texts = [" ".join(rng.choice(_WORDS, 60)) for _ in range(8)]

    def answer(self) -> None:
        use = ShiftUse(self._artefact, self._shift)
        for _ in self._cloud.generate(self._texts[0], use, Sampling(16)):
            pass

    def request_bytes(self) -> int:
        """Of an answer's request."""
        before = self._cloud.bytes_up
        self.answer()
        return self._cloud.bytes_up - before

    def score(self) -> None:
        pairs = [(self._texts[0], answer) for answer in ("red", "old", "big", "new")]
        self._cloud.score(pairs, ShiftUse(self._artefact, self._shift))

    def gradient(self) -> None:
        examples = [(text, "nobody paid") for text in self._texts]
        self._cloud.compute_gradient(examples, self._artefact, self._shift)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--starts", type=int, default=7, help="of both clouds")
    made.set_defaults(pairs=30)
    args = made.parse_args()
    starts, pairs = (2, 2) if args.small else (args.starts, args.pairs)
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in _SETTINGS} for kind in _KINDS}
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        base = load_model(args)
        base.model.save_pretrained(folder / "model")
        base.tokenizer.save_pretrained(folder / "model")
        artefact_for(load_base(str(folder / "model"))).save(folder / "artefact")
        for number in range(starts):
            with ExitStack() as stack:
                callers = {
                    name: enrolled(cloud_of(folder, name, number, args.threads, stack), stack)
                    for name in _SETTINGS[:: 1 if number % 2 else -1]
                }
                for kind in _KINDS:
                    for name, median_seconds in measure(kind, callers, pairs).items():
                        seconds[kind][name].append(median_seconds)
    rows = [row_of(kind, seconds[kind]) for kind in _KINDS]
    print(
        common.table(
            ["call", "hardened, ms", "not, ms", "hardened over not [95 %]"],
            [[r["call"], r["on_ms"], r["off_ms"], common.Ratio(r["ratio"], *r["interval"])] for r in rows],
        )
    )
    common.finish({"model": base.name, "rows": rows}, args.json)


def enrolled(cloud: LocalCloud, stack: ExitStack) -> Caller:
    enrolment = enroll(Invite.decode(cloud.invite()), Identity.create())
    return Caller(stack.enter_context(Cloud(enrolment)))


def cloud_of(folder: Path, setting: str, number: int, threads: int, stack: ExitStack) -> LocalCloud:
    flags = ["--set", f"hardening={setting}", "--threads", str(threads)]
    state = folder / f"{setting}-{number}" / "state"
    return stack.enter_context(LocalCloud(folder / "model", [folder / "artefact"], state, flags=flags))


def measure(kind: str, callers: dict[str, Caller], pairs: int) -> dict[str, float]:
    """Median seconds of a call, by setting."""

    calls = {name: partial(common.timed, getattr(caller, kind)) for name, caller in callers.items()}
    return {name: median(s) for name, s in common.interleaved(calls, pairs=pairs, warm_up=5).items()}


def row_of(kind: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratio = common.ratio(seconds["on"], seconds["off"])
    return {
        "call": kind,
        "on_ms": 1000 * median(seconds["on"]),
        "off_ms": 1000 * median(seconds["off"]),
        "ratio": ratio.median,
        "interval": [ratio.low, ratio.high],
    }


if __name__ == "__main__":
    main()
