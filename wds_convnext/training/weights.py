"""Weights that others trained: the files they come in, and their names for the same tensors."""

import argparse
import os
import re
import sys

import torch
from torch import nn

from wds_convnext.errors import CheckpointError

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


def read_weights(
    path: str, model: nn.Module
) -> tuple[dict[str, torch.Tensor], tuple[str, ...] | None]:
    """The tensors of a state dict's file, under the model's names where these can be made out.

    And the class names that they were trained for, where the file is a checkpoint of ours.

    Known are files of ours, of timm's train.py, of the repositories that timm's models come from,
    and of torchvision where it has timm's names, or for ConvNeXt.

    Raises:
        CheckpointError: if it cannot be read, or is not a dict.
    """
    content = _read(path)
    facts = content.get("facts")
    names = facts.get("class_names") if isinstance(facts, dict) else None
    class_names = tuple(names) if isinstance(names, list) else None
    weights = _tensors(content)
    own = model.state_dict().keys()
    if weights.keys() <= own:
        return weights, class_names
    known = [_from_torchvision(weights), _by_timms_filter(weights, model)]
    return max([weights, *known], key=lambda named: len(named.keys() & own)), class_names


def _read(path: str) -> dict:
    if not os.path.isfile(path):
        raise CheckpointError(f"--init-from {path}: no such file. Give a timm state dict.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # a dependency of timm

            return load_file(path)
        # The options of the script that wrote it: a class without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise CheckpointError(
            f"--init-from {path}: not a readable state dict ({_reason(path, error)}). "
            "Give a timm state dict."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"--init-from {path}: holds a {type(content).__name__}, no state dict."
        )
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
    names = ("model_state_dict", "state_dict", "model", "state_dict_ema", "ema")
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
