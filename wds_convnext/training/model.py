"""Models by timm's names, and their starting weights."""

import ast
import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError, UsageError, did_you_mean, listing
from wds_convnext.shards.classes import class_difference
from wds_convnext.training.head import head_keys, start_at_zero
from wds_convnext.training.precision import hand_on_half_precision
from wds_convnext.training.weights import read_weights


def create_model(
    name: str,
    *,
    num_classes: int,
    drop_path_rate: float = 0.0,
    model_args: Sequence[str] = (),
) -> nn.Module:
    """A timm model with fresh weights.

    Args:
        model_args: more arguments for timm's function, as KEY=VALUE.
    Raises:
        UsageError: if timm has no such model, it takes no stochastic depth, or not the arguments.
    """
    import timm  # 1 s; what evaluates a config or prints help does not pay for it

    import wds_convnext.training.thumbnet  # noqa: F401  registers it with timm

    if not timm.is_model(name):
        known = timm.list_models()
        raise UsageError(f"--model {name}: timm has no such model.{did_you_mean(name, known)}")
    options = parse_model_args(model_args)
    depth: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        model = timm.create_model(
            name, pretrained=False, num_classes=num_classes, **depth, **options
        )
    except Exception as error:  # what a model makes of a value that it does not take
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if depth and isinstance(error, TypeError) and "drop_path_rate" in reason:
            raise UsageError(
                f"--model {name}: does not take --drop-path-rate {drop_path_rate:g} ({error}). "
                "Give --drop-path-rate 0."
            ) from None
        if not options:
            raise
        raise UsageError(
            f"--model-arg {' '.join(model_args)}: {name} does not take it ({reason}). "
            "Arguments are those of timm.create_model for this model."
        ) from None
    hand_on_half_precision(model)
    return model


# What has an option of its own, decides what a file is trusted to do, or makes another thing.
_NOT_MODEL_ARGS = (
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "num_classes",
    "in_chans",
    "drop_path_rate",
    "features_only",
    "scriptable",
    "exportable",
    "no_jit",
)
_MAX_MODEL_ARG = 1000  # characters


def parse_model_args(model_args: Sequence[str]) -> dict[str, Any]:
    """Arguments by name of KEY=VALUE texts; a value that is no Python literal is text.

    Raises:
        UsageError: if a key is not for a user to give, or a text is very long.
    """
    options: dict[str, Any] = {}
    for text in model_args:
        key, _, value = text.partition("=")
        if key in _NOT_MODEL_ARGS or len(text) > _MAX_MODEL_ARG:
            reason = "has an option of its own, or is fixed" if key in _NOT_MODEL_ARGS else "long"
            raise UsageError(f"--model-arg {text[:60]}: {key[:60]} {reason}. Leave it out.")
        try:
            options[key] = ast.literal_eval(value)
            json.dumps(options[key])  # an export states it so
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            options[key] = value
    return options


