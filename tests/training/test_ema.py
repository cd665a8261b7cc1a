"""The average of the weights follows its formula, and is applied and restored to the bit."""

import copy

import pytest
import torch
from test_starting_weights import assert_same_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wds_convnext.training.ema import WeightAverage


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def step_away(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_follows_its_formula(decay):
    """average = decay * average + (1 - decay) * weights, from the first weights on; in float64."""
    model = tiny_model()
    average = WeightAverage(model, decay=decay)
    expected = {k: v.detach().double() for k, v in model.named_parameters()}

    for _ in range(20):
        step_away(model)
        average.update(frozen=torch.tensor(False))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()

    assert average.state_dict().keys() == expected.keys()
    for name, value in average.state_dict().items():
        # 20 steps, each rounding numbers below 16 to float32.
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=20 * 2**-20)


@pytest.mark.bits
def test_a_frozen_average_stays_to_the_bit():
    """From the step on whose loss was not finite nothing changes."""
    model = tiny_model()
    average = WeightAverage(model, decay=0.9)
    before = copy.deepcopy(average.state_dict())
    step_away(model)

    average.update(frozen=torch.tensor(True))

    assert_same_weights(average.state_dict(), before)


def test_an_update_reads_nothing_from_the_device():
    """A read of `frozen` would make the host wait in every step."""
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        average = WeightAverage(model, decay=0.9)
        frozen = torch.zeros((), dtype=torch.bool)

        average.update(frozen=frozen)

        assert average.state_dict()["weight"].shape == (4, 3)


@pytest.mark.bits
def test_applied_computes_with_the_average_and_puts_the_weights_back():
    """Both to the bit, also after an error; buffers stay the model's."""
    model = tiny_model()
    average = WeightAverage(model, decay=0.9)
    step_away(model)
    weights = copy.deepcopy(model.state_dict())
    averaged = copy.deepcopy(average.state_dict())

    with pytest.raises(KeyError), average.applied():
        inside = copy.deepcopy(model.state_dict())
        raise KeyError

    assert_same_weights(inside, weights | averaged)
    assert_same_weights(model.state_dict(), weights)
    assert_same_weights(average.state_dict(), averaged)
    assert not torch.equal(averaged["0.weight"], weights["0.weight"])


@pytest.mark.bits
def test_an_average_is_restored_from_its_state():
    """Another one of the same model goes on as if it were the first."""
    model = tiny_model()
    average = WeightAverage(model, decay=0.9)
    step_away(model)
    average.update(frozen=torch.tensor(False))
    restored = WeightAverage(model, decay=0.9)

    restored.load_state_dict(copy.deepcopy(average.state_dict()))
    for each in (average, restored):
        each.update(frozen=torch.tensor(False))

    assert_same_weights(restored.state_dict(), average.state_dict())
