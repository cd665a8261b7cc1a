"""AdamP in four launches, whatever the number of tensors: kernels in Triton for CUDA.

A step reads and writes each weight's memory as rarely as AdamP allows: 40 bytes a weight, where the
batched operations of `adamp` move 284 (both counted, not measured on a GPU):

1. `_begin`: count the step; what follows from it is computed in float64, once a tensor.
2. `_moments`: read gradient, weight and both moments, write the moments; sums of each row (24).
3. `_decide`: whether the projection of a tensor fires, and on which view; from the sums alone.
4. `_apply`: read weight and moments, write the weight (16); move its average along, if there is
   one (8 more, where an update of its own reads and writes 32).

The projection needs no pass of its own: along a row p it takes p (p.u) / (|p| + eps)^2 off an
update u, and p.u is summed with the moments. Sums in another order than timm's give other last
bits. A row is what `adamp._update` calls one; each stands at one place in memory.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from wds_convnext.training.adamp import as_float64
from wds_convnext.training.ema import WeightAverage

BLOCK = 512  # elements of a row that are in flight at once: 128 threads with 16 bytes each
DECIDE_BLOCK = 1024  # rows
MAX_PROGRAMS = 128  # for one tensor

# Columns of the table, one row per tensor. Addresses and counts are int64 ...
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _STEP, _LR = (tl.constexpr(i) for i in range(6))
_FIRST_ROW, _NUM_ROWS, _ROW_SIZE, _IS_ALIGNED = (tl.constexpr(i) for i in range(6, 10))
_AVERAGE = tl.constexpr(10)  # 0: there is none
# ... and these are the bits of float64.
_BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _WD_RATIO = (tl.constexpr(i) for i in range(11, 16))
_AVERAGE_WEIGHT, _CHANNEL_LIMIT, _LAYER_LIMIT = (tl.constexpr(i) for i in range(16, 19))
_WIDTH = tl.constexpr(19)

# Columns of `scalars`, float32: what every element of a tensor needs.
_KEEP1, _ADD1, _KEEP2, _ADD2, _EPS32, _ROOT = (tl.constexpr(i) for i in range(6))
_STEP_SIZE, _DECAY, _DECAY_IF_FIRES, _GRAD_SCALE = (tl.constexpr(i) for i in range(6, 10))
_MOVE = tl.constexpr(10)
_NUM_SCALARS = tl.constexpr(11)

# Columns of `sums`, float32, a line for each row: products of gradient g, weight p and update u.
_GP, _GG, _PP, _PU = (tl.constexpr(i) for i in range(4))
_NUM_SUMS = tl.constexpr(4)


class Row(NamedTuple):
    """A parameter with its gradient, state and parameter group."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # int64, 0-d


def takes(row: Row) -> bool:
    """Whether the kernels know an update: plain AdamP, float32, one row after another in memory.

    Moments of a state dict may be laid out otherwise than their parameter.
    """
    group, param = row.group, row.param
    is_plain = not (group["nesterov"] or group["caution"])
    moments = row.exp_avg, row.exp_avg_sq
    return (
        is_plain
        and all(tensor.dtype == torch.float32 for tensor in (param, row.grad, *moments))
        and all(_is_alike(param, moment) for moment in moments)
        and _has_rows(param)
    )


