"""One optimizer step of stage 1 at Llama-2-7B's shapes, in numpy and in torch, on the CPU.

    python scripts/bench/optimizer.py --threads 1

Both shifts of a preset with random gradients. The two take turns; milliseconds are medians.
"""

from __future__ import annotations

import time

import common
import numpy as np
import torch
from workload import parser

from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.steps import trainable
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW
from perfit_shared.presets import preset_for
from perfit_shared.shifts import LayerShift, ShiftTensors

_RATE = 1e-4


class Sides:
    """Both optimizers over the shifts of one preset."""

    def __init__(self, preset: str) -> None:
        self.spec = spec = preset_for(preset).spec(blocks=32, hidden_size=4096)
        rng = np.random.default_rng(0)
        ranks = (spec.collective_rank, spec.personal_rank)
        self._shifts = [ShiftTensors.identity(spec, rank, seed) for seed, rank in enumerate(ranks)]
        self._gradients = [
            ShiftTensors(
                {
                    layer: LayerShift(
                        *(1e-3 * rng.standard_normal(a.shape).astype(np.float32) for a in arrays)
                    )
                    for layer, arrays in shift.layers.items()
                }
            )
            for shift in self._shifts
        ]
        self._optimizers = [StiefelAdamW(OptimizerConfig(_RATE, 1000)) for _ in ranks]
        self._leaves = [trainable(shift, torch.device("cpu")) for shift in self._shifts]
        self._optimizer = StiefelAdam(self._leaves)

    def numpy_step(self) -> float:
        """Seconds."""
        begun = time.perf_counter()
        both = zip(self._optimizers, self._shifts, self._gradients, strict=True)
        self._shifts = [optimizer.step(shift, gradient) for optimizer, shift, gradient in both]
        return time.perf_counter() - begun

    def torch_step(self) -> float:
        """Seconds."""
        for leaves, gradient in zip(self._leaves, self._gradients, strict=True):
            for layer, arrays in gradient.layers.items():
                for tensor, array in zip(leaves[layer], arrays, strict=True):
                    tensor.grad = torch.tensor(array).unsqueeze(0)
        begun = time.perf_counter()
        self._optimizer.step(_RATE)
        return time.perf_counter() - begun


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for preset in ("news_headline", "news_categorize", "movie_tagging"):
        sides = Sides(preset)
        found = common.interleaved({"numpy": sides.numpy_step, "torch": sides.torch_step}, pairs=args.pairs)
        ranks = f"{sides.spec.collective_rank}/{sides.spec.personal_rank}"
        medians = [1e3 * float(np.median(of)) for of in found.values()]
        rows.append([preset, len(sides.spec.layers), ranks, *medians])
    print(common.table(["preset", "layers", "ranks", "numpy, ms", "torch, ms"], rows))
    common.finish({"rows": rows}, args.json)


if __name__ == "__main__":
    main()
