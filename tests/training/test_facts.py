"""What a checkpoint says about its run is read back, by this version and from others."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_train import make_batch, make_step, run_config

from wds_convnext.config import EvalConfig, TrainConfig
from wds_convnext.errors import CheckpointError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import EvalTransform, Preprocessing, TrainTransform
from wds_convnext.training.checkpoint import DataFacts, Facts, load_checkpoint, save_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.distributed import Machine, World, announced_world
from wds_convnext.training.fitting import check_resumable
from wds_convnext.training.model import create_model
from wds_convnext.training.precision import CPU_CONVOLUTIONS
from wds_convnext.training.step import train_step
from wds_convnext.training.train import train

OLD = Path(__file__).parents[1] / "fixtures" / "run_0_1_0" / "run" / "last.pt"
FACTS = Facts(
    model="convnext_base",
    class_names=("ant", "bee"),
    batch_size=4,
    preprocessing=Preprocessing(32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    data=DataFacts("abc", seed=1, global_batch_size=8, shuffle_buffer=16, num_lanes=32),
    dataset="pictures",
    val_shards="/data/val.json",
    environment={"torch": "2.15.0"},
    config={"lr": 4e-3, "ema_decay": 0.0, "image_size": 32, "workers": 2},
)


def test_facts_read_back_as_they_were(tmp_path):
    """Through a file, from which only plain values are read."""
    save_checkpoint(tmp_path / "last.pt", {"facts": FACTS.to_dict()})

    assert Facts.from_dict(load_checkpoint(tmp_path / "last.pt")["facts"]) == FACTS


def test_facts_of_version_0_1_0_are_read():
    """Every field of the run in the fixture; it is stored in today's shape, but for what is new."""
    stored = load_checkpoint(OLD)["facts"]

    facts = Facts.from_dict(stored)

    assert (facts.model, facts.num_classes, facts.batch_size) == ("tiny_convnext", 4, 4)
    assert facts.preprocessing == Preprocessing(32)
    assert facts.data == DataFacts("3d03c9d06a162f92", 7, 8, 8, 32)
    assert facts.environment["wds_convnext"] == "0.1.0" and facts.config["epochs"] == 3
    again = facts.to_dict()
    assert again.keys() == stored.keys()
    assert again["data"] == stored["data"] | {"weighting": None, "repeats": 1}
    assert all(again[name] == stored[name] for name in stored.keys() - {"preprocessing", "data"})


def test_unknown_and_missing_facts_are_no_reason_to_refuse():
    """What a newer version added, and what has a safe default."""
    stored = FACTS.to_dict() | {"new": 1}
    stored["data"] = stored["data"] | {"new": 2}
    stored["preprocessing"] = stored["preprocessing"] | {"new": 3}
    del stored["environment"], stored["config"], stored["val_shards"], stored["num_classes"]
    del stored["preprocessing"]["crop_mode"], stored["preprocessing"]["interpolation"]

    facts = Facts.from_dict(stored)

    assert facts == replace(FACTS, environment={}, config={}, val_shards=None)


@pytest.mark.parametrize("amp, differs", [("off", False), ("bf16", True)])
def test_a_run_from_before_convolutions_were_named_says_what_differs(amp, differs):
    """They were torch's, in half precision on a CPU, too."""
    machine = Machine(World(), torch.device("cpu"), amp)
    then = replace(FACTS, environment={"amp": amp})
    now = replace(FACTS, environment={"amp": amp, "convolutions": machine.convolutions})

    assert [(d.name, d.then, d.now) for d in then.differences(now)] == (
        [("convolutions", "torch's", CPU_CONVOLUTIONS)] if differs else []
    )


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (None, "model"),
        (None, "class_names"),
        (None, "data"),
        (None, "preprocessing"),
        ("data", "seed"),
        ("preprocessing", "mean"),
        ("preprocessing", "image_size"),
    ],
)
def test_a_fact_without_a_safe_default_is_missed_by_name(part, name):
    """In one line: a guess would give wrong results."""
    stored = copy.deepcopy(FACTS.to_dict())
    del (stored[part] if part else stored)[name]

    with pytest.raises(CheckpointError, match=f"say nothing of '{name}'"):
        Facts.from_dict(stored)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_mode", "five"),
        ("interpolation", "lanczos"),
        ("std", [0.2, 0.2]),
        ("std", [0.2, 0.2, 0.0]),
        ("crop_ratio", 0.0),
        ("mean", 0.5),
    ],
)
def test_pixels_that_this_version_cannot_make_are_refused(name, value):
    """Rather than evaluate a model on pixels it was not trained on."""
    stored = FACTS.to_dict()
    stored["preprocessing"] |= {name: value}

    with pytest.raises(CheckpointError, match="facts cannot be read"):
        Facts.from_dict(stored)


