"""Models by timm's names, starting weights, compilation, and the moving average of weights."""

import contextlib
import os
import pickle
from collections.abc import Iterator

import torch
from torch import nn

from wds_convnext.errors import CheckpointError, UsageError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def create_model(name: str, *, num_classes: int, drop_path_rate: float = 0.0) -> nn.Module:
    """A timm model with fresh weights.

    Raises:
        UsageError: if timm has no such model, or it takes no stochastic depth.
    """
    import timm  # 1 s; what evaluates a config or prints help does not pay for it

    if not timm.is_model(name):
        known = timm.list_models()
        raise UsageError(f"--model {name}: timm has no such model.{did_you_mean(name, known)}")
    depth = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **depth)
    except TypeError as error:
        raise UsageError(
            f"--model {name}: does not take --drop-path-rate {drop_path_rate:g} ({error}). "
            "Give --drop-path-rate 0."
        ) from None


def init_from(model: nn.Module, path: str) -> str:
    """Start from a timm state dict (a `.pt`/`.pth` file, or a checkpoint of ours, or safetensors).

    A classifier of another number of classes is left fresh.

    Returns:
        One sentence on what was loaded and what was not.
    Raises:
        CheckpointError: if it cannot be read or belongs to another model.
    """
    weights = _read_weights(path)
    own = model.state_dict()
    fits = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    head = set(_head_keys(model))
    misfits = [key for key in own if key not in fits and key not in head]
    if misfits or not fits:
        found = (
            f"{tuple(weights[misfits[0]].shape)}" if misfits and misfits[0] in weights else "none"
        )
        raise CheckpointError(
            f"--init-from {path}: weights of another model: {len(misfits)} of {len(own)} tensors "
            f"do not fit, first {misfits[0] if misfits else 'all'} (found {found}). "
            "Choose the --model it was saved from."
        )
    model.load_state_dict(fits, strict=False)
    fresh = [key for key in own if key not in fits]
    left = f"; left fresh, being of another size: {', '.join(fresh)}" if fresh else ""
    return f"Started from {path}: {len(fits)} of {len(own)} tensors{left}."


def _head_keys(model: nn.Module) -> list[str]:
    classifier = model.get_classifier()
    prefix = next(name for name, module in model.named_modules() if module is classifier)
    return [key for key in model.state_dict() if key.startswith(prefix + ".")]


def _read_weights(path: str) -> dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise CheckpointError(f"--init-from {path}: no such file. Give a timm state dict.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # a dependency of timm

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"--init-from {path}: not a readable state dict ({str(error).splitlines()[0]})."
        ) from None
    for wrapped_as in ("ema", "state_dict_ema", "model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapped_as), dict):
            content = content[wrapped_as]
            break
    if not isinstance(content, dict):
        raise CheckpointError(
            f"--init-from {path}: holds a {type(content).__name__}, no state dict."
        )
    weights = {k.removeprefix("_orig_mod.").removeprefix("module."): v for k, v in content.items()}
    return {key: value for key, value in weights.items() if torch.is_tensor(value)}


class WeightAverage:
    """An exponential moving average of a model's parameters, updated on the device without reads.

    Buffers are not averaged: they belong to the running model.
    """

    def __init__(self, model: nn.Module, *, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, *, frozen: torch.Tensor) -> None:
        """Move towards the model's weights; not at all where the 0-d flag `frozen` is set."""
        weight = (1 - self.decay) * (1 - frozen.float())
        torch._foreach_lerp_(self._average, self._parameters, weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model computes with the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        running = [p.detach().clone() for p in self._parameters]
        torch._foreach_copy_(self._parameters, self._average)
        torch._foreach_copy_(self._average, running)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self._average))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        torch._foreach_copy_(self._average, [state[name] for name in self.names])
