"""Weights that others trained: the files they come in, and their names for the same tensors."""

import argparse
import os
import re
import sys
from dataclasses import dataclass

import torch
from torch import nn

from wds_convnext.errors import CheckpointError
from wds_convnext.training.head import head_keys

_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # torch.compile's, DistributedDataParallel's
_TORCHVISION_CONVNEXT = {
    r"features\.0\.": "stem.",
    r"features\.([1357])\.(\d+)\.block\.0\.": r"stages.\1.blocks.\2.conv_dw.",
    r"features\.([1357])\.(\d+)\.block\.2\.": r"stages.\1.blocks.\2.norm.",
    r"features\.([1357])\.(\d+)\.block\.3\.": r"stages.\1.blocks.\2.mlp.fc1.",
    r"features\.([1357])\.(\d+)\.block\.5\.": r"stages.\1.blocks.\2.mlp.fc2.",
    r"features\.([1357])\.(\d+)\.layer_scale$": r"stages.\1.blocks.\2.gamma",
    r"features\.([246])\.": r"stages.\1.downsample.",
    r"classifier\.0\.": "head.norm.",
    r"classifier\.2\.": "head.fc.",
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, under a model's names where these can be made out."""

    tensors: dict[str, torch.Tensor]
    class_names: tuple[str, ...] | None = None  # that they were trained for, if the file says so
    in_order: bool = False  # whether names were others, and tensors are matched by their order


def read_weights(path: str, model: nn.Module, *, option: str = "--init-from") -> Weights:
    """The tensors of a state dict's file.

    Known are files of ours, of timm's train.py, of the repositories that timm's models come from,
    and of torchvision where it has timm's names, or for ConvNeXt. Others fit by the order of their
    tensors, if all shapes are the model's.

    Args:
        option: that named the file, for messages.
    Raises:
        CheckpointError: if it cannot be read, or is not a dict.
    """
    content = read_file(path, option=option)
    facts = content.get("facts")
    names = facts.get("class_names") if isinstance(facts, dict) else None
    class_names = tuple(names) if isinstance(names, list) else None
    weights = _tensors(content)
    own = model.state_dict()

    def num_fitting(named: dict[str, torch.Tensor]) -> int:
        return sum(k in own and v.shape == own[k].shape for k, v in named.items())

    heads = set(head_keys(model))
    if all(k in own and (k in heads or v.shape == own[k].shape) for k, v in weights.items()):
        return Weights(weights, class_names)
    known = [weights, _from_torchvision(weights), _by_timms_filter(weights, model)]
    best = max(known, key=num_fitting)
    if weights and not best.keys() & own.keys() and (renamed := _by_order(weights, own, heads)):
        return Weights(renamed, class_names, in_order=True)
    return Weights(best, class_names)


def _by_order(
    weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor], heads: set[str]
) -> dict[str, torch.Tensor]:
    """The tensors under the model's names, if they stand in its order; else nothing.

    Every tensor must have the shape and the last part of the name of its counterpart (`weight`,
    `running_mean`), but for the size of the classifier.
    """
    if len(weights) != len(own):
        return {}
    for (name, tensor), (own_name, own_tensor) in zip(weights.items(), own.items()):
        if name.rpartition(".")[2] != own_name.rpartition(".")[2]:
            return {}
        if tensor.shape != own_tensor.shape and own_name not in heads:
            return {}
    return dict(zip(own, weights.values()))


def read_file(path: str, *, option: str = "--init-from") -> dict:
    """What a file of weights holds; read as data, whatever it is.

    Raises:
        CheckpointError: if it cannot be read, or is not a dict.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{option} {path}: no such file. Give a timm state dict.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # a dependency of timm

            return load_file(path)
        # The options of the script that wrote it: a class without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise CheckpointError(
            f"{option} {path}: not a readable state dict ({_reason(path, error)}). "
            "Give a timm state dict."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{option} {path}: holds a {type(content).__name__}, no state dict.")
    return content


def _reason(path: str, error: Exception) -> str:
    """Why a file cannot be read; for what torch.load refuses, the names of it."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the same file
        unsafe = []
    unsafe = [name for name in unsafe if name != "argparse.Namespace"]
    if unsafe:
        return f"it holds {', '.join(unsafe)}, which could run code; save its tensors alone"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _tensors(content: dict) -> dict[str, torch.Tensor]:
    # Averages come last: ours hold parameters only, so they lie over the model they belong to.
    names = ("model_state_dict", "state_dict", "model", "state_dict_ema", "model_ema", "ema")
    wrapped = [content[name] for name in names if isinstance(content.get(name), dict)]
    weights: dict[str, object] = {}
    for state in wrapped or [content]:
        weights |= {_WRAPPERS.sub("", str(key)): value for key, value in state.items()}
    return {key: value for key, value in weights.items() if torch.is_tensor(value)}


def _from_torchvision(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ConvNeXt's tensors under timm's names; torchvision numbers stages and downsamplings alike."""
    renamed = {}
    for key, value in weights.items():
        for pattern, name in _TORCHVISION_CONVNEXT.items():
            key, num_found = re.subn("^" + pattern, name, key)
            if num_found:
                key = re.sub(r"^stages\.(\d)", lambda stage: f"stages.{int(stage[1]) // 2}", key)
                value = value.flatten() if key.endswith(".gamma") else value
                break
        renamed[key] = value
    return renamed


def _by_timms_filter(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors as timm turns the original repository's checkpoints into its own."""
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return rename(dict(weights), model) if rename else {}
    except Exception:  # it is written for the one repository's names
        return {}
