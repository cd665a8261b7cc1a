"""Operations and bytes of a training step on CUDA, counted without a GPU: nothing is computed.

    python tools/bench/count_step.py --model convnext_base --batch-size 160

`train_step` itself runs, uncompiled, on tensors that claim to be on CUDA and hold no data
(FakeTensorMode). The engine of autograd wants a real device, so the nodes of the graph are called
one by one, in its order. An operation's bytes are what its arguments and results take, views left
out: eager PyTorch moves about these, a compiler fewer. The floor of a part is what no compiler
saves:

- augmentation: bytes read, float32 images written;
- forward: weights read, and what the backward pass needs written; backward: that and weights read,
  gradients written; what could be computed again instead counts as well;
- clipping: gradients read; optimizer: AdamW's 28 bytes a weight; average: 12.

Faults are what costs time for nothing: a value that the host reads, a tensor of the CPU that is
copied or, if it has a dimension, used; a cast that there was before, or that is undone. AdamP is
counted by operations: the kernels of `adamp_triton` take addresses, which tensors without data do
not have.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed
from cuda_by_name import DEVICE, autocast, backward, state_on_cuda, without_data

from wds_convnext.config import TrainConfig
from wds_convnext.stream.stream import Batch
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.memory import memory_needs
from wds_convnext.training.model import model_for
from wds_convnext.training.state import TrainState
from wds_convnext.training.step import StepRecipe, build_recipe, train_step

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUGMENTATION, FORWARD, BACKWARD = "augmentation", "forward, loss", "backward"
CLIPPING, OPTIMIZER, AVERAGE = "clipping, sums", "optimizer", "average, sums"

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
COPIES = ("_to_copy", "copy_")
ALLOCATIONS = ("new_empty", "new_empty_strided", "empty_like")
# What lies in their first argument is not read.
OVERWRITING = ("copy_", "_foreach_copy_", "fill_", "zero_", "bernoulli_")
OVERWRITING += ("new_zeros", "zeros_like", "ones_like", "full_like")
AGAIN, BACK = "cast a second time", "cast to float32 and back"
KNOWN_FAULTS = (
    # The gradient of a block's shortcut: the block's sum is in float32, its summand is not. A
    # compiler makes no memory of that; eager code would have to round the sum otherwise.
    (BACKWARD, BACK),
    # With --accumulate: autocast forgets the weights in half precision after each batch.
    (FORWARD, AGAIN),
)


class Counting(TorchDispatchMode):
    """Counts operations and bytes by the part that is under way, and faults as (part, what)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = AUGMENTATION
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.faults: Counter[tuple[str, str]] = Counter()
        self.product_dtypes: set[torch.dtype] = set()  # of matrix products
        # Result and origin of each cast, by the result; held, so that nothing takes their place.
        self._casts: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._cast_to: set[tuple] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name == "_to_copy":
            self._look_at_cast(args[0], result)
        if name in READS:
            self._note(f"{name} makes the host wait")
        if name in ("mm", "addmm", "bmm", "convolution"):
            self.product_dtypes.add(result.dtype)
        if function.is_view or function.namespace == "prim" or name in ALLOCATIONS:
            return result
        read = _tensors((args[1:] if name in OVERWRITING else args, kwargs))
        written = _tensors(args[0] if result is None else result)
        self.operations[self.part] += 1
        self.bytes[self.part] += sum(map(_num_bytes, read + written))
        if any(x.device.type == "cpu" and (x.ndim or name in COPIES) for x in read):
            self._note(f"{name} takes a tensor of the CPU")
        return result

    def _note(self, fault: str) -> None:
        self.faults[self.part, fault] += 1

    def _look_at_cast(self, tensor: Tensor, result: Tensor) -> None:
        if (_place(tensor), result.dtype) in self._cast_to:
            self._note(AGAIN)
        _, origin = self._casts.get(_place(tensor), (None, None))
        if origin is not None and origin.dtype == result.dtype != tensor.dtype:
            self._note(BACK if tensor.dtype == torch.float32 else "rounded and cast back")
        self._casts[_place(result)] = result, tensor
        self._cast_to.add((_place(tensor), result.dtype))


