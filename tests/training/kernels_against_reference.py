"""AdamP's kernels, in Triton's interpreter (TRITON_INTERPRET=1), against its operations in float64.

Every case is a pair of optimizers with equal weights and gradients, for a few steps. Run by
`test_adamp_triton`, in a process of its own: the interpreter is chosen when Triton is imported.
"""

import copy

import torch
from torch import nn

from wds_convnext.training import adamp, adamp_triton
from wds_convnext.training.adamp import AdamP
from wds_convnext.training.ema import WeightAverage

# Of all numbers of dimensions; one element, empty, rows that do not fill a block or fill several,
# fours and not; more rows than one program has, and than are decided upon at once.
SHAPES = [(), (1,), (5,), (20,), (0, 3), (3, 4), (9, 3, 2), (4, 3, 3, 3), (1, 12), (2, 1, 7, 7)]
LR, WEIGHT_DECAY, NUM_STEPS = 1e-2, 0.05, 4


def pair(dtype=torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same weights twice, in float32 and for the reference."""
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng) for shape in SHAPES]
    weights[7] = weights[7].contiguous(memory_format=torch.channels_last)
    return weights, [weight.to(dtype, copy=True) for weight in weights]


def gradients(kind: str, weights: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    """Random, or without a component along the rows, or along the whole, or along them alone."""
    rng = torch.Generator().manual_seed(step + 1)
    found = []
    for weight in weights:
        grad = torch.randn(weight.shape, generator=rng)
        if weight.ndim > 1 and weight.numel() and kind != "random":
            rows = (len(weight), -1) if kind == "channels" else (1, -1)
            p, g = weight.reshape(rows), grad.reshape(rows)
            along = p * (p * g).sum(1, keepdim=True) / (p * p).sum(1, keepdim=True)
            grad = (along if kind == "parallel" else g - along).reshape(weight.shape)
        found.append(grad.contiguous())  # of the tensor in channels_last, another order
    return found


def optimizers(weights, reference, **options) -> tuple[AdamP, AdamP]:
    """Two groups each, and a learning rate on the device, as training has it."""
    made = []
    for tensors in (weights, reference):
        groups = [
            {"params": [t for t in tensors if t.ndim <= 1], "weight_decay": 0.0},
            {"params": [t for t in tensors if t.ndim > 1], "lr": torch.tensor(LR).double() / 2},
        ]
        made.append(AdamP(groups, lr=LR, weight_decay=WEIGHT_DECAY, **options))
    return made[0], made[1]


def step(optimizer: AdamP, tensors, grads, *, by_kernels: bool) -> None:
    adamp.KERNEL_DEVICES = {"cpu"} if by_kernels else set()
    adamp._kernels.cache_clear()
    for tensor, grad in zip(tensors, grads):
        tensor.grad = None if grad is None else grad.to(tensor.dtype)
    optimizer.step()


def check_near(weights, reference, ours: AdamP, theirs: AdamP) -> None:
    """As near to float64 as operations in float32 are: a few units in the last place a step."""
    for one, other in zip(weights, reference):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-6, atol=2e-6)
        for name, value in ours.state.get(one, {}).items():
            expected = theirs.state[other][name]
            torch.testing.assert_close(value.double(), expected.double(), rtol=2e-5, atol=1e-6)


def check_kind(kind: str) -> None:
    """After a few steps; and the projection makes a difference exactly where it should fire."""
    weights, reference = pair()
    ours, theirs = optimizers(weights, reference)
    _, plain = pair()
    unprojected = optimizers(plain, plain, delta=-1.0)[0]
    for number in range(NUM_STEPS):
        grads = gradients(kind, weights, number)
        step(ours, weights, grads, by_kernels=True)
        step(theirs, reference, grads, by_kernels=False)
        step(unprojected, plain, grads, by_kernels=False)
    check_near(weights, reference, ours, theirs)
    has_fired = [not torch.equal(a, b) for a, b in zip(reference, plain) if a.ndim > 1]
    if kind in ("channels", "layer"):
        assert sum(has_fired) >= len(has_fired) - 1, (kind, has_fired)  # all but the empty one
    if kind == "parallel":
        assert not any(has_fired), (kind, has_fired)


def check_scale_and_skip() -> None:
    """Gradients are divided by the scale; where `found_inf` is set, nothing changes to the bit."""
    weights, reference = pair()
    ours, theirs = optimizers(weights, reference)
    ours.grad_scale = torch.full((1,), 4.0)
    ours.found_inf = torch.zeros(1)
    for number in range(2):
        grads = gradients("random", weights, number)
        step(ours, weights, [4 * grad for grad in grads], by_kernels=True)
        step(theirs, reference, grads, by_kernels=False)
    check_near(weights, reference, ours, theirs)
    before = copy.deepcopy((weights, ours.state_dict()["state"]))
    ours.found_inf = torch.ones(())
    step(ours, weights, [grad * torch.nan for grad in grads], by_kernels=True)
    torch.testing.assert_close((weights, ours.state_dict()["state"]), before, rtol=0, atol=0)


def check_average() -> None:
    """An average is moved along by the kernels, and by its update no more; not in a step that is
    skipped. A weight without a gradient is left to the update."""
    weights, reference = (nn.ParameterList(tensors) for tensors in pair())
    ours, theirs = optimizers(list(weights), list(reference))
    average, expected = (
        WeightAverage(module, decay=0.9, num_updates=4) for module in (weights, reference)
    )
    ours.average = average
    for number in range(3):
        is_skipped = torch.tensor(number == 1)
        ours.found_inf = theirs.found_inf = is_skipped.float()
        before = copy.deepcopy(average.state_dict())
        grads = gradients("channels", list(weights), number)
        grads[5] = None
        step(ours, weights, grads, by_kernels=True)
        moved = [name for name, at in average.state_dict().items() if not at.equal(before[name])]
        assert len(moved) == (0 if is_skipped else len(SHAPES) - 2), moved  # empty; no gradient
        step(theirs, reference, grads, by_kernels=False)
        for one in (average, expected):
            one.update(frozen=is_skipped)
        for name, at in expected.state_dict().items():
            torch.testing.assert_close(
                average.state_dict()[name].double(), at, rtol=2e-6, atol=2e-6
            )
    check_near(weights, reference, ours, theirs)
    assert average.num_updates == expected.num_updates == 7


def check_state_dict() -> None:
    """A run goes on with and without kernels, by state dicts of the same form, also where moments
    are not in their parameter's order; without a gradient, as if frozen, there is no state."""
    weights, reference = pair(torch.float32)
    frozen = weights[6].clone()
    for is_first in (True, False):  # first with kernels, then without
        ours, theirs = optimizers(weights, reference)
        for number in range(2):
            grads = gradients("random", weights, number)
            grads[6] = None
            step(ours, weights, grads, by_kernels=(number == 0) == is_first)
            step(theirs, reference, grads, by_kernels=False)
            check_near(weights, reference, ours, theirs)
            assert form(ours.state_dict()) == form(theirs.state_dict())
            for optimizer in (ours, theirs):
                state_dict = copy.deepcopy(optimizer.state_dict())
                moments = state_dict["state"][7]  # of the tensor in channels_last
                moments["exp_avg"] = moments["exp_avg"].contiguous()
                optimizer.load_state_dict(state_dict)
    assert torch.equal(weights[6], frozen) and weights[6] not in ours.state


def form(value):
    """A state dict with each tensor's dtype and layout in its place."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, dict):
        return {name: form(item) for name, item in value.items()}
    return [form(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    # Small, so that small tensors fill them: an interpreted program takes milliseconds.
    adamp_triton.BLOCK, adamp_triton.DECIDE_BLOCK, adamp_triton.MAX_PROGRAMS = 8, 4, 2
    for kind in ("random", "channels", "layer", "parallel"):
        check_kind(kind)
    check_scale_and_skip()
    check_average()
    check_state_dict()