def _is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape lie in the same order in memory."""
    if one.stride() == other.stride():
        return True
    pairs = zip(one.shape, one.stride(), other.stride())
    return all(mine == its for size, mine, its in pairs if size > 1)


def _has_rows(param: Tensor) -> bool:
    """Whether memory holds a tensor without gaps, its first dimension outermost."""
    dims = [i for i in range(param.ndim) if param.shape[i] > 1]
    dims.sort(key=param.stride, reverse=True)
    if param.ndim > 1 and 0 in dims and dims[0] != 0:
        return False
    expected = 1
    for i in reversed(dims):
        if param.stride(i) != expected:
            return False
        expected *= param.shape[i]
    return True


def update(
    rows: list[Row],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    average: WeightAverage | None = None,
) -> None:
    """Apply one step, in place, to tensors on one device, with what `AdamP` says of the rest."""
    device = rows[0].param.device
    # One value for each group, and what stays referred to until the kernels are queued.
    lrs = {id(row.group): as_float64(row.group["lr"], device) for row in rows}
    grads = [_laid_out_as(row.param, row.grad) for row in rows]
    scaling = [
        None if tensor is None else tensor.to(device, torch.float32, non_blocking=True)
        for tensor in (grad_scale, found_inf)
    ]
    averages = [_average_of(row.param, average) for row in rows]
    lines, num_rows = _table(
        rows,
        grads,
        [lrs[id(row.group)] for row in rows],
        averages,
        average_weight=0.0 if average is None else average.next_weight,
    )
    if average is not None:
        average.note_moved(row.param for row, own in zip(rows, averages) if own is not None)
    table = torch.tensor(lines, dtype=torch.int64, pin_memory=device.type == "cuda")
    ints = table.to(device, non_blocking=True)
    floats = ints.view(torch.float64)
    scalars = torch.empty(len(rows), _NUM_SCALARS.value, device=device)
    sums = torch.empty(sum(num_rows), _NUM_SUMS.value, device=device)
    grid = (min(max(num_rows), MAX_PROGRAMS), len(rows))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _begin[(len(rows),)](ints, floats, scalars, *scaling, num_warps=1)
        _moments[grid](ints, scalars, sums, scaling[1], BLOCK=BLOCK)
        _decide[(len(rows),)](ints, floats, scalars, sums, BLOCK=DECIDE_BLOCK)
        _apply[grid](ints, scalars, sums, scaling[1], BLOCK=BLOCK)


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient in its parameter's order in memory: 4 of convnext_base's 344 may have to move."""
    return grad if _is_alike(param, grad) else torch.empty_like(param).copy_(grad)


def _average_of(param: Tensor, average: WeightAverage | None) -> Tensor | None:
    """A parameter's average, if it has the parameter's type, device and order in memory."""
    own = None if average is None else average.of(param)
    if own is None or (own.dtype, own.device) != (param.dtype, param.device):
        return None
    return own if _is_alike(param, own) else None


def _table(
    rows: list[Row],
    grads: list[Tensor],
    lrs: list[Tensor],
    averages: list[Tensor | None],
    *,
    average_weight: float,
) -> tuple[list[list[int]], list[int]]:
    """The table's lines, and how many rows each tensor has."""
    lines, num_rows, first_row = [], [], 0
    for row, grad, lr, average in zip(rows, grads, lrs, averages):
        param, group = row.param, row.group
        count = param.shape[0] if param.ndim > 1 else 1
        size = param.numel() // count
        tensors = (param, grad, row.exp_avg, row.exp_avg_sq)
        places = [tensor.data_ptr() for tensor in tensors]
        average_at = 0 if average is None else average.data_ptr()
        is_aligned = size % 4 == 0 and all(place % 16 == 0 for place in [*places, average_at])
        limits = [-1.0, -1.0]  # no cosine is below: the projection never fires
        if param.ndim > 1:
            limits = [group["delta"] / math.sqrt(n) for n in (size, param.numel())]
        numbers = [*group["betas"], group["eps"], group["weight_decay"], group["wd_ratio"]]
        numbers += [average_weight, *limits]
        bits = np.array(numbers, np.float64).view(np.int64).tolist()
        counts = [first_row, count, size, int(is_aligned), average_at]
        lines.append([*places, row.step.data_ptr(), lr.data_ptr(), *counts, *bits])
        num_rows.append(count)
        first_row += count
    return lines, num_rows


@triton.jit
def _begin(ints, floats, scalars, grad_scale, found_inf):
    tensor = tl.program_id(0).to(tl.int64)
    ints += tensor * _WIDTH
    floats += tensor * _WIDTH
    scalars += tensor * _NUM_SCALARS
    count_at = tl.load(ints + _STEP).to(tl.pointer_type(tl.int64))
    count = tl.load(count_at) + 1
    if found_inf is None:
        tl.store(count_at, count)
    else:
        tl.store(count_at, tl.where(tl.load(found_inf) != 0, count - 1, count))
    lr = tl.load(tl.load(ints + _LR).to(tl.pointer_type(tl.float64)))
    beta1 = tl.load(floats + _BETA1)
    beta2 = tl.load(floats + _BETA2)
    decay = lr * tl.load(floats + _WEIGHT_DECAY)
    steps = count.to(tl.float64)
    # float64: 1 - beta**step cancels.
    correction1 = 1 - tl.exp(steps * tl.log(beta1))
    correction2 = 1 - tl.exp(steps * tl.log(beta2))
    tl.store(scalars + _KEEP1, beta1.to(tl.float32))
    tl.store(scalars + _ADD1, (1 - beta1).to(tl.float32))
    tl.store(scalars + _KEEP2, beta2.to(tl.float32))
    tl.store(scalars + _ADD2, (1 - beta2).to(tl.float32))
    tl.store(scalars + _EPS32, tl.load(floats + _EPS).to(tl.float32))
    tl.store(scalars + _ROOT, tl.sqrt(correction2).to(tl.float32))
    tl.store(scalars + _MOVE, tl.load(floats + _AVERAGE_WEIGHT).to(tl.float32))
    tl.store(scalars + _STEP_SIZE, (lr / correction1).to(tl.float32))
    tl.store(scalars + _DECAY, (1 - decay).to(tl.float32))
    tl.store(scalars + _DECAY_IF_FIRES, (1 - decay * tl.load(floats + _WD_RATIO)).to(tl.float32))
    if grad_scale is None:
        tl.store(scalars + _GRAD_SCALE, 1.0)
    else:
        tl.store(scalars + _GRAD_SCALE, tl.load(grad_scale))


