"""Fine-tuning: learning rates by layer, frozen parts, early stopping, arguments of models."""

import copy
import json

import pytest
import timm
import torch
from conftest import TINY_RUN
from test_resume import assert_same
from timm.optim import param_groups_layer_decay
from torch import nn

from wds_convnext.config import EvalConfig, TrainConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.stream.stream import Batch
from wds_convnext.training.adamp import parameter_groups
from wds_convnext.training.augment import pixels_of
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.finetune import freeze, lr_scales
from wds_convnext.training.model import create_model, parse_model_args
from wds_convnext.training.state import build_state
from wds_convnext.training.step import build_recipe, train_step
from wds_convnext.training.train import train

MACHINE = Machine(World(), torch.device("cpu"), "off")
TINY = {
    flag.removeprefix("--").replace("-", "_"): int(value) if value.isdigit() else value
    for flag, value in TINY_RUN.items()
}
FINETUNE = {"layer_decay": 0.5, "head_lr": 1e-2, "freeze": "^stem", "ema_decay": 0.9}


def make_step(**options):
    """A state and its recipe, of 4 classes, in float32 on the CPU."""
    config = TrainConfig(**TINY | {"drop_path_rate": 0.0} | options)
    state, _ = build_state(config, num_classes=4, machine=MACHINE)
    recipe = build_recipe(
        config, state, num_classes=4, machine=MACHINE, preprocessing=pixels_of(config)
    )
    return state, recipe


def make_batch(image_size: int) -> Batch:
    images = torch.randint(
        256, (4, 3, image_size, image_size), generator=torch.Generator().manual_seed(0)
    )
    return Batch(images.to(torch.uint8), torch.arange(4), torch.ones(4, dtype=torch.bool), [])


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet", "test_resnet"])
def test_layer_decay_is_timms(name):
    """Every parameter's factor and weight decay, in whatever groups."""
    model = create_model(name, num_classes=4)

    scales = lr_scales(model, TrainConfig(layer_decay=0.7))
    groups = parameter_groups(model, weight_decay=0.05, lr_scales=scales)

    theirs = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    for key in ("lr_scale", "weight_decay"):
        own, reference = (
            {p: group[key] for group in each for p in group["params"]} for each in (groups, theirs)
        )
        assert own == pytest.approx(reference)
    assert len(set(scales.values())) > 3


def test_the_head_has_its_own_learning_rate():
    model = create_model("test_convnext", num_classes=4)

    scales = lr_scales(model, TrainConfig(lr=1e-3, head_lr=1e-2, layer_decay=0.5))

    assert scales["head.fc.weight"] == scales["head.fc.bias"] == 10
    assert scales["head.norm.weight"] == 1
    assert lr_scales(model, TrainConfig()) == {}


@pytest.mark.parametrize("optimizer", ["adamp", "adamw", "sgd", "muon", "lion"])
def test_behind_a_fresh_classifier_layers_wait_a_step_and_then_learn(tmp_path, optimizer):
    """The first gradient of everything before it is zero; after the second step weights have
    moved, by finite amounts."""
    path = str(tmp_path / "weights.pth")
    torch.save(create_model("test_resnet", num_classes=9).state_dict(), path)
    state, recipe = make_step(
        model="test_resnet", init_from=path, optimizer=optimizer, weight_decay=0.0
    )
    assert not state.model.fc.weight.any()
    before = copy.deepcopy(state.model.state_dict())
    moved = []
    for _ in range(2):
        train_step(state, [make_batch(32)], lr=1e-2, recipe=recipe)
        moved.append(not torch.equal(state.model.conv1[0].weight, before["conv1.0.weight"]))

    assert moved == [False, True]
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_a_fresh_classifier_is_not_frozen(tmp_path):
    """Nothing behind it would learn; one that was loaded may be."""
    for num_classes in (9, 4):
        path = str(tmp_path / f"weights-{num_classes}.pth")
        torch.save(create_model("test_convnext", num_classes=num_classes).state_dict(), path)

    with pytest.raises(UsageError, match=r"--freeze head: finds head\.fc\.weight, which is fresh"):
        make_step(freeze="head", init_from=str(tmp_path / "weights-9.pth"))
    make_step(freeze="head", init_from=str(tmp_path / "weights-4.pth"))


def test_a_step_moves_each_group_by_its_own_rate():
    state, recipe = make_step(head_lr=8e-3, lr=4e-3)

    train_step(state, [make_batch(32)], lr=2e-3, recipe=recipe)

    rates = {float(g["lr"]): g["lr_scale"] for g in state.optimizer.param_groups}
    assert rates == {2e-3: 1.0, 4e-3: 2.0}


