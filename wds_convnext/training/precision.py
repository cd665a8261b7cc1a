"""Where a model under autocast departs from what torch does, for speed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# How convolutions are computed, a fact of each run: torch's way, or ours under autocast on a CPU.
TORCHS_CONVOLUTIONS = "torch's"
CPU_CONVOLUTIONS = "depthwise in float32, weight gradients over rows of images"

# Where rows of images are faster: maps up to so wide, at least so many images and channels.
_SMALL, _BATCH, _CHANNELS = 10, 32, 128
_WIDE = 64  # pixels of such a row; of 32: as fast for maps 7 wide, a third slower for 3


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


def fit_convolutions_to_a_cpu(model: nn.Module) -> None:
    """Have convolutions compute, under autocast, as is faster on a CPU with AMX.

    Depthwise ones in float32: oneDNN's matrix products and dense convolutions gain from bfloat16,
    its depthwise ones lose more, so that a step of convnext_atto was slower than in float32.

    Dense ones of small maps find the gradients of their weights with images laid side by side:
    oneDNN sums these along one row of a map at a time. A tile of AMX sums 32 pixels at once, of
    which a row of 7 fills a fifth, one of 3 a tenth. What is summed stays the same.

    Times: docs/benchmarks.md, "Half precision on a CPU". Without AMX the second takes longer by up
    to a tenth; the first was not measured there.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or "forward" in vars(module):
            continue
        # A partial of the bound method is copied and pickled with its module.
        if 1 < module.groups == module.in_channels:
            module.forward = partial(_in_float32, module.forward)  # type: ignore[method-assign]
        elif type(module) is nn.Conv2d and _is_dense_and_keeps_size(module):
            module.forward = partial(_by_rows, module, module.forward)  # type: ignore[method-assign]


def _in_float32(
    forward: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor
) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(maps.float())


def _is_dense_and_keeps_size(conv: nn.Conv2d) -> bool:
    """Whether it mixes many channels and looks around each place, at zeros outside the map."""
    return (
        conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= _CHANNELS
        and conv.stride == conv.dilation == (1, 1)
        and all(side % 2 for side in conv.kernel_size)
        and conv.padding == tuple(side // 2 for side in conv.kernel_size) != (0, 0)
        and conv.padding_mode == "zeros"
    )


def _by_rows(
    conv: nn.Conv2d, forward: Callable[[torch.Tensor], torch.Tensor], maps: torch.Tensor
) -> torch.Tensor:
    are_small = maps.dim() == 4 and maps.shape[-1] <= _SMALL and len(maps) >= _BATCH
    if not are_small or not torch.is_autocast_enabled("cpu"):
        return forward(maps)
    dtype = torch.get_autocast_dtype("cpu")
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return _SummedOverRows.apply(maps.to(dtype), conv.weight.to(dtype), bias)


class _SummedOverRows(torch.autograd.Function):
    """A convolution that keeps the size of its maps, (B, C, H, W) -> (B, D, H, W)."""

    @staticmethod
    def forward(
        ctx: Any, maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(maps, weight)
        return F.conv2d(maps, weight, bias, padding=_padding(weight))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        of_maps, of_weight, of_bias = ctx.needs_input_grad
        backward = partial(
            torch.ops.aten.convolution_backward,
            bias_sizes=[len(weight)],
            stride=[1, 1],
            padding=_padding(weight),
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
        )
        # Of the bias's gradient oneDNN makes that of the weights, too, so it is asked for once.
        mask = [of_maps, False, of_bias and not of_weight]
        first = backward(gradient, maps, weight, output_mask=mask)
        if not of_weight:
            return first[0], None, first[2]
        rows = [_side_by_side(tensor, weight.shape[-1] // 2) for tensor in (gradient, maps)]
        second = backward(*rows, weight, output_mask=[False, True, of_bias])
        return first[0], second[1], second[2]


def _padding(weight: torch.Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


def _side_by_side(maps: torch.Tensor, gap: int) -> torch.Tensor:
    """Maps (B, C, H, W) as fewer and wider ones, channels last, with zeros right of each map."""
    count = max(1, _WIDE // (maps.shape[-1] + gap))
    maps = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 0, gap, 0, 0, 0, -len(maps) % count))
    return maps.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3).permute(0, 3, 1, 2)