def test_differences_name_what_is_another():
    """Of the inner parts only what both have: options come and go."""
    now = replace(
        FACTS,
        model="resnet50",
        data=replace(FACTS.data, seed=2),
        config={"lr": 1e-3, "ema_decay": 0.0, "new_option": 1},
    )

    found = list(FACTS.differences(now))

    assert found == [
        ("model", "model", "convnext_base", "resnet50"),
        ("data", "seed", 1, 2),
        ("config", "lr", 4e-3, 1e-3),
    ]
    assert not list(FACTS.differences(FACTS))


def test_a_resume_with_other_options_warns_of_those_that_matter():
    """Not of workers, nor of the image size twice, nor of options that one side does not know."""
    now = replace(
        FACTS,
        preprocessing=replace(FACTS.preprocessing, image_size=64, mean=(0.5, 0.5, 0.5)),
        config={"lr": 1e-3, "image_size": 64, "workers": 0, "new_option": 1},
    )
    warnings = []

    check_resumable(FACTS, now, warn=warnings.append)

    named = [warning.split()[2] for warning in warnings]
    assert sorted(named) == ["image_size", "lr", "mean"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("log_every", 7), ("max_bad_samples", 0.5), ("on_nonfinite", "skip"), ("keep", 0)]
    + [("reference_batch_size", 99), ("val_every", 3), ("save_every", 2), ("workers", 1)],
)
def test_options_that_change_no_bit_are_not_warned_about(name, value):
    """Nor is the batch that --lr belongs to, as long as nothing scales with it."""
    then = replace(FACTS, config=asdict(TrainConfig()))

    check_resumable(then, replace(FACTS, config=then.config | {name: value}), warn=pytest.fail)


def test_a_resume_that_names_other_starting_weights_is_refused():
    """They would not be looked at. The same file, wherever it now is, is no difference."""
    then = replace(FACTS, config={"init_from": "weights/a.pt"})

    check_resumable(then, replace(FACTS, config={"init_from": "/x/a.pt"}), warn=pytest.fail)
    with pytest.raises(CheckpointError, match="--init-from b.pt: a run that is resumed goes on"):
        check_resumable(then, replace(FACTS, config={"init_from": "b.pt"}), warn=pytest.fail)


def test_classes_that_differ_are_named():
    """The first of them, and what to do."""
    other = replace(FACTS, class_names=("ant", "cat"))

    with pytest.raises(CheckpointError, match="class 1 is 'cat' here and 'bee' there"):
        check_resumable(FACTS, other, warn=pytest.fail)


def test_a_resume_takes_the_options_of_the_optimizer_from_the_config():
    """Weight decay of the second group; moments and the last learning rate are the checkpoint's."""
    state, recipe = make_step(weight_decay=0.05)
    train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    resumed, _ = make_step(weight_decay=0.9)

    resumed.load_state_dict(state.state_dict())

    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.0, 0.9]
    assert float(resumed.optimizer.param_groups[0]["lr"]) == 1e-3
    one, other = (each.optimizer.state_dict()["state"] for each in (state, resumed))
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_default_workers_divide_the_cores_of_their_machine(monkeypatch):
    """Not of all machines: on 1, 2, 4 or 8 of them, each rank of 8 a machine has as many."""
    for num_machines in (1, 2, 4, 8):
        announced = {"RANK": 0, "WORLD_SIZE": 8 * num_machines, "LOCAL_RANK": 0}
        announced |= {"LOCAL_WORLD_SIZE": 8, "MASTER_ADDR": "here", "MASTER_PORT": 1}
        for name, value in announced.items():
            monkeypatch.setenv(name, str(value))
        assert announced_world().local_size == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert announced_world().local_size == 64