def _tensors(tree: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def _place(tensor: Tensor) -> tuple:
    """What makes a tensor this one, whatever object it is."""
    place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor._version


def _num_bytes(tensor: Tensor) -> int:
    """What a tensor takes, the repetitions of an expanded one left out."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        size *= length if stride else 1
    return size


def count_step(
    config: TrainConfig, *, amp: str, num_classes: int = 1000, class_weights: bool = False
) -> Counting:
    """Count the second step of a run: the first makes the optimizer's state.

    Args:
        amp: off, bf16 or fp16.
    """
    size = config.image_size
    assert size is not None
    with torch.device("meta"):  # not in the fake mode: numbers are read when a model is built
        plain = model_for(config, num_classes=num_classes)
    with without_data():
        state = state_on_cuda(config, plain, amp=amp)
        recipe = build_recipe(
            config,
            state,
            num_classes=num_classes,
            machine=Machine(World(), DEVICE, amp),
            preprocessing=Preprocessing(size),
            class_weights=[1.0] * num_classes if class_weights else None,
        )
        images = torch.empty(config.batch_size, 3, size, size, dtype=torch.uint8, device=DEVICE)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.empty(config.batch_size, dtype=torch.int64, device=DEVICE)
        batches = [Batch(images, labels, labels.bool(), [])] * config.accumulate
        run(state, batches, recipe, HALF.get(amp))
        return run(state, batches, recipe, HALF.get(amp))


def run(
    state: TrainState, batches: list[Batch], recipe: StepRecipe, half: torch.dtype | None
) -> Counting:
    """One step; what it enters says which part is under way."""
    counting = Counting()

    def normalizer(images: Tensor) -> Tensor:
        counting.part = AUGMENTATION
        return recipe.normalizer(images)

    @contextlib.contextmanager
    def forward() -> Iterator[None]:
        counting.part = FORWARD
        with autocast(half):
            yield

    def counted_backward(loss: Tensor) -> None:
        counting.part = BACKWARD
        backward(loss)
        counting.part = CLIPPING

    @contextlib.contextmanager
    def optimizer() -> Iterator[None]:
        counting.part = OPTIMIZER
        yield
        counting.part = AVERAGE

    timer = SimpleNamespace(span=optimizer)
    watched = replace(recipe, normalizer=normalizer, autocast=forward, optimizer_timer=timer)
    with patch.object(Tensor, "backward", counted_backward), counting:
        train_step(state, batches, lr=1e-3, recipe=watched)
    return counting


def floors(config: TrainConfig, *, amp: str) -> dict[str, int]:
    """Bytes that a part has to move, see the docstring."""
    with torch.device("meta"):
        model = model_for(config, num_classes=1000)
    weights = 4 * sum(p.numel() for p in model.parameters())
    kept = memory_needs(config, amp=amp).per_image * config.batch_size
    one_batch = {
        AUGMENTATION: config.batch_size * 3 * config.image_size**2 * (1 + 4),
        FORWARD: weights + kept,
        BACKWARD: weights + kept + weights,
    }
    per_step = {CLIPPING: weights, OPTIMIZER: 7 * weights, AVERAGE: 3 * weights}
    return {part: n * config.accumulate for part, n in one_batch.items()} | per_step


@click.command()
@click.option("--model", default="convnext_base", show_default=True)
@click.option("--batch-size", default=160, show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--accumulate", default=1, show_default=True)
@click.option("--amp", type=click.Choice(["off", *HALF]), default="bf16", show_default=True)
def main(model: str, batch_size: int, image_size: int, accumulate: int, amp: str) -> None:
    """Print operations and bytes by part, and faults; exit code 1 if one is not known."""
    config = TrainConfig(
        model=model,
        batch_size=batch_size,
        image_size=image_size,
        accumulate=accumulate,
        ema_decay=0.9999,
    )
    counted, least = count_step(config, amp=amp), floors(config, amp=amp)
    rows = [(part, counted.operations[part], counted.bytes[part], least[part]) for part in least]
    total = counted.operations.total(), counted.bytes.total(), sum(least.values())
    setting = f"{model}, {image_size} px, batch {batch_size} x {accumulate}, {amp}, an average"
    click.echo(f"{setting}: counted, not measured.\n\n| part | operations | GB | floor, GB |")
    click.echo("|---|---:|---:|---:|")
    for part, operations, moved, floor in [*rows, ("all", *total)]:
        click.echo(f"| {part} | {operations:,} | {moved / 1e9:,.2f} | {floor / 1e9:,.2f} |")
    for (part, fault), number in counted.faults.items():
        known = " (known)" * ((part, fault) in KNOWN_FAULTS)
        click.echo(f"\n{part}: {fault}: {number} times{known}")
    sys.exit(bool(counted.faults.keys() - set(KNOWN_FAULTS)))


if __name__ == "__main__":
    main()