def test_frozen_parts_stay_as_they_are():
    """Parameters, the statistics of their BatchNorm, and these in evaluation mode; others learn."""
    state, recipe = make_step(model="test_resnet", freeze="^(conv1|bn1|layer1)")
    before = copy.deepcopy(state.model.state_dict())

    for _ in range(2):
        train_step(state, [make_batch(32)], lr=1e-2, recipe=recipe)
        state.model.eval()  # as a validation does

    after = state.model.state_dict()
    frozen = [name for name in after if name.startswith(("conv1", "bn1", "layer1"))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["layer2.0.bn1.running_mean"], before["layer2.0.bn1.running_mean"])
    assert not torch.equal(after["fc.weight"], before["fc.weight"])


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("^stemm", "finds no parameter of the model. Did you mean stem"),
        ("[", "not a regular expression"),
        (".", "finds every parameter"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern, reason):
    with pytest.raises(UsageError, match=f"--freeze .*{reason}"):
        freeze(create_model("test_convnext", num_classes=4), pattern)


@pytest.mark.bits
@pytest.mark.slow
def test_a_fine_tuning_that_is_resumed_is_the_same_to_the_last_bit(shards, tmp_path):
    """With layer-wise rates, frozen parts and an average; and refuses to freeze anything else."""
    options = TINY | FINETUNE | {"shards": str(shards / "train.json"), "model": "test_resnet"}
    options |= {"freeze": "^(conv1|bn1)", "drop_path_rate": 0.0, "epochs": 2}

    train(**options, out=str(tmp_path / "whole"))
    train(**options, out=str(tmp_path / "parts"), max_steps=5)
    train(**options, out=str(tmp_path / "parts"), resume=str(tmp_path / "parts"))

    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for key in ("model", "ema", "optimizer", "step", "best_top1"):
        assert_same(one[key], two[key])
    with pytest.raises(CheckpointError, match="--freeze .* cannot change in mid-run"):
        again = options | {"freeze": "^conv1"}
        train(**again, out=str(tmp_path / "parts"), resume=str(tmp_path / "parts"))


@pytest.mark.slow
def test_a_run_that_no_longer_gets_better_finishes_early(shards, tmp_path, capsys):
    """With a line; as finished; and a resume does not go on."""
    options = TINY | {"shards": str(shards / "train.json"), "lr": 1e-12, "val_every": 1}
    options |= {"epochs": 5, "early_stop": 2, "warmup_lr": 0.0, "min_lr": 0.0}
    folder = tmp_path / "run"

    code = train(**options, out=str(folder))

    assert code == 0
    assert "Stopped early, after step " in capsys.readouterr().out
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    steps = load_checkpoint(folder / "last.pt")["step"]
    assert 0 < steps < 31  # of five epochs
    train(**options, out=str(folder), resume=str(folder))
    assert load_checkpoint(folder / "last.pt")["step"] == steps


@pytest.mark.slow
def test_no_steps_give_what_the_starting_weights_are_worth(shards, tmp_path):
    """And a checkpoint of them, which remembers the arguments that the model was made with."""
    options = TINY | {"shards": str(shards / "train.json"), "max_steps": 0}
    options |= {"model": "test_vit", "model_arg": ["img_size=32", "num_heads=2"]}

    train(**options, drop_path_rate=0.0, out=str(tmp_path / "run"))

    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint["step"] == 0
    assert checkpoint["facts"]["config"]["model_arg"] == ("img_size=32", "num_heads=2")
    config = EvalConfig(checkpoint=str(tmp_path / "run"), workers=0, device="cpu")
    result, _ = evaluate_checkpoint(config)
    assert result.top1 == checkpoint["best_top1"]


def test_arguments_of_models_are_literals_or_text():
    """Nothing is evaluated; what has an option of its own, or is about files, is refused."""
    texts = ["a=1", "b=[2, 3]", "c=None", "d=gelu", "e=__import__('os')", "f=" + "(" * 300]

    values = parse_model_args(texts)

    assert values == {
        "a": 1,
        "b": [2, 3],
        "c": None,
        "d": "gelu",
        "e": "__import__('os')",
        "f": "(" * 300,
    }
    for text in ["num_classes=3", "checkpoint_path=/tmp/x", "pretrained=True", "a=" + "1" * 2000]:
        with pytest.raises(UsageError, match="--model-arg"):
            parse_model_args([text])
    with pytest.raises(UsageError, match="--model-arg x: expected KEY=VALUE"):
        TrainConfig(model_arg=("x",))
    with pytest.raises(UsageError, match="test_convnext does not take it"):
        create_model("test_convnext", num_classes=2, model_args=("nonsense=1",))


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_every_model_of_timms_for_tests_trains_and_evaluates(name):
    """One step of fine-tuning: weights that can learn do, and the logits are finite."""
    size = timm.get_pretrained_cfg(name).input_size[1]
    state, recipe = make_step(model=name, image_size=size, layer_decay=0.9, lr=1e-2)
    before = [p.detach().clone() for p in state.model.parameters()]

    loss = train_step(state, [make_batch(size)], lr=1e-2, recipe=recipe)

    moved = [not torch.equal(p, b) for p, b in zip(state.model.parameters(), before)]
    assert torch.isfinite(loss) and sum(moved) > len(moved) / 2
    with torch.no_grad():
        logits = state.model.eval()(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 4) and isinstance(state.model, nn.Module)
    assert torch.isfinite(logits).all()
