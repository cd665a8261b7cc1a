"""A step on tensors that claim to be on CUDA: nothing is read, moved or cast for nothing."""

import sys
from pathlib import Path

import pytest
import torch
from test_train import make_batch, make_step
from torch._dynamo.testing import CompileCounterWithBackend

from wds_convnext.config import TrainConfig
from wds_convnext.training.model import model_for

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
import count_step
from cuda_by_name import DEVICE, autocast, backward, state_on_cuda, without_data

TINY = {
    "model": "test_convnext",
    "model_arg": ("depths=(1, 1, 1, 1)",),
    "image_size": 32,
    "batch_size": 4,
}


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
    config = TrainConfig(**TINY, **options)

    counted = count_step.count_step(config, amp=amp, num_classes=5, class_weights=amp == "fp16")

    assert counted.faults.keys() == set(known_faults)
    assert counted.product_dtypes == {count_step.HALF[amp]}
    assert all(counted.bytes[part] > 0 for part in count_step.floors(config, amp=amp))


def test_nodes_called_one_by_one_give_the_engines_gradients():
    """On real tensors, but for the order of sums; where gradients are there, they are added."""
    state, recipe = make_step()
    batch = make_batch(0)
    images = recipe.normalizer(batch.images)

    def gradients(go_back) -> list[torch.Tensor]:
        state.optimizer.zero_grad(set_to_none=True)
        for seed in (0, 1):
            torch.manual_seed(seed)
            go_back(torch.nn.functional.cross_entropy(state.model(images), batch.labels))
        return [p.grad for p in state.model.parameters()]

    expected = gradients(torch.Tensor.backward)
    torch.testing.assert_close(gradients(backward), expected)


def test_on_cuda_the_compiler_makes_one_graph_of_a_model():
    """One for training, with dropped paths, one for evaluation; channels_last and bf16."""
    config = TrainConfig(**TINY, drop_path_rate=0.3)
    counter = CompileCounterWithBackend("eager")
    with torch.device("meta"):
        plain = model_for(config, num_classes=5)

    with without_data(), autocast(torch.bfloat16):
        model = state_on_cuda(config, plain, amp="bf16").model
        compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
        images = torch.empty(4, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
        training = compiled(images)
        model.eval()
        with torch.no_grad():
            evaluation = compiled(images)

    assert counter.frame_count == 2
    assert training.dtype == evaluation.dtype == torch.bfloat16
    assert training.device.type == evaluation.device.type == "cuda"


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
