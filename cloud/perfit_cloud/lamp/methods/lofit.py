"""LoFiT (Yin et al., 2024): a few attention heads are chosen, and a vector is added to what each gives.

A person's training has two parts. First a scaling of every head's output is learned, z ← (1 + A) ⊙ z, with
an L1 penalty on A; the heads are ranked by ‖A‖₂. Then A is dropped, and for the best heads a bias is
learned, z ← z + v, at every position, decoded ones included. The paper's settings choose 160 heads and
then take the 32 best of them, at most as many as the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.methods.adapters import AdapterMethod
from perfit_cloud.lamp.methods.added_weights import AddedWeights, Weights, WeightTraining, check_whole
from perfit_cloud.lamp.methods.interface import Done
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import InvalidInput

__all__ = ["Lofit"]

_RANKED, _BIASED = 160, 32  # heads
_L1 = 5e-3
_SCALING_RATE = 5e-3  # peak, of the authors' scripts
_START = 1e-3  # standard deviation that A and v start with
_OUTPUTS = ("o_proj", "out_proj", "dense")  # what attention ends with, by family


class HeadOutputs(nn.Module):
    """In front of a block's output projection: z ← (1 + A) ⊙ z + v of each of its heads, in float32."""

    def __init__(
        self, projection: nn.Module, block: int, scaling: nn.Parameter, bias: nn.Parameter, heads: Tensor
    ) -> None:
        """All blocks': `scaling` A (blocks, heads, D), and `bias` v (K, D) of `heads` (K, 2), block and head.

        A block of −1 is none.
        """
        super().__init__()
        self.projection, self.block = projection, block
        self.scaling, self.bias = scaling, bias
        self.register_buffer("heads", heads)

    def forward(self, z: Tensor) -> Any:
        own = self.heads[:, 0] == self.block  # type: ignore[index]
        scaling = self.scaling[self.block]
        bias = torch.zeros_like(scaling).index_put((self.heads[own, 1],), self.bias[own])  # type: ignore[index]
        moved = z.view(*z.shape[:-1], *scaling.shape).float() * (1 + scaling) + bias  # (…, heads, D)
        return self.projection(moved.flatten(-2).to(z.dtype))


class Lofit(AdapterMethod):
    name = "lofit"
    scaling: AddedWeights  # from `prepare` on, as `added`, which are the biases and their heads

    def prepare(self, stop: Callable[[], bool]) -> float:
        self.scaling, self.added = add_heads(self.data.base, biased=_BIASED, seed=self.request.seed)
        return self.choose_rate(stop)

    @property
    def settings(self) -> Mapping[str, Any]:
        shape = self.scaling.parameters["scaling"].shape
        heads = {"heads": len(self.added.buffers["heads"]), "ranked_heads": min(_RANKED, shape[0] * shape[1])}
        return {**super().settings, **heads, "l1": _L1, "scaling_learning_rate": _SCALING_RATE}

    @property
    def shared(self) -> Mapping[str, Weights | None]:
        return {"base": None}

    def learn(self, pairs: Sequence[Pair], rate: float, stepped: Done) -> list[WeightTraining]:
        """Both parts: which heads, and their biases."""
        choice = self._choose(pairs, stepped)
        return [choice, *super().learn(pairs, rate, stepped)]

    def _choose(self, pairs: Sequence[Pair], stepped: Done) -> WeightTraining:
        """Learn scalings of all heads, and leave behind only which heads they moved most."""
        scaling = self.scaling.parameters["scaling"]
        drawn = torch.Generator().manual_seed(self.request.seed)
        self.scaling.write({"scaling": _START * torch.randn(scaling.shape, generator=drawn)})
        schedule, penalty = self.schedule(pairs, _SCALING_RATE), partial(_penalty, scaling)
        training = WeightTraining(self.scaling, pairs, schedule, penalty=penalty)
        try:
            training.run(stepped)
            heads = ranked_heads(scaling.detach().cpu())[:_RANKED]
            self.added.write({**self.start, "heads": heads[: len(self.start["heads"])]})
        finally:
            self.scaling.write({"scaling": torch.zeros(scaling.shape)})
        return training

    def work(self, examples: int) -> int:
        return 2 * super().work(examples)


def _penalty(scaling: Tensor) -> Tensor:
    return _L1 * scaling.abs().sum()


def ranked_heads(scaling: Tensor) -> Tensor:
    """(block, head) of all heads (L · H, 2), those with the largest ‖A‖₂ first. `scaling`: (L, H, D)."""
    order = scaling.norm(dim=-1).flatten().argsort(descending=True, stable=True)
    return torch.stack((order // scaling.shape[1], order % scaling.shape[1]), dim=1)


def add_heads(base: BaseModel, *, biased: int, seed: int) -> tuple[AddedWeights, AddedWeights]:
    """(scalings of all heads, biases of at most `biased`), on one tree; none is chosen yet, so no change.

    Raises InvalidInput for a model without a linear projection behind its heads.
    """
    check_whole(base)
    model = base.share_weights()
    found = [_output(block, model) for block in block_list(model)]
    count = int(model.config.get_text_config().num_attention_heads)
    sizes = {getattr(parent, name).in_features // count for parent, name in found}
    if len(sizes) > 1:
        raise InvalidInput("the heads of this model's blocks have unlike sizes; LoFiT needs them alike")
    size, device = sizes.pop(), base.device
    biased = min(biased, _RANKED, len(found) * count)
    scaling = nn.Parameter(torch.zeros(len(found), count, size, device=device), requires_grad=False)
    drawn = torch.randn(biased, size, generator=torch.Generator().manual_seed(seed))
    bias = nn.Parameter((_START * drawn).to(device), requires_grad=False)
    heads = torch.full((biased, 2), -1, device=device)
    for block, (parent, name) in enumerate(found):
        setattr(parent, name, HeadOutputs(getattr(parent, name), block, scaling, bias, heads))
    adapted = replace(base, model=model.eval())
    return (
        AddedWeights(adapted, {"scaling": scaling}),
        AddedWeights(adapted, {"bias": bias}, buffers={"heads": heads}),
    )


def _output(block: nn.Module, model: Any) -> tuple[Any, str]:
    """(parent, name) of the projection behind the heads of a block."""
    for path, module in block.named_modules():
        *above, name = path.split(".")
        if name in _OUTPUTS and isinstance(module, nn.Linear) and any("att" in part for part in above):
            return block.get_submodule(".".join(above)), name
    raise InvalidInput(
        f"LoFiT moves what attention's heads give, and blocks of the family {model.config.model_type} have "
        "no linear projection behind them; take another model, or another method"
    )
