"""Where the parts of a model compute, once a `device_map` has split it over devices or put weights aside.

accelerate's hooks on the modules move what a module is called with to its device, and load weights that
are offloaded for as long as the module runs. They see tensors in arguments alone. What a pass takes along
otherwise (indices of rows, masks, shifts, known keys and values) is moved where it is used, by `.to`, which
costs nothing where it is already.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.accelerate import load_offloaded_parameter

from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import InvalidData

__all__ = ["Copies", "block_devices", "check_blocks_whole", "devices_of", "finish_split", "input_device"]
__all__ += ["is_split", "offloads", "shared_by_hooks", "weights_of"]


class Copies:
    """A tensor, and a copy of it on every other device that asked for one."""

    def __init__(self, tensor: Tensor) -> None:
        self._by_device = {tensor.device: tensor}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._by_device:
            self._by_device[device] = next(iter(self._by_device.values())).to(device)
        return self._by_device[device]


def is_split(model: Any) -> bool:
    """Whether accelerate's hooks run the model: over several devices, or with offloaded weights."""
    return hasattr(model, "_hf_hook")


def offloads(module: nn.Module) -> bool:
    """Whether weights of it lie elsewhere than where they compute, and are loaded for each pass."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def weights_of(model: Any) -> Iterator[Tensor]:
    """All weights, those that are offloaded too, one at a time."""
    for name, weight in model.named_parameters():
        yield load_offloaded_parameter(model, name) if weight.device.type == "meta" else weight


def input_device(model: Any) -> torch.device:
    """Where token ids go. A split model's logits come back to where its ids are."""
    if not is_split(model):
        return torch.device(model.device)
    return _device_of(model.get_input_embeddings())


def block_devices(model: Any) -> list[torch.device]:
    """Where each decoder block computes."""
    if not is_split(model):
        return [torch.device(model.device)] * len(block_list(model))
    return [_device_of(block) for block in block_list(model)]


def devices_of(model: Any) -> tuple[torch.device, ...]:
    """All that something of the model computes on, the one of the token ids first."""
    first = input_device(model)
    if not is_split(model):
        return (first,)
    found = {device for module in model.modules() if (device := _hooked_to(module)) is not None}
    return (first, *sorted(found - {first}, key=str))


def check_blocks_whole(name: str, model: Any) -> None:
    """Raises InvalidData on a block that computes on two devices: parts of blocks are run by themselves."""
    for number, block in enumerate(block_list(model)):
        found = {device for part in block.modules() if (device := _hooked_to(part)) is not None}
        if len(found) > 1:
            names = " and ".join(sorted(map(str, found)))
            raise InvalidData(
                f"{name}: the device map puts parts of block {number} on {names}; keep it whole"
            )


def finish_split(model: Any) -> None:
    """What our passes need of a model that accelerate has dispatched.

    - Rows whose logits are wanted have to be on the device of the hidden state; accelerate leaves them there.
    - A backward pass would keep every weight that was loaded for the forward pass. Blocks with such weights
      compute their activations again instead, so one block's weights are there at a time.
    """
    for hook in _hooks(model):
        hook.skip_keys = {*(hook.skip_keys or ()), "logits_to_keep"}
    for block in block_list(model):
        if offloads(block):
            block.forward = partial(_again_in_backward, block.forward)


def _again_in_backward(forward: Any, *args: Any, **more: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **more)
    # To the end: stopping early would leave the last weight loaded.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False, **more)


def shared_by_hooks(model: Any) -> list[Any]:
    """What the hooks of two module trees over one model's weights share: the weights put aside, above all."""
    found: list[Any] = []
    for module in model.modules():
        for hook in _hooks(module):
            weights = getattr(hook, "weights_map", None)
            found += [weights, getattr(weights, "dataset", None), getattr(hook, "tied_params_map", None)]
    return [each for each in found if each is not None]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _hooked_to(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module; None where it leaves that to the modules in it."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def _device_of(module: nn.Module) -> torch.device:
    found = (_hooked_to(each) for each in module.modules())
    return next((device for device in found if device is not None), torch.device("cpu"))
