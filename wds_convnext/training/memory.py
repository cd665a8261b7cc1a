"""How much memory of a GPU a training needs, and which batch would fit: estimated, not tried."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wds_convnext.config import TrainConfig
from wds_convnext.training.finetune import freeze
from wds_convnext.training.model import model_for
from wds_convnext.training.optimizer import NUM_MOMENTS

# Of a GPU's memory, for tensors: the rest is CUDA's context, libraries' workspaces and gaps.
_USABLE = 0.9


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a training step holds at its peak, at least."""

    fixed: int  # weights, gradients, moments, average
    per_image: int  # what the forward pass of one image keeps for the backward pass

    def of_batch(self, batch_size: int) -> int:
        return self.fixed + batch_size * self.per_image


def memory_needs(config: TrainConfig, *, amp: str) -> MemoryNeeds:
    """Counted on a model whose tensors have no data, uncompiled; a compiler keeps less.

    Args:
        amp: off, bf16 or fp16.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = config.image_size
    assert size is not None  # `with_pretrained` filled it in
    with torch.device("meta"):
        plain = model_for(config, num_classes=1000)  # the classifier hardly counts
    if config.freeze is not None:
        freeze(plain, config.freeze)
    # Not placed by the machine: it is a GPU's memory that is asked for.
    with FakeTensorMode():  # on the CPU by name, which autocast knows, and without data
        copies: dict[int, Any] = {id(b): torch.empty(b.shape) for b in plain.buffers()}
        for p in plain.parameters():
            copies[id(p)] = nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad)
        model = copy.deepcopy(plain, copies).train()
        # Half precision is as large in fp16. BatchNorm wants two images.
        with torch.autocast("cpu", torch.bfloat16, enabled=amp != "off"):
            of_two, of_four = (_kept_bytes(model, torch.empty(n, 3, size, size)) for n in (2, 4))
    per_image = (of_four - of_two) // 2
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in plain.parameters()]
    of_weights = sum(size for size, _ in sizes)
    of_trained = sum(size for size, is_trained in sizes if is_trained)
    fixed = of_weights * (2 if config.ema_decay else 1)
    fixed += of_trained * (1 + NUM_MOMENTS[config.optimizer])
    # What is kept whatever the batch: weights in half precision.
    return MemoryNeeds(fixed=fixed + of_two - 2 * per_image, per_image=per_image)


def _kept_bytes(model: nn.Module, images: Tensor) -> int:
    """What a forward pass keeps, besides parameters; tensors that share memory count once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(images.to(memory_format=torch.channels_last))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    del output  # not before: it holds the storages, whose places others could take
    return sum(kept.values())


def fitting_batch(
    needs: MemoryNeeds, *, batch_size: int, accumulate: int, total: int
) -> tuple[int, int] | None:
    """The largest batch that fits, and how many make the same step; None if not even one image.

    Args:
        total: bytes of the device.
    """
    images = batch_size * accumulate
    for count in range(accumulate + 1, images + 1):
        if images % count == 0 and needs.of_batch(images // count) <= _USABLE * total:
            return images // count, count
    return None


def batch_advice(config: TrainConfig, needs: MemoryNeeds, *, total: int) -> str:
    """A sentence on what to do where the config's batch did not fit into so many bytes."""
    found = fitting_batch(
        needs, batch_size=config.batch_size, accumulate=config.accumulate, total=total
    )
    sizes = (
        f"An image takes about {needs.per_image / 1e6:.0f} MB, weights and optimizer "
        f"{needs.fixed / 1e9:.1f} GB, and there are {total / 1e9:.1f} GB"
    )
    if found is None:
        return f"{sizes}: choose a smaller --model or --image-size."
    batch_size, accumulate = found
    return f"{sizes}: --batch-size {batch_size} --accumulate {accumulate} should fit."