def named_args(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments by name, from a config.json, as `parse_model_args` takes them.

    Left out are those that are decided here: the number of classes, three channels.
    """
    kept = {key: value for key, value in arguments.items() if key not in _NOT_MODEL_ARGS}
    return tuple(f"{key}={value!r}" for key, value in kept.items())


def model_for(config: TrainConfig, *, num_classes: int) -> nn.Module:
    """The model that a config names, with fresh weights."""
    assert config.model is not None  # `with_pretrained` filled it in
    return create_model(
        config.model,
        num_classes=num_classes,
        drop_path_rate=config.drop_path_rate,
        model_args=config.model_arg,
    )


def check_image_sizes(model: nn.Module, config: TrainConfig) -> None:
    """Run a blank image of each size of a training through a model.

    Raises:
        UsageError: if the model cannot take one of them.
    """
    *smaller, (_, last) = config.size_shares
    check_image_size(model, last)
    for _, size in smaller:
        if reason := _failure(model, size):
            raise UsageError(
                f"--image-size-schedule {config.image_size_schedule}: the model cannot take images "
                f"of {size} px ({reason}). Begin with a larger size, or take a model for any "
                "size: a ConvNet, or a ViT with --model-arg dynamic_img_size=True."
            )


def check_image_size(model: nn.Module, image_size: int) -> None:
    """Run one blank image through a model, so that a size it cannot take is found at once.

    Raises:
        UsageError: if the model cannot take images of this size.
    """
    if reason := _failure(model, image_size):
        facts = getattr(model, "pretrained_cfg", {})
        made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
        side = made_for[0] if made_for else facts.get("input_size", (3, 0, 0))[1]
        advice = f"Use {side}, which it was made for" if side else "Use a multiple of 32"
        if facts.get("fixed_input_size"):
            advice += f", or make it for another: --model-arg img_size={image_size}"
        raise UsageError(
            f"--image-size {image_size}: the model cannot take it ({reason}). {advice}."
        )


@torch.no_grad()
def _failure(model: nn.Module, image_size: int) -> str | None:
    """Why a model cannot take a blank image of a size; None if it can."""
    model.eval()
    try:
        model(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def small_image_note(model: nn.Module, image_size: int) -> str | None:
    """A sentence where the last stage sees less than 4 x 4 places of an image, if timm knows.

    ConvNeXt's stride of 4 leaves 1 x 1 of 32 pixels: CIFAR-10 then ends at 75 %
    (facebookresearch/ConvNeXt, issue 134).
    """
    stages = getattr(model, "feature_info", None)
    stride = stages[-1].get("reduction") if isinstance(stages, list) and stages else None
    if not stride or image_size >= 4 * stride:
        return None
    side = max(1, image_size // stride)
    stem = "--model-arg patch_size=1 for a ConvNeXt, " if type(model).__name__ == "ConvNeXt" else ""
    return (
        f"--image-size {image_size}: the model's last stage sees {side} x {side} places of it, "
        f"4 x 4 are usual. More come with --image-size {4 * stride}, {stem}or --model "
        "thumbnet."
    )


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


def init_from(
    model: nn.Module,
    path: str,
    *,
    class_names: tuple[str, ...] | None = None,
    source: str | None = None,
    trained_for: tuple[str, ...] | None = None,
) -> str:
    """Start from a file of weights (`.pt`, `.pth`, `.safetensors`), see `read_weights`.

    A classifier of other classes is left fresh: of another number, or of other names or their
    order, where these are known. It starts at zero (`head.start_at_zero`). Tensors of modules
    that the model does not have, of a teacher or a loss, are left out if everything else fits.

    Args:
        source: what --pretrained named, if it did; else the file is that of --init-from.
        trained_for: the names of the weights' classes, unless the file states them.
    Returns:
        One sentence on what was loaded, what is fresh and what was left out.
    Raises:
        CheckpointError: if it cannot be read or belongs to another model.
    """
    option = "--pretrained" if source else "--init-from"
    found = read_weights(path, model, option=option)
    own, weights = model.state_dict(), found.tensors
    fits = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    head = set(head_keys(model))
    misfits = [key for key in own if key not in fits and key not in head]
    modules = {name for name, _ in model.named_children()}
    left_out = [key for key in weights if key not in own]
    misfits += [key for key in left_out if misfits or key.partition(".")[0] in modules]
    if misfits or not fits:
        raise CheckpointError(
            f"{option} {source or path}: weights of another model: "
            + _misfit(misfits, own=own, weights=weights)
        )
    trained_for, reason = found.class_names or trained_for, "of another size"
    if class_names and trained_for and (difference := class_difference(class_names, trained_for)):
        fits = {key: value for key, value in fits.items() if key not in head}
        reason = f"of other classes ({difference})"
    model.load_state_dict(fits, strict=False)
    fresh = [key for key in own if key not in fits]
    order = ", by their order, as the names are others" * found.in_order
    at_zero = ", at zero" * start_at_zero(model, fresh)
    left = f"; left fresh{at_zero}, being {reason}: {', '.join(fresh)}" if fresh else ""
    unused = f"; left out, being no part of the model: {listing(left_out)}" if left_out else ""
    return f"Started from {source or path}: {len(fits)} of {len(own)} tensors{order}{left}{unused}."


def _misfit(
    misfits: list[str], *, own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> str:
    first = misfits[0] if misfits else "all"
    expected, found = (
        tuple(tensors[first].shape) if first in tensors else "none" for tensors in (own, weights)
    )
    advice = "Choose the --model it was saved from."
    if weights and not weights.keys() & own.keys():
        advice = f"Choose the --model it was saved from, or give {next(iter(weights))} and all "
        advice += "others the names that timm has for them."
    return (
        f"{len(misfits)} tensors do not fit the {len(own)} of this one, first {first} "
        f"(expected {expected}, found {found}). {advice}"
    )
