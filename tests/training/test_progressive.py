"""--image-size-schedule: what it refuses, and that a rehearsal of its sizes changes nothing.

That a resumed run is the uninterrupted one stands in test_resume, whose run has a schedule, that
all sizes are compiled before the first step in test_compiler; what each step gets, in test_sizes.
"""

import numpy as np
import pytest
import torch
from test_cli import call, train_args
from test_train import make_batch, make_step

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.stream.order import TrainOrder
from wds_convnext.training.schedule import image_sizes
from wds_convnext.training.step import rehearse, train_step

ORDER = TrainOrder(np.array([500]), seed=0, global_batch_size=10, shuffle_buffer=500)


def test_sizes_begin_at_their_share_of_the_runs_steps():
    config = TrainConfig(image_size_schedule="0:128,0.4:160,0.8:224", epochs=2)
    assert config.image_size == 224

    sizes = image_sizes(config, ORDER)

    assert (sizes.sizes, sizes.first_steps) == ((128, 160, 224), (0, 40, 80))
    assert image_sizes(TrainConfig(image_size=96), ORDER).num_steps(range(7)) == {96: 7}


def test_shares_stay_as_they_are_written():
    """Rounded, two may become one, or the last one the end of the run."""
    schedule = "0:128,0.4999999:160,0.5:192,0.9999999:224"

    assert TrainConfig(image_size_schedule=schedule).image_size_schedule == schedule


@pytest.mark.parametrize(
    "schedule",
    [
        *("", "224", "0:", ":224", "0.1:224", "0:128,0.5", "0:128;0.5:224", "0:128,1:224"),
        *("0:128,0:224", "0:224,0.5:128", "0:128,0.5:128", "0:4,0.5:224", "0:128,0.5:5000"),
        *("0:128,nan:224", "nan:224", "0:128,-0.5:224", "0:128,0.5:224.5", "0:128,0.6:160,0.3:224"),
        ",".join(f"{i / 10}:{8 + i}" for i in range(7)),
    ],
)
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(UsageError, match=r"--image-size-schedule .*: expected share of the run"):
        TrainConfig(image_size_schedule=schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--image-size-schedule": "0:16,0.5:24"}, "ends with 24, and --image-size is 32"),
        ({"--image-size-schedule": "0:16,0.001:32"}, "no step of the run's 25 has 16 px"),
        ({"--crop-padding": 16}, "--crop-padding 16: expected less than --image-size, here 16"),
        (
            {"--model": "test_vit", "--image-size": 160, "--model-arg": "dynamic_img_size=False"},
            "the model cannot take images of 16 px",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(shards, tmp_path, capsys, options, message):
    schedule = {"--image-size-schedule": f"0:16,0.5:{options.get('--image-size', 32)}"}

    code, _, error = call(capsys, *train_args(shards, tmp_path / "run", **schedule | options))

    assert code == 2
    assert message in " ".join(error.split())
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_a_rehearsal_changes_nothing(model):
    """Not even BatchNorm's statistics; the step after it is the step without it."""
    batch = make_batch(0)
    weights = []
    for rehearses in (False, True):
        state, recipe = make_step(model=model, drop_path_rate=0.0)
        if rehearses:
            rehearse(state, batch, sizes=[32, 48], evaluated=48, recipe=recipe)
            assert all(p.grad is None for p in state.model.parameters())
        train_step(state, [batch], lr=1e-3, recipe=recipe)
        weights.append(state.model.state_dict())

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