@triton.jit
def _place(ints, COLUMN: tl.constexpr, VECTOR: tl.constexpr):
    """A tensor's address, of which the compiler is told what it is a multiple of, in bytes."""
    address = tl.multiple_of(tl.load(ints + COLUMN), 4 * VECTOR)
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * VECTOR)


@triton.jit
def _rows_to_do(ints, found_inf):
    """How many rows a tensor has; none in a step that is skipped."""
    num_rows = tl.load(ints + _NUM_ROWS)
    if found_inf is not None:
        num_rows = tl.where(tl.load(found_inf) != 0, 0, num_rows)
    return num_rows


@triton.jit
def _moments(ints, scalars, sums, found_inf, BLOCK: tl.constexpr):
    tensor = tl.program_id(1).to(tl.int64)
    ints += tensor * _WIDTH
    scalars += tensor * _NUM_SCALARS
    if tl.load(ints + _IS_ALIGNED) != 0:
        _moments_of_rows(ints, scalars, sums, found_inf, BLOCK, 4)
    else:
        _moments_of_rows(ints, scalars, sums, found_inf, BLOCK, 1)


@triton.jit
def _moments_of_rows(ints, scalars, sums, found_inf, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    param = _place(ints, _PARAM, VECTOR)
    grad = _place(ints, _GRAD, VECTOR)
    exp_avg = _place(ints, _EXP_AVG, VECTOR)
    exp_avg_sq = _place(ints, _EXP_AVG_SQ, VECTOR)
    size = tl.load(ints + _ROW_SIZE) // VECTOR * VECTOR  # so that the compiler sees a multiple
    keep1, add1 = tl.load(scalars + _KEEP1), tl.load(scalars + _ADD1)
    keep2, add2 = tl.load(scalars + _KEEP2), tl.load(scalars + _ADD2)
    root, eps = tl.load(scalars + _ROOT), tl.load(scalars + _EPS32)
    scale = tl.load(scalars + _GRAD_SCALE)
    for row in range(tl.program_id(0), _rows_to_do(ints, found_inf), tl.num_programs(0)):
        gp = tl.zeros((BLOCK,), tl.float32)
        gg = tl.zeros((BLOCK,), tl.float32)
        pp = tl.zeros((BLOCK,), tl.float32)
        pu = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            at = row * size + column
            g = tl.div_rn(tl.load(grad + at, inside, 0.0), scale)
            p = tl.load(param + at, inside, 0.0)
            m = tl.load(exp_avg + at, inside, 0.0) * keep1 + g * add1
            v = tl.load(exp_avg_sq + at, inside, 0.0) * keep2 + add2 * g * g
            tl.store(exp_avg + at, m, inside)
            tl.store(exp_avg_sq + at, v, inside)
            gp += g * p
            gg += g * g
            pp += p * p
            pu += p * _direction(m, v, root, eps)
        sums_of_row = sums + (tl.load(ints + _FIRST_ROW) + row) * _NUM_SUMS
        tl.store(sums_of_row + _GP, tl.sum(gp))
        tl.store(sums_of_row + _GG, tl.sum(gg))
        tl.store(sums_of_row + _PP, tl.sum(pp))
        tl.store(sums_of_row + _PU, tl.sum(pu))


@triton.jit
def _direction(m, v, root, eps):
    """The update before its projection, without the learning rate."""
    return tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)


@triton.jit
def _cosine(gp, gg, pp, eps):
    return tl.abs(gp) / (tl.maximum(tl.sqrt(gg), eps) * tl.maximum(tl.sqrt(pp), eps))


