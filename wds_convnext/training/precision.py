"""Where a model under autocast departs from what torch does, for speed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn


def hand_on_half_precision(model: nn.Module) -> None:
    """Have ConvNeXt's blocks hand on half precision under autocast."""
    from timm.models.convnext import ConvNeXtBlock  # 1 s, see `create_model`

    for module in model.modules():
        if isinstance(module, ConvNeXtBlock):
            module.register_forward_hook(_to_autocast_dtype)


def _to_autocast_dtype(block: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Under autocast, hand a block's output on in half precision.

    The float32 LayerScale makes timm's output float32, and with it everything that the next
    blocks read and save for the backward pass. Scale and sum stay float32; a compiler rounds in
    the same pass over memory.
    """
    device_type = output.device.type
    # Not `torch.amp.is_autocast_available`, which cuts the graph at every block before torch 2.12.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return output.to(torch.get_autocast_dtype(device_type))
    return output


def keep_depthwise_in_float32(model: nn.Module) -> None:
    """Have depthwise convolutions compute in float32 under autocast on a CPU.

    oneDNN's matrix products and dense convolutions gain from bfloat16, its depthwise ones lose
    more: a step of convnext_atto was slower than in float32 (docs/benchmarks.md, "Half precision
    on a CPU").
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            # A partial of the bound method is copied and pickled with its module.
            module.forward = partial(_in_float32, module.forward)  # type: ignore[method-assign]


def _in_float32(
    forward: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor
) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(maps.float())
