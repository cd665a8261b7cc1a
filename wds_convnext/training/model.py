"""Models by timm's names, their starting weights, and compilation."""

import copy
from typing import Any

import torch
from torch import nn

from wds_convnext.errors import CheckpointError, UsageError, did_you_mean
from wds_convnext.shards.classes import class_difference
from wds_convnext.training.weights import read_weights


def create_model(name: str, *, num_classes: int, drop_path_rate: float = 0.0) -> nn.Module:
    """A timm model with fresh weights.

    Raises:
        UsageError: if timm has no such model, or it takes no stochastic depth.
    """
    import timm  # 1 s; what evaluates a config or prints help does not pay for it
    from timm.models.convnext import ConvNeXtBlock

    if not timm.is_model(name):
        known = timm.list_models()
        raise UsageError(f"--model {name}: timm has no such model.{did_you_mean(name, known)}")
    depth: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, **depth)
    except TypeError as error:
        raise UsageError(
            f"--model {name}: does not take --drop-path-rate {drop_path_rate:g} ({error}). "
            "Give --drop-path-rate 0."
        ) from None
    for module in model.modules():
        if isinstance(module, ConvNeXtBlock):
            module.register_forward_hook(_to_autocast_dtype)
    return model


def _to_autocast_dtype(block: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Under autocast, hand a block's output on in half precision.

    The float32 LayerScale makes timm's output float32, and with it everything that the next
    blocks read and save for the backward pass. Scale and sum stay float32; a compiler rounds in
    the same pass over memory.
    """
    device_type = output.device.type
    available = torch.amp.is_autocast_available(device_type)  # not on meta
    if available and torch.is_autocast_enabled(device_type):
        return output.to(torch.get_autocast_dtype(device_type))
    return output


def compile_model(model: nn.Module) -> nn.Module:
    """The model compiled for one shape; random masks are those that eager draws for a seed."""
    compiled = torch.compile(model, dynamic=False, options={"fallback_random": True})
    assert isinstance(compiled, nn.Module)  # as what it was made from
    return compiled


@torch.no_grad()
def check_image_size(model: nn.Module, image_size: int) -> None:
    """Run one blank image through a model, so that a size it cannot take is found at once.

    Raises:
        UsageError: if the model cannot take images of this size.
    """
    model.eval()
    try:
        model(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        made_for = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 0, 0))[1]
        advice = f"Use {made_for}, which it was made for." if made_for else "Use a multiple of 32."
        raise UsageError(
            f"--image-size {image_size}: the model cannot take it ({reason}). {advice}"
        ) from None


@torch.no_grad()
def check_batch_of_one(model: nn.Module, image_size: int) -> None:
    """Train a copy of a model on one blank image, which BatchNorm may not take.

    Raises:
        UsageError: if the model needs more images than one.
    """
    try:
        copy.deepcopy(model).train()(torch.zeros(1, 3, image_size, image_size))
    except ValueError as error:
        raise UsageError(
            f"--batch-size 1: the model takes statistics over a batch ({error}). Use at least 2."
        ) from None


def init_from(model: nn.Module, path: str, *, class_names: tuple[str, ...] | None = None) -> str:
    """Start from a file of weights (`.pt`, `.pth`, `.safetensors`), see `read_weights`.

    A classifier of other classes is left fresh: of another number, or of other names or their
    order, where the file states them.

    Returns:
        One sentence on what was loaded and what was not.
    Raises:
        CheckpointError: if it cannot be read or belongs to another model.
    """
    weights, trained_for = read_weights(path, model)
    own = model.state_dict()
    fits = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    head = set(_head_keys(model))
    misfits = [key for key in own if key not in fits and key not in head]
    misfits += [key for key in weights if key not in own]
    if misfits or not fits:
        first = misfits[0] if misfits else "all"
        expected, found = (
            tuple(tensors[first].shape) if first in tensors else "none"
            for tensors in (own, weights)
        )
        advice = "Choose the --model it was saved from."
        if weights and not weights.keys() & own.keys():
            advice = f"Choose the --model it was saved from, or give {next(iter(weights))} and all "
            advice += "others the names that timm has for them."
        raise CheckpointError(
            f"--init-from {path}: weights of another model: {len(misfits)} tensors do not fit the "
            f"{len(own)} of this one, first {first} (expected {expected}, found {found}). " + advice
        )
    reason = "of another size"
    if class_names and trained_for and (difference := class_difference(class_names, trained_for)):
        fits = {key: value for key, value in fits.items() if key not in head}
        reason = f"of other classes ({difference})"
    model.load_state_dict(fits, strict=False)
    fresh = [key for key in own if key not in fits]
    left = f"; left fresh, being {reason}: {', '.join(fresh)}" if fresh else ""
    return f"Started from {path}: {len(fits)} of {len(own)} tensors{left}."


def _head_keys(model: nn.Module) -> list[str]:
    found = model.get_classifier()  # type: ignore[operator]  # a method that timm's models add
    heads = found if isinstance(found, tuple) else (found,)  # distilled models have two
    prefixes = tuple(name + "." for name, module in model.named_modules() if module in heads)
    return [key for key in model.state_dict() if key.startswith(prefixes)]