@triton.jit
def _along(pu, pp, eps):
    """The factor by which a weight is the component of the update along its row."""
    norm = tl.sqrt(pp) + eps
    return pu / (norm * norm)


@triton.jit
def _decide(ints, floats, scalars, sums, BLOCK: tl.constexpr):
    """Put the decay into `scalars`, and the factor of each row in the place of its p.u."""
    tensor = tl.program_id(0).to(tl.int64)
    ints += tensor * _WIDTH
    floats += tensor * _WIDTH
    scalars += tensor * _NUM_SCALARS
    sums += tl.load(ints + _FIRST_ROW) * _NUM_SUMS
    num_rows = tl.load(ints + _NUM_ROWS)
    eps = tl.load(scalars + _EPS32)
    cosines = tl.zeros((BLOCK,), tl.float32)
    gp = tl.zeros((BLOCK,), tl.float32)
    gg = tl.zeros((BLOCK,), tl.float32)
    pp = tl.zeros((BLOCK,), tl.float32)
    pu = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        of_row = sums + row * _NUM_SUMS
        row_gp = tl.load(of_row + _GP, inside, 0.0)
        row_gg = tl.load(of_row + _GG, inside, 0.0)
        row_pp = tl.load(of_row + _PP, inside, 0.0)
        cosines = tl.maximum(cosines, _cosine(row_gp, row_gg, row_pp, eps))
        gp += row_gp
        gg += row_gg
        pp += row_pp
        pu += tl.load(of_row + _PU, inside, 0.0)
    layer_pp = tl.sum(pp)
    layer_cosine = _cosine(tl.sum(gp), tl.sum(gg), layer_pp, eps)
    in_channels = tl.max(cosines) < tl.load(floats + _CHANNEL_LIMIT).to(tl.float32)
    in_layer = layer_cosine < tl.load(floats + _LAYER_LIMIT).to(tl.float32)
    if in_channels | in_layer:
        tl.store(scalars + _DECAY, tl.load(scalars + _DECAY_IF_FIRES))
    of_layer = tl.where(in_layer, _along(tl.sum(pu), layer_pp, eps), 0.0)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        of_row = sums + row * _NUM_SUMS
        of_channel = _along(
            tl.load(of_row + _PU, inside, 0.0), tl.load(of_row + _PP, inside, 0.0), eps
        )
        tl.store(of_row + _PU, tl.where(in_channels, of_channel, of_layer), inside)


@triton.jit
def _apply(ints, scalars, sums, found_inf, BLOCK: tl.constexpr):
    tensor = tl.program_id(1).to(tl.int64)
    ints += tensor * _WIDTH
    scalars += tensor * _NUM_SCALARS
    if tl.load(ints + _IS_ALIGNED) != 0:
        _apply_to_rows(ints, scalars, sums, found_inf, BLOCK, 4)
    else:
        _apply_to_rows(ints, scalars, sums, found_inf, BLOCK, 1)


@triton.jit
def _apply_to_rows(ints, scalars, sums, found_inf, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    param = _place(ints, _PARAM, VECTOR)
    exp_avg = _place(ints, _EXP_AVG, VECTOR)
    exp_avg_sq = _place(ints, _EXP_AVG_SQ, VECTOR)
    average = _place(ints, _AVERAGE, VECTOR)
    has_average = tl.load(ints + _AVERAGE) != 0
    size = tl.load(ints + _ROW_SIZE) // VECTOR * VECTOR
    step_size = tl.load(scalars + _STEP_SIZE)
    decay = tl.load(scalars + _DECAY)
    move = tl.load(scalars + _MOVE)
    root, eps = tl.load(scalars + _ROOT), tl.load(scalars + _EPS32)
    for row in range(tl.program_id(0), _rows_to_do(ints, found_inf), tl.num_programs(0)):
        along = tl.load(sums + (tl.load(ints + _FIRST_ROW) + row) * _NUM_SUMS + _PU)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            at = row * size + column
            p = tl.load(param + at, inside, 0.0)
            m = tl.load(exp_avg + at, inside, 0.0)
            v = tl.load(exp_avg_sq + at, inside, 0.0)
            update = _direction(m, v, root, eps) - p * along
            p = p * decay - step_size * update
            tl.store(param + at, p, inside)
            if has_average:
                a = tl.load(average + at, inside, 0.0)
                tl.store(average + at, a + (p - a) * move, inside)
