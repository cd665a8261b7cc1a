"""What fine-tuning does otherwise: layers that stay as they are, and learning rates by layer."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError, did_you_mean, listing
from wds_convnext.training.head import head_keys


def freeze(model: nn.Module, pattern: str) -> tuple[tuple[nn.Module, ...], str]:
    """Stop training the parameters in whose name a regular expression is found.

    Returns:
        The BatchNorm modules all of whose parameters are meant: they have to stay in evaluation
        mode, or their statistics would follow the new data. And a sentence about it.
    Raises:
        UsageError: if it is no regular expression, or finds no parameter or every one.
    """
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise UsageError(f"--freeze {pattern}: not a regular expression ({error}).") from None
    named = dict(model.named_parameters())
    frozen = [name for name in named if found(name)]
    if not frozen:
        modules = dict.fromkeys(".".join(name.split(".")[:3]) for name in named)
        hint = did_you_mean(re.sub(r"[\\^$()]", "", pattern), [*named, *modules])
        children = list(dict.fromkeys(name.partition(".")[0] for name in named))
        raise UsageError(
            f"--freeze {pattern}: finds no parameter of the model.{hint} Its names begin with "
            f"{listing(children)}."
        )
    if len(frozen) == len(named):
        raise UsageError(f"--freeze {pattern}: finds every parameter, so nothing would be trained.")
    for name in frozen:
        named[name].requires_grad_(False)
    norms = tuple(
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and found(f"{name}.weight") and found(f"{name}.bias")
    )
    num_frozen = sum(named[name].numel() for name in frozen)
    share = num_frozen / sum(parameter.numel() for parameter in named.values())
    note = f"Frozen: {len(frozen)} of {len(named)} tensors, {share:.0%} of the parameters"
    return norms, note + (f"; {len(norms)} BatchNorm stay in evaluation mode." if norms else ".")


def lr_scales(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """The factor on the learning rate of each parameter, by name; empty if all have the same.

    With --layer-decay d it is d ** (number of layers above), the layers being those of timm's
    `group_matcher`; the classifier's is 1, or --head-lr / --lr.
    Source: BEiT's optim_factory.py; timm's param_groups_layer_decay.
    Raises:
        UsageError: if timm does not say what the model's layers are.
    """
    scales: dict[str, float] = {}
    if config.layer_decay is not None:
        from timm.models import group_parameters

        matcher = getattr(model, "group_matcher", None)
        layers = group_parameters(model, matcher(coarse=False), reverse=True) if matcher else {}
        top = max(layers.values(), default=0)
        if not top:
            raise UsageError(
                f"--layer-decay {config.layer_decay:g}: timm does not say what the layers of "
                f"{config.model} are. Leave it out, or lower --lr."
            )
        names = [name for name, _ in model.named_parameters()]
        scales = {name: config.layer_decay ** (top - layers.get(name, top)) for name in names}
    if config.head_lr is not None:
        heads = set(head_keys(model))
        names = [name for name, _ in model.named_parameters()]
        head = config.head_lr / config.lr
        scales = {name: head if name in heads else scales.get(name, 1.0) for name in names}
    return scales
