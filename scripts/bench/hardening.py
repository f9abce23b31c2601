"""What hardening costs: the latency of single calls to a cloud with it and to one without.

    python scripts/bench/hardening.py --model ../shared/models/newslm --json docs/results/bench/hardening.json

Two real `perfit-cloud serve` processes over mutual TLS, one with `hardening=on` (how it starts unless told
otherwise) and one with `hardening=off`, on the same model with a random artefact. A device calls them in
turns, one call after another, so that what else the machine does falls on both alike: an answer of 16
tokens to a prompt of about 60 words, log-likelihoods of 4 candidates, the gradient of 8 examples; the
tensors travel with each. The hardened cloud sweeps every two seconds meanwhile, as under any load. The
ratio is that of hardening over none, its median over pairs of calls.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from workload import artefact_for, load_model, parser

from perfit_cloud.model.base import load_base
from perfit_device.cloud import Cloud
from perfit_device.codec import Sampling, ShiftUse
from perfit_device.enrolment import enroll
from perfit_device.identity import Identity
from perfit_shared.invites import Invite

sys.path.append(str(Path(__file__).resolve().parents[1]))
from local import LocalCloud

_SETTINGS = ("on", "off")
_WORDS = ["the", "council", "said", "prices", "rose", "after", "rain", "on", "monday", "nobody", "paid"]


class Caller:
    """A device and one cloud; every method is one call."""

    def __init__(self, cloud: LocalCloud, stack: ExitStack) -> None:
        enrolment = enroll(Invite.decode(cloud.invite()), Identity.create())
        self._cloud = stack.enter_context(Cloud(enrolment))
        (self._artefact,) = self._cloud.describe().artefacts
        self._shift = self._cloud.fetch_seed(self._artefact)
        rng = np.random.default_rng(0)
        self._texts = [" ".join(rng.choice(_WORDS, 60)) for _ in range(8)]

    def answer(self) -> None:
        use = ShiftUse(self._artefact, self._shift)
        for _ in self._cloud.generate(self._texts[0], use, Sampling(16)):
            pass

    def score(self) -> None:
        pairs = [(self._texts[0], answer) for answer in ("red", "old", "big", "new")]
        self._cloud.score(pairs, ShiftUse(self._artefact, self._shift))

    def gradient(self) -> None:
        examples = [(text, "nobody paid") for text in self._texts]
        self._cloud.compute_gradient(examples, self._artefact, self._shift)


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(pairs=150)
    args = made.parse_args()
    pairs = 2 if args.small else args.pairs
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model, artefact = Path(folder) / "model", Path(folder) / "artefact"
        base = load_model(args)
        base.model.save_pretrained(model)
        base.tokenizer.save_pretrained(model)
        artefact_for(load_base(str(model))).save(artefact)
        callers = {
            setting: Caller(
                stack.enter_context(LocalCloud(
                    model, [artefact], Path(folder) / setting / "state",
                    flags=["--set", f"hardening={setting}", "--threads", str(args.threads)],
                )),
                stack,
            )
            for setting in _SETTINGS
        }  # fmt: skip
        rows = [
            measure(kind, {name: getattr(caller, kind) for name, caller in callers.items()}, pairs)
            for kind in ("answer", "score", "gradient")
        ]
    print(common.table(
        ["call", "hardened, ms", "not, ms", "hardened over not [95 %]"],
        [[r["call"], r["on_ms"], r["off_ms"], common.Ratio(r["ratio"], *r["interval"])] for r in rows],
    ))  # fmt: skip
    common.finish({"model": base.name, "rows": rows}, args.json)


def measure(kind: str, sides: dict[str, Callable[[], None]], pairs: int) -> dict[str, Any]:
    def timed(call: Callable[[], None]) -> float:
        """Seconds."""
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    seconds = common.interleaved(
        {name: lambda call=call: timed(call) for name, call in sides.items()}, pairs=pairs, warm_up=5
    )
    ratio = common.ratio(seconds["on"], seconds["off"])
    return {
        "call": kind, "on_ms": 1000 * median(seconds["on"]), "off_ms": 1000 * median(seconds["off"]),
        "ratio": ratio.median, "interval": [ratio.low, ratio.high],
    }  # fmt: skip


if __name__ == "__main__":
    main()
