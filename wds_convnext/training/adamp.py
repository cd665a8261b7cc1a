"""AdamP that never waits for the device, and the parameter groups of a model.

timm's AdamP loops over tensors and branches twice per tensor on a value that lies on the device.
Here the branch is a `torch.where`, and tensors of one shape are updated together: a step of
convnext_base is 1,919 operations and no synchronization (timm: 6,636 and 226).

On a CPU, where the branch costs nothing and saves work, `adamp_host` takes the step.
Dropped: both cosines from one dot product, which rounds otherwise at the threshold; moments stacked
and copied back, two more passes over each. On CUDA `adamp_triton` takes over float32 tensors, if
Triton is installed: the operations here move 284 bytes a weight, its kernels 40. Not measured: any
of this on a GPU.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wds_convnext.training.adamp_host import update_on_host
from wds_convnext.training.compiler import has_c_compiler
from wds_convnext.training.ema import WeightAverage

# The largest stack, in elements: what stays in a CPU's cache; elsewhere a bound on memory, 64 MiB
# of float32 for each temporary.
MAX_STACK = {"cpu": 2**16}
MAX_STACK_DEFAULT = 2**24
HOST_DEVICES = ("cpu",)  # where reading a value costs nothing
KERNEL_DEVICES = {"cuda"}  # where `adamp_triton` takes over what it can


class AdamP(Optimizer):
    """timm's AdamP, batched and without a host synchronization.

    Arguments, defaults, group keys and state dicts are timm's. In eager float32 on one CPU
    thread the results are timm's bit for bit; more threads or a compiler change the order of
    sums, and so the last bits. In float64 a bias correction may round otherwise: its square root
    is torch's, timm's is Python's. Empty tensors, on which timm raises, stay as they are.

    `torch.compile(optimizer.step, fullgraph=True)` works. There, and in a CUDA graph, set `lr` to
    a 0-d float64 tensor on the device of the parameters and change it in place: a float is a
    constant to a capture. Run one step before a capture, so that the state exists.

    As torch's fused optimizers do, `step` reads two attributes that GradScaler, or the caller,
    may set to one-element tensors: gradients are divided by `grad_scale`; where `found_inf` is
    not zero, parameters, moments and step counts stay as they are, whatever the gradients. A third,
    `average`, may be the `WeightAverage` of the parameters: where kernels take a step they move it.

    Args:
        lr: float or 0-d tensor.
        delta: the projection fires where |cosine(gradient, parameter)| < delta / sqrt(size).
        wd_ratio: factor on the weight decay of a tensor whose projection fires.
        caution: mask updates that point against the gradient (arXiv:2411.16085).
    Source: Heo et al. 2021, arXiv:2006.08217; timm/optim/adamp.py.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves the skip to `found_inf`
    found_inf: Tensor
    average: WeightAverage | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        caution: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "caution": caution,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        """Restore a pickle, a copy or a state dict; step counts return to the device."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("caution", False)
        for p, p_state in self.state.items():
            if "step" in p_state:
                p_state["step"] = torch.tensor(int(p_state["step"]), device=p.device)

    def state_dict(self) -> dict:
        """The state dict in timm's format: `step` is an int (this waits for the device)."""
        state_dict = super().state_dict()
        state_dict["state"] = {
            index: p_state | {"step": int(p_state["step"])} if "step" in p_state else p_state
            for index, p_state in state_dict["state"].items()
        }
        return state_dict

    # torch.compile knows this name: it calls the method instead of tracing it.
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Append the group's tensors that have a gradient, and their state, to the lists."""
        for p in group["params"]:
            if p.grad is None or p.numel() == 0:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])

    def _is_for_host(self, group: dict[str, Any], rows: list[tuple[Tensor, ...]]) -> bool:
        """Whether the group's step reads values, which costs nothing on a CPU."""
        return (
            all(row[0].device.type in HOST_DEVICES for row in rows)
            and not (group["caution"] or group["nesterov"])
            and getattr(self, "grad_scale", None) is None
            and not torch.compiler.is_compiling()
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        by_kernels: dict[torch.device, list] = defaultdict(list)
        for group in self.param_groups:
            columns: tuple[list[Tensor], ...] = [], [], [], [], []
            self._init_group(group, *columns)
            rows = list(zip(*columns))
            if not torch.compiler.is_compiling():  # it makes kernels of its own
                rows = _leave_to_kernels(group, rows, by_kernels)
            if self._is_for_host(group, rows):
                if found_inf is None or not found_inf:
                    for row in rows:
                        update_on_host(*row, group=group)
                continue
            for batch in _batches_of_one_shape(rows):
                _update(*zip(*batch), group=group, grad_scale=grad_scale, found_inf=found_inf)
        for device, taken in by_kernels.items():
            _kernels(device).update(
                taken, grad_scale=grad_scale, found_inf=found_inf, average=self.average
            )
        return loss


@cache
def _kernels(device: torch.device) -> Any:
    """The module `adamp_triton` where a device can run it, else None.

    Triton starts kernels with code of a C compiler, and is made for compute capability 8.0 on.
    """
    if device.type not in KERNEL_DEVICES:
        return None
    # Tensors can claim to be on CUDA where no device is: to be counted, not computed.
    if device.type == "cuda" and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        return None
    if not has_c_compiler():
        return None
    try:
        from wds_convnext.training import adamp_triton
    except ImportError:
        return None
    return adamp_triton


def _leave_to_kernels(
    group: dict[str, Any], rows: list[tuple[Tensor, ...]], by_device: dict[torch.device, list]
) -> list[tuple[Tensor, ...]]:
    """Add a group's rows that kernels can update to those of their device; gives the others."""
    others = []
    for row in rows:
        param = row[0]
        kernels = _kernels(param.device)
        # A CUDA graph would keep the addresses of the step in which it was captured.
        is_captured = kernels and param.is_cuda and torch.cuda.is_current_stream_capturing()
        if kernels and not is_captured and kernels.takes(taken := kernels.Row(group, *row)):
            by_device[param.device].append(taken)
        else:
            others.append(row)
    return others


def _batches_of_one_shape(
    rows: Iterable[tuple[Tensor, ...]],
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Lists of rows whose first tensors agree in shape, dtype and device."""
    batches = defaultdict(list)
    for row in rows:
        batches[row[0].shape, row[0].dtype, row[0].device].append(row)
    for (shape, _, device), batch in batches.items():
        size = max(1, MAX_STACK.get(device.type, MAX_STACK_DEFAULT) // shape.numel())
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _update(
    params: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    exp_avgs: tuple[Tensor, ...],
    exp_avg_sqs: tuple[Tensor, ...],
    steps: tuple[Tensor, ...],
    *,
    group: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Apply one step, in place, to N tensors of one shape, dtype and device.

    Stacked they are (N, R, C): R rows of C elements, R the first dimension of a tensor that has
    two or more, else 1. Every operation and its order is timm's, for the sake of equal bits.
    """
    shape, dtype, device = params[0].shape, params[0].dtype, params[0].device
    num_rows = shape[0] if len(shape) > 1 else 1
    beta1, beta2 = group["betas"]
    eps, weight_decay = group["eps"], group["weight_decay"]

    def stack(tensors: tuple[Tensor, ...]) -> Tensor:
        stacked = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
        return stacked.reshape(len(tensors), num_rows, -1)

    def unstack(stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.reshape(len(params), *shape).unbind()

    grad = stack(grads)
    if grad_scale is not None:
        grad = grad / grad_scale.to(device, non_blocking=True)
    keep1, keep2, advance = beta1, beta2, torch.ones((), dtype=torch.int64, device=device)
    if found_inf is not None:
        skip = found_inf.to(device, non_blocking=True).reshape(()) != 0
        grad = torch.where(skip, 0, grad)
        keep1 = torch.where(skip, 1, as_float64(beta1, device)).to(dtype)
        keep2 = torch.where(skip, 1, as_float64(beta2, device)).to(dtype)
        advance = torch.where(skip, 0, 1)

    grads = unstack(grad)
    torch._foreach_add_(steps, [advance] * len(steps))
    torch._foreach_mul_(exp_avgs, keep1)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, keep2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)

    # Float64: 1 - beta2**step cancels, and is off by 1e-5 in float32.
    lr = as_float64(group["lr"], device)
    step = torch.stack(steps).to(lr.dtype).view(-1, 1, 1)
    param, exp_avg = stack(params), stack(exp_avgs)
    denom = stack(exp_avg_sqs).sqrt().div_((1 - beta2**step).sqrt().to(dtype)).add_(eps)
    momentum = beta1 * exp_avg + (1 - beta1) * grad if group["nesterov"] else exp_avg
    update = momentum / denom
    decay = 1 - lr * weight_decay

    tangent: Callable[[Tensor], Tensor] = _identity
    if len(shape) > 1:
        fires, tangent = _projection(param, grad, delta=group["delta"], eps=eps)
        update = tangent(update)
        decay = torch.where(fires, 1 - lr * weight_decay * group["wd_ratio"], decay)
    if group["caution"]:
        mask = (update * tangent(grad) > 0).to(dtype)
        update = tangent(update * (mask / mask.mean((1, 2), keepdim=True).clamp_(min=1e-3)))

    decayed = param * decay.to(dtype) if weight_decay > 0 else param
    step_size = (lr / (1 - beta1**step)).to(dtype)
    updated = torch.addcmul(decayed, update, step_size, value=-1)
    if found_inf is not None:
        updated = torch.where(skip, param, updated)
    torch._foreach_copy_(params, unstack(updated))


def as_float64(value: float | Tensor, device: torch.device) -> Tensor:
    """A number or 0-d tensor as a 0-d float64 tensor (float32 on MPS, which has no float64)."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        return value.to(device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)


def _identity(x: Tensor) -> Tensor:
    return x


def _projection(
    param: Tensor, grad: Tensor, *, delta: float, eps: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """AdamP's projection for stacked tensors (N, R, C), as two results.

    Returns:
        Where it fires, bool (N, 1, 1): the gradient is nearly orthogonal to every row of the
        parameter (channel view) or to the parameter as a whole (layer view).
        A function that takes from an (N, R, C) its component along the rows, or along the
        whole, where the projection fires, and nothing elsewhere.
    """
    layer = (len(param), 1, -1)

    def orthogonal(param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        norm = param.norm(dim=2, keepdim=True)
        grad_norm = grad.norm(dim=2, keepdim=True)
        # F.cosine_similarity, operation by operation; the norm of param is needed once more.
        product = (grad / grad_norm.clamp_min(eps)) * (param / norm.clamp_min(eps))
        cosine = product.sum(2, keepdim=True).abs()
        return cosine.amax(1, keepdim=True) < delta / math.sqrt(param.shape[2]), norm

    in_channels, channel_norm = orthogonal(param, grad)
    in_layer, layer_norm = orthogonal(param.reshape(layer), grad.reshape(layer))
    fires = in_channels | in_layer
    unit = param / torch.where(fires, torch.where(in_channels, channel_norm, layer_norm) + eps, 1)

    def tangent(x: Tensor) -> Tensor:
        product = unit * x
        by_channel = product.sum(2, keepdim=True)
        by_layer = product.reshape(layer).sum(2, keepdim=True)
        along = torch.where(fires, torch.where(in_channels, by_channel, by_layer), 0)
        return x - unit * along

    return fires, tangent


def parameter_groups(
    model: nn.Module, *, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict]:
    """The parameter groups of a model: without weight decay, then with it.

    Tensors of at most one dimension (norms, biases, LayerScale gammas) are not decayed: they
    set a scale or an offset, and decay would pull gammas that start at 1e-6 back to zero.
    Frozen parameters are left out. The order is that of timm's `param_groups_weight_decay`.

    Args:
        lr_scales: factors on the learning rate by parameter; each of them makes two groups, with
            the factor as their `lr_scale`, from the smallest on.
    Source: facebookresearch/ConvNeXt, optim_factory.py.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for scale in sorted({lr_scales[name] for name, _ in named}) if lr_scales else [None]:
        params = [p for name, p in named if scale is None or (lr_scales or {})[name] == scale]
        pair = [
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
            {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        ]
        if scale is not None:
            pair = [group | {"lr_scale": scale} for group in pair if group["params"]]
        groups += pair
    return groups
