"""What a training takes of a GPU's memory, counted without one, and the batch that would fit."""

import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.config import TrainConfig
from wds_convnext.training.memory import MemoryNeeds, batch_advice, fitting_batch, memory_needs


def test_needs_are_counted_on_tensors_without_data():
    """Weights, gradients and moments are 16 bytes a parameter, an average 4 more, weights in half
    precision 2; what an image keeps grows with its area, and is less in half precision."""
    config = TrainConfig(model="test_convnext", image_size=32)
    num_parameters = sum(p.numel() for p in timm.create_model("test_convnext").parameters())

    small = memory_needs(config, amp="off")
    large = memory_needs(TrainConfig(model="test_convnext", image_size=64), amp="off")
    half = memory_needs(config, amp="bf16")
    averaged = memory_needs(
        TrainConfig(model="test_convnext", image_size=32, ema_decay=0.9), amp="off"
    )

    assert small.fixed == 16 * num_parameters and averaged.fixed == 20 * num_parameters
    assert 17 * num_parameters < half.fixed <= 18 * num_parameters
    assert 3.5 < large.per_image / small.per_image <= 4
    assert 0.4 < half.per_image / small.per_image < 0.9


def test_what_an_image_keeps_is_what_autograd_saves():
    """Without the fake mode: bytes that the graph of a real forward pass holds, by storage."""
    config = TrainConfig(model="test_convnext", image_size=32, drop_path_rate=0.0)
    model = timm.create_model("test_convnext").train()
    weights = {p.data_ptr() for p in model.parameters()}

    def kept(num_images: int) -> int:
        saved: dict[int, torch.Tensor] = {}

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        images = torch.zeros(num_images, 3, 32, 32).to(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images)
        return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in weights)

    assert memory_needs(config, amp="off").per_image == kept(3) - kept(2)


@given(st.integers(1, 64), st.integers(1, 4), st.integers(1, 100), st.integers(0, 10_000))
def test_the_batch_that_fits_is_the_largest_that_makes_the_same_step(
    batch_size, accumulate, per_image, total
):
    """Smaller than before, since that one did not fit; none if not even one image does."""
    needs = MemoryNeeds(fixed=1000, per_image=per_image)

    found = fitting_batch(needs, batch_size=batch_size, accumulate=accumulate, total=total)

    room = (0.9 * total - 1000) / per_image
    smaller = [b for b in range(1, batch_size) if batch_size * accumulate % b == 0 and b <= room]
    if not smaller:
        assert found is None
    else:
        assert found == (max(smaller), batch_size * accumulate // max(smaller))


def test_the_advice_is_what_to_type():
    """convnext_base in bf16 at the article's batch, by figures like those of a small GPU."""
    config = TrainConfig(batch_size=160)
    needs = MemoryNeeds(fixed=1_400_000_000, per_image=150_000_000)

    fits = batch_advice(config, needs, total=16_000_000_000)
    nothing = batch_advice(config, needs, total=1_000_000_000)

    assert fits == (
        "An image takes about 150 MB, weights and optimizer 1.4 GB, and there are 16.0 GB: "
        "--batch-size 80 --accumulate 2 should fit."
    )
    assert nothing.endswith("choose a smaller --model or --image-size.")
