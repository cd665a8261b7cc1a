"""A step on tensors that claim to be on CUDA: nothing is read, moved or cast for nothing."""

import sys
from pathlib import Path

import pytest
import torch
from test_train import make_batch, make_step

from wds_convnext.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
import count_step
from cuda_by_name import call_nodes


@pytest.mark.parametrize(
    ("amp", "options", "known_faults"),
    [
        ("bf16", {"ema_decay": 0.9, "loss": "bce"}, count_step.KNOWN_FAULTS[:1]),
        ("fp16", {"drop_path_rate": 0.3, "accumulate": 2}, count_step.KNOWN_FAULTS),
    ],
    ids=["bf16", "fp16"],
)
def test_a_step_on_cuda_reads_nothing_and_casts_nothing_for_nothing(amp, options, known_faults):
    """But for what is known: a block's shortcut, and weights once a batch. Matrix products are in
    half precision, and each part of the table moves something."""
    config = TrainConfig(model="test_convnext", image_size=32, batch_size=4, **options)

    counted = count_step.count_step(config, amp=amp, num_classes=5, class_weights=amp == "fp16")

    assert counted.faults.keys() == set(known_faults)
    assert counted.product_dtypes == {count_step.HALF[amp]}
    assert all(counted.bytes[part] > 0 for part in count_step.floors(config, amp=amp))


def test_nodes_called_one_by_one_give_the_engines_gradients():
    """On real tensors, but for the order of sums; where gradients are there, they are added."""
    state, recipe = make_step()
    batch = make_batch(0)
    images = recipe.normalizer(batch.images)

    def gradients(backward) -> list[torch.Tensor]:
        state.optimizer.zero_grad(set_to_none=True)
        for seed in (0, 1):
            torch.manual_seed(seed)
            loss = torch.nn.functional.cross_entropy(state.model(images), batch.labels)
            backward(loss)
        return [p.grad for p in state.model.parameters()]

    def by_nodes(loss: torch.Tensor) -> None:
        with torch.no_grad():
            call_nodes(loss)

    expected = gradients(torch.Tensor.backward)
    torch.testing.assert_close(gradients(by_nodes), expected)


@pytest.mark.parametrize(
    ("work", "fault"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense makes the host wait"),
        (lambda x: x.bfloat16().float(), "rounded and cast back"),
        (lambda x: (x.half(), x.half()), "cast a second time"),
        (lambda x: x + torch.ones(3), "add takes a tensor of the CPU"),
    ],
    ids=["read", "back", "twice", "cpu"],
)
def test_a_fault_is_found(work, fault):
    """What the law above forbids, done on purpose."""
    with count_step.Counting() as counting:
        work(torch.ones(3))

    assert fault in {what for _, what in counting.faults}


def test_bytes_are_those_that_an_operation_reads_and_writes():
    """Of 3 floats: a sum of two reads both and writes one, in place as well; a copy and zeros write
    alone what they overwrite; a view moves nothing."""
    x = torch.ones(3)
    moved = {}

    for name, work in {
        "add": lambda: x + x.clone(),
        "add_": lambda: x.add_(1),
        "copy_": lambda: x.copy_(x.view(3)),
        "zeros_like": lambda: torch.zeros_like(x),
        "foreach": lambda: torch._foreach_mul_([x], 2),
        "view": lambda: x.view(3, 1),
    }.items():
        with count_step.Counting() as counting:
            work()
        moved[name] = counting.bytes.total() // 12

    assert moved == {"add": 5, "add_": 2, "copy_": 2, "zeros_like": 1, "foreach": 2, "view": 0}