def test_one_value_makes_transforms():
    """Sizes and ratio as given."""
    preprocessing = Preprocessing(64, crop_ratio=0.5)

    assert preprocessing.train_transform(hflip=0.0) == TrainTransform(64, hflip=0.0)
    assert preprocessing.eval_transform() == EvalTransform(
        64,
        crop_ratio=0.5,
        fill=(124, 116, 104),  # of a border, as the mean
    )


@pytest.fixture(scope="module")
def trained_run(shards, tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("facts")
    train(run_config(shards, folder, max_steps=1))
    return folder / "run"


@pytest.mark.parametrize(
    "changes",
    [{"mean": [0.1, 0.2, 0.3]}, {"std": [1.0, 2.0, 0.5]}, {"crop_ratio": 0.4}],
    ids=str,
)
def test_a_checkpoint_is_evaluated_with_its_own_preprocessing(
    shards, trained_run, tmp_path, changes
):
    """Its mean, std and crop ratio are used: the same as evaluating by hand with these."""
    path = trained_run / "last.pt"
    options = {"device": "cpu", "batch_size": 13, "workers": 0}
    before, _ = evaluate_checkpoint(EvalConfig(checkpoint=str(path), **options))
    content = load_checkpoint(path)
    content["facts"]["preprocessing"] |= changes
    save_checkpoint(tmp_path / "changed.pt", content)

    result, _ = evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path / "changed.pt"), **options))

    preprocessing = Preprocessing.from_dict(content["facts"]["preprocessing"])
    assert result.loss == pytest.approx(loss_by_hand(shards, content, preprocessing), rel=1e-5)
    assert abs(result.loss - before.loss) > 1e-4 * before.loss


@torch.no_grad()
def loss_by_hand(shards: Path, content: dict, preprocessing: Preprocessing) -> float:
    """The mean loss over the validation images, in float32 from the pixels on."""
    dataset = open_dataset(str(shards / "validation.json"))
    transform = EvalTransform(preprocessing.image_size, crop_ratio=preprocessing.crop_ratio)
    order = EvalOrder(dataset.sizes)
    [batch] = ShardStream(dataset, order, batch_size=13, transform=transform)
    model = create_model("test_convnext", num_classes=4).eval()
    model.load_state_dict(content["model"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    logits = model((batch.images / 255 - mean) / std)
    return torch.nn.functional.cross_entropy(logits, batch.labels).item()


def test_a_state_takes_over_a_checkpoint_without_referring_to_its_file(tmp_path):
    """Deleted, its space is free at once: nothing is mapped any more."""
    trained, recipe = make_step(ema_decay=0.9)
    train_step(trained, [make_batch(0)], lr=1e-3, recipe=recipe)
    path = tmp_path / "last.pt"
    save_checkpoint(path, trained.state_dict())
    fresh, _ = make_step(ema_decay=0.9)

    content = load_checkpoint(path)
    was_mapped = str(path) in Path("/proc/self/maps").read_text()
    fresh.load_state_dict(content)
    del content

    assert was_mapped and str(path) not in Path("/proc/self/maps").read_text()
    one, other = (state.state_dict() for state in (trained, fresh))
    torch.testing.assert_close(other["model"], one["model"], rtol=0, atol=0)
    torch.testing.assert_close(other["ema"], one["ema"], rtol=0, atol=0)
    torch.testing.assert_close(other["optimizer"], one["optimizer"], rtol=0, atol=0)


def test_a_state_needs_weights_optimizer_and_step_and_ignores_what_it_does_not_know():
    """Sums and counts for the report start from scratch where a checkpoint has none."""
    trained, recipe = make_step()
    train_step(trained, [make_batch(0)], lr=1e-3, recipe=recipe)
    content = trained.state_dict() | {"new": 1}
    content["sums"] = {"interval": content["sums"]["interval"], "new": torch.zeros(2)}
    for name in ("best_top1", "epoch_seconds", "num_bad_samples", "scaler"):
        del content[name]
    fresh, _ = make_step()

    fresh.load_state_dict(content)

    assert fresh.step == 1 and fresh.best_top1 == -1.0
    assert fresh.sums.read().loss == trained.sums.read().loss
    for name in ("model", "optimizer", "step"):
        with pytest.raises(CheckpointError, match=f"holds no {name}."):
            make_step()[0].load_state_dict({k: v for k, v in content.items() if k != name})
