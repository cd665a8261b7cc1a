"""A model's classifier: which of its layers it is, and how a fresh one starts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from wds_convnext.errors import UsageError


def heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """A timm model's classifier, or both of a distilled one; none if it has none."""
    classifier = getattr(model, "get_classifier", None)
    found = classifier() if classifier else ()
    return found if isinstance(found, tuple) else (found,)


def head_keys(model: nn.Module) -> list[str]:
    """The names of the tensors of a timm model's classifier, or of both of a distilled one."""
    found = heads(model)
    prefixes = tuple(name + "." for name, module in model.named_modules() if module in found)
    return [key for key in model.state_dict() if key.startswith(prefixes)]


def start_at_zero(model: nn.Module, fresh: Sequence[str]) -> bool:
    """Set a fresh classifier's weights to zero; whether there was one that could be.

    Random ones send random gradients through layers that others trained, before they have
    learned anything: timm draws EfficientNet's so that the loss of 10 classes starts at 5 in place
    of 2.3, which cost 9 points after 9,000 images. At zero the classifier learns first, as in BiT
    (Kolesnikov et al. 2020, arXiv:1912.11370) and ViT (Dosovitskiy et al. 2021, arXiv:2010.11929,
    section 3.2). One of several layers stays random: two at zero would never learn.
    """
    single = _single_layers(model)
    names = {name for name, module in model.named_modules() if module in single}
    zeroed = [key for key in fresh if key.rpartition(".")[0] in names]
    for key in zeroed:
        nn.init.zeros_(model.get_parameter(key))
    return bool(zeroed)


def _single_layers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [head for head in heads(model) if isinstance(head, nn.Linear | nn.Conv2d)]


@contextmanager
def head_filled(model: nn.Module) -> Iterator[None]:
    """Give a classifier that is at zero weights for as long as this lasts.

    At zero, the loss is the same whatever comes before it, which a comparison of losses wants to
    see.
    """
    at_zero = [head.weight for head in _single_layers(model) if not head.weight.any()]
    rng = torch.Generator().manual_seed(0)
    for weight in at_zero:
        weight.data.copy_(torch.randn(weight.shape, generator=rng) / weight[0].numel() ** 0.5)
    try:
        yield
    finally:
        for weight in at_zero:
            nn.init.zeros_(weight)


def check_frozen_head(model: nn.Module, pattern: str) -> None:
    """Refuse to freeze a classifier at zero, behind which nothing is learned.

    Raises:
        UsageError: if --freeze found one.
    """
    named = dict(model.named_parameters())
    weights = [key for key in head_keys(model) if key.endswith("weight")]
    for key in weights:
        if not named[key].requires_grad and not named[key].any():
            raise UsageError(
                f"--freeze {pattern}: finds {key}, which is fresh and starts at zero, so nothing "
                "would be learned. Leave the classifier out of it."
            )
