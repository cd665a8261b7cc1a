"""A run's optimizer: AdamP, or another of timm's factory, as `--optimizer` says.

A step that failed changes nothing, whatever the optimizer. AdamP and torch's fused AdamW and SGD
take a flag on the device for that; around Lion and Muon, which have none, `step_unless` stands.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wds_convnext.config import TrainConfig
from wds_convnext.training.adamp import AdamP, as_float64, parameter_groups
from wds_convnext.training.ema import WeightAverage
from wds_convnext.training.finetune import lr_scales

# Tensors of a parameter's size in the optimizer's state. (Muon has another for what is no matrix.)
NUM_MOMENTS = {"adamp": 2, "adamw": 2, "sgd": 1, "lion": 1, "muon": 1}


def build_optimizer(
    model: nn.Module, config: TrainConfig, *, average: WeightAverage | None = None
) -> Optimizer:
    """The optimizer for a model that is on its device, with the groups of `parameter_groups`.

    Args:
        average: which AdamP's kernels move along.
    """
    groups = parameter_groups(
        model, weight_decay=config.weight_decay, lr_scales=lr_scales(model, config)
    )
    device = next(model.parameters()).device
    if config.optimizer == "adamp":
        optimizer = AdamP(groups, lr=config.lr)
        optimizer.average = average
        keep_lr_on_device(optimizer, device)
        return optimizer
    from timm.optim import create_optimizer_v2  # 1 s

    options: dict[str, Any] = {}
    if config.optimizer in ("adamw", "sgd"):
        options["fused"] = True
    if config.optimizer == "sgd":
        options["nesterov"] = config.momentum != 0  # torch refuses it without momentum
    if config.optimizer == "muon":
        options["capturable"] = device.type == "cuda"  # so that counts of steps are there, too
    if config.momentum is not None:
        options["momentum"] = config.momentum
    other = create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, **options)
    if config.optimizer == "sgd" and config.momentum != 0:
        # torch would leave them uninitialized if the first step is skipped.
        for group in other.param_groups:
            for p in group["params"]:
                other.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return other


def keep_lr_on_device(optimizer: Optimizer, device: torch.device) -> None:
    """Make each group's learning rate a 0-d tensor, so that changing it recompiles nothing."""
    for group in optimizer.param_groups:
        group["lr"] = as_float64(float(group["lr"]), device)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of each group: lr times the group's `lr_scale`, if it has one."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)  # in place: a new number would recompile a compiled optimizer
        else:
            group["lr"] = value


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """Take a step, which changes nothing where the 0-d flag `skip` is set.

    On CUDA the host does not read the flag.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif skip.device.type != "cuda":
        if not skip:
            optimizer.step()
    else:
        step_and_undo(optimizer, skip)


@torch.no_grad()
def step_and_undo(optimizer: Optimizer, skip: Tensor) -> None:
    """The same for any optimizer whose moments start at zero, by copies of all that it changes."""
    before = {tensor: tensor.clone() for tensor in _tensors(optimizer)}
    optimizer.step()
    for tensor in _tensors(optimizer):
        kept = before.get(tensor, torch.zeros_like(tensor))
        tensor.copy_(torch.where(skip, kept, tensor))


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    """All that a step changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*parameters, *(value for value in states if isinstance(value, Tensor))]
