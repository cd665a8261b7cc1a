"""AdamP's step where the host reads for nothing: on a CPU, tensor by tensor, as timm's.

Bit for bit what `adamp` computes for stacks, with less work: the projection, which seldom fires, is
nearly always ruled out by the cosines of a few rows and by one dot product, and the rest of a step
is done in pieces that stay in the cache. See docs/benchmarks.md.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_PIECE = 2**15  # elements for each thread, the least that torch gives one: 0.6 MiB of five arrays
_NUM_ROWS = 8  # by which the channel view is ruled out
# How far a cosine may be off that is not computed as AdamP does it: relatively, and absolutely.
_RELATIVE, _ABSOLUTE = 1e-2, 4e-6


def update_on_host(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    group: dict[str, Any],
) -> None:
    """One step of one tensor, in place; `caution` and `nesterov` have to be off."""
    beta1, beta2 = group["betas"]
    lr, eps, weight_decay = float(group["lr"]), group["eps"], group["weight_decay"]
    step += 1
    correction1, root2 = _corrections(beta1, beta2, int(step))
    rows = _rows_that_fire(param, grad, delta=group["delta"], eps=eps) if param.ndim > 1 else None
    if rows is not None:
        weight_decay *= group["wd_ratio"]
    decay = 1 - lr * weight_decay

    def advance(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = exp_avg_sq.sqrt().div_(root2).add_(eps)
        torch.div(exp_avg, update, out=update)
        if rows is not None:
            update = _tangent(update, param, rows=rows, eps=eps)
        if group["weight_decay"] > 0:
            param.mul_(decay)
        param.add_(update, alpha=-(lr / correction1))

    tensors = param, grad, exp_avg, exp_avg_sq
    flat = _flat(*tensors) if rows is None else None
    size = _PIECE * torch.get_num_threads()
    if flat is None or param.numel() <= size:
        advance(*tensors)
    else:
        for pieces in zip(*(tensor.split(size) for tensor in flat), strict=True):
            advance(*pieces)


@lru_cache(maxsize=16)
def _corrections(beta1: float, beta2: float, step: int) -> tuple[float, float]:
    """Of the first moment, and the root of that of the second, with torch's functions."""
    t = torch.tensor(step, dtype=torch.float64)
    return (1 - beta1**t).item(), (1 - beta2**t).sqrt().item()


def _flat(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Views of tensors as they lie in memory, if all lie alike and without gaps."""
    first = tensors[0]
    if any(tensor.stride() != first.stride() for tensor in tensors):
        return None
    if first.is_contiguous():
        return tuple(tensor.view(-1) for tensor in tensors)
    if first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last):
        return tuple(tensor.permute(0, 2, 3, 1).reshape(-1) for tensor in tensors)
    return None


def _rows_that_fire(param: Tensor, grad: Tensor, *, delta: float, eps: float) -> int | None:
    """By how many rows the projection fires: those of the channel view, 1, or none."""
    for rows in (len(param), 1):
        threshold = delta / math.sqrt(param.numel() // rows)
        few = (param, grad) if rows == 1 else (param[:_NUM_ROWS], grad[:_NUM_ROWS])
        cosine, is_all = _about(*few, eps=eps, is_whole=rows == 1), rows <= _NUM_ROWS
        if cosine > threshold * (1 + _RELATIVE) + _ABSOLUTE:
            continue
        if is_all and cosine < threshold * (1 - _RELATIVE) - _ABSOLUTE:
            return rows
        # Too close to say, or all rows are needed: operation by operation as F.cosine_similarity.
        x, y = grad.reshape(rows, -1), param.reshape(rows, -1)
        x = x / x.norm(dim=1, keepdim=True).clamp_min(eps)
        y = y / y.norm(dim=1, keepdim=True).clamp_min(eps)
        if (x * y).sum(1).abs().amax() < threshold:
            return rows
    return None


def _about(param: Tensor, grad: Tensor, *, eps: float, is_whole: bool) -> float:
    """The largest |cosine| of rows, or that of the whole, about; NaN where it cannot be told."""
    if not is_whole:
        x, y = grad.reshape(len(grad), -1), param.reshape(len(param), -1)
        norms = x.norm(dim=1).clamp_min_(eps) * y.norm(dim=1).clamp_min_(eps)
        return float(((x * y).sum(1).abs_() / norms).amax())
    x, y = _flat(param, grad) or (param.reshape(-1), grad.reshape(-1))
    x_norm, y_norm = (max(math.sqrt(float(torch.dot(z, z))), eps) for z in (x, y))
    return abs(float(torch.dot(x, y))) / (x_norm * y_norm) if x_norm * y_norm else math.nan


def _tangent(update: Tensor, param: Tensor, *, rows: int, eps: float) -> Tensor:
    """The update without its component along each of the rows."""
    x, y = update.reshape(rows, -1), param.reshape(rows, -1)
    unit = y / (y.norm(dim=1, keepdim=True) + eps)
    return (x - unit * (unit * x).sum(1, keepdim=True)).view(param.shape)
