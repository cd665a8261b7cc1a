"""Weights of others come with their pixels: sources, what they imply, and what is refused."""

import io
import json
import math
import os
from dataclasses import replace

import pytest
import timm
import torch
from conftest import encode_image, run, train_command
from hub import serving
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from wds_convnext.config import DEFAULT_MODEL, EvalConfig, TrainConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.training.augment import pixels_of
from wds_convnext.training.checkpoint import Facts, load_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.model import create_model, init_from
from wds_convnext.training.pretrained import load_pretrained, pixels_of_timm, with_pretrained

TAG = "test_convnext.r160_in1k"
OWN_PIXELS = {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.9, "crop_mode": "squash"}


def make(name="test_convnext", *, num_classes=7, seed=1):
    torch.manual_seed(seed)
    return create_model(name, num_classes=num_classes)


def write_hub_folder(folder, *, label_names=None) -> dict:
    """A model in the Hub's layout, of 7 classes; gives its weights."""
    folder.mkdir(parents=True)
    model = make()
    stated = model.pretrained_cfg | OWN_PIXELS | {"num_classes": 7, "label_names": label_names}
    content = {
        "architecture": "test_convnext",
        "num_classes": 7,
        "model_args": {"num_classes": 7, "in_chans": 3, "ls_init_value": 0.5},
        "pretrained_cfg": stated,
    }
    (folder / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.state_dict()


def test_pixels_are_those_of_every_tag_of_timms():
    """Size, mean, std, interpolation and crop; the few that cannot be made are refused."""
    refused = []
    for name in timm.list_pretrained():
        stated = get_pretrained_cfg(name).to_dict()
        theirs = resolve_data_config(pretrained_cfg=stated)
        try:
            options = pixels_of_timm(stated, name)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused.append(name)
            continue
        pixels = pixels_of(TrainConfig(**options))
        size = theirs["input_size"][1]
        assert pixels.image_size == size
        assert pixels.mean == pytest.approx(theirs["mean"], abs=1e-8)
        assert pixels.std == pytest.approx(theirs["std"], abs=1e-8)
        assert pixels.interpolation == theirs["interpolation"]
        assert pixels.crop_mode == theirs["crop_mode"]
        assert round(size / pixels.crop_ratio) == math.floor(size / theirs["crop_pct"])

    assert all("sapiens2" in name or name.startswith("volo_d") for name in refused)
    assert len(refused) == 8


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(75, 100), (100, 75), (7, 90), (3, 3), (224, 201), (40, 64)])
def test_evaluation_images_are_timms_within_2_of_255(mode, interpolation, size):
    """Also where Pillow resizes columns before rows, and where timm rounds another way."""
    data = encode_image(sum(size), size=size)
    for image_size, crop in [(32, 0.875), (56, 0.9), (64, 0.95), (96, 1.0)]:
        stated = {
            "input_size": (3, image_size, image_size),
            "crop_pct": crop,
            "crop_mode": mode,
            "interpolation": interpolation,
        }
        theirs = create_transform(
            **stated, use_prefetcher=True, mean=(0.485, 0.456, 0.406), is_training=False
        )

        image = pixels_of(TrainConfig(**pixels_of_timm(stated, "x"))).eval_transform()(data)

        reference = torch.as_tensor(theirs(Image.open(io.BytesIO(data))))
        assert image.shape == reference.shape
        assert (image.int() - reference.int()).abs().max() <= 2


def test_options_are_stronger_than_what_a_model_states():
    config = TrainConfig(pretrained=TAG, mean="0.1,0.2,0.3", image_size=48)

    filled = with_pretrained(config)

    assert (filled.model, filled.image_size, filled.mean) == (TAG, 48, "0.1,0.2,0.3")
    assert (filled.std, filled.interpolation, filled.crop) == ("0.5,0.5,0.5", "bicubic", 0.95)
    assert with_pretrained(filled) is filled
    assert TrainConfig() == with_pretrained(TrainConfig())
    assert (TrainConfig().model, TrainConfig().image_size) == ("convnext_base", 224)


def test_a_folder_of_the_hubs_layout_gives_weights_pixels_and_arguments(tmp_path):
    weights = write_hub_folder(tmp_path / "tiny")
    config = with_pretrained(TrainConfig(pretrained=f"local-dir:{tmp_path / 'tiny'}"))
    model = make(num_classes=4, seed=2)

    note = load_pretrained(model, config, class_names=("ant", "bee", "cat", "dog"))

    assert (config.model, config.model_arg) == ("test_convnext", ("ls_init_value=0.5",))
    assert (config.mean, config.crop_mode) == ("0.1,0.2,0.3", "squash")
    assert "left fresh, at zero, being of another size: head.fc.weight, head.fc.bias" in note
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in weights.items() if not k.startswith("head.fc"))


def test_a_head_of_other_names_is_replaced(tmp_path):
    """Where the folder states the names of its classes."""
    names = [f"synset{number}" for number in range(7)]
    weights = write_hub_folder(tmp_path / "tiny", label_names=names)
    config = with_pretrained(TrainConfig(pretrained=str(tmp_path / "tiny")))

    for own_names, is_kept in [(names, True), (names[::-1], False)]:
        model = make(seed=2)
        load_pretrained(model, config, class_names=tuple(own_names))
        kept = torch.equal(model.state_dict()["head.fc.weight"], weights["head.fc.weight"])
        assert kept == is_kept


def test_names_of_another_implementation_are_matched_by_order(tmp_path):
    """If every shape and every last part of a name is the model's; else it is another model."""
    path, source, model = str(tmp_path / "w.pth"), make("test_efficientnet"), None
    renamed = {
        f"block{i}.{k.rpartition('.')[2]}": v
        for i, (k, v) in enumerate(source.state_dict().items())
    }
    torch.save({"model_ema": renamed}, path)
    model = make("test_efficientnet", num_classes=4, seed=2)

    note = init_from(model, path)

    assert "by their order, as the names are others" in note
    assert torch.equal(model.state_dict()["bn1.weight"], source.state_dict()["bn1.weight"])
    torch.save(dict(reversed(renamed.items())), path)
    with pytest.raises(CheckpointError, match="weights of another model"):
        init_from(model, path)


def test_tensors_of_no_part_of_the_model_are_left_out_and_named(tmp_path):
    path, source = str(tmp_path / "w.pth"), make()
    torch.save(source.state_dict() | {"teacher.fc.weight": torch.ones(2)}, path)

    note = init_from(make(seed=2), path)

    assert note.endswith("; left out, being no part of the model: teacher.fc.weight.")


@pytest.mark.slow
def test_a_run_from_the_hub(shards, tmp_path):
    """One command fetches, trains, and its checkpoint is evaluated with the model's pixels."""
    write_hub_folder(tmp_path / "hub" / "someone" / "tiny")
    options = {"--pretrained": "hf-hub:someone/tiny", "--max-steps": 1, "--image-size": 32}
    command = train_command(shards, tmp_path / "run", **options)
    at = command.index("--model")
    del command[at : at + 2]

    with serving(tmp_path / "hub") as environment:
        result = run(command, **environment)

    assert "Started from hf-hub:someone/tiny: " in result.stdout
    facts = Facts.from_dict(load_checkpoint(tmp_path / "run" / "last.pt")["facts"])
    assert facts.model == "test_convnext"
    assert facts.preprocessing.mean == (0.1, 0.2, 0.3)
    assert facts.preprocessing.crop_mode == "squash"
    assert facts.config["model_arg"] == ("ls_init_value=0.5",)
    config = EvalConfig(checkpoint=str(tmp_path / "run"), workers=0, device="cpu", amp="off")
    assert evaluate_checkpoint(config)[0].num_samples == 13


def test_without_a_network_one_line_names_the_file_to_fetch(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(CheckpointError) as error:
        with_pretrained(TrainConfig(pretrained="hf-hub:someone/tiny"))
    with pytest.raises(CheckpointError) as other:
        load_pretrained(make(), TrainConfig(pretrained=TAG, model=TAG), class_names=None)

    assert "someone/tiny/resolve/main/config.json" in str(error.value)
    assert "as --pretrained local-dir:FOLDER." in str(error.value)
    assert f"timm/{TAG}/resolve/main/model.safetensors" in str(other.value)
    assert str(other.value).endswith(f"--model {TAG} --pretrained model.safetensors.")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pretrained": "resnet50.a1_in2k"}, "Did you mean resnet50"),
        ({"pretrained": "default", "model": "test_convnexd"}, "Did you mean test_convnext"),
        ({"pretrained": TAG, "model": "resnet18"}, f"weights of {TAG}, and --model is resnet18"),
        ({"pretrained": "gone.safetensors"}, "no such file or folder"),
        ({"pretrained": "volo_d5_512.sail_in1k"}, "other pixels than are made here"),
        ({"pretrained": "default", "init_from": "x.pt"}, "Give the file to one of them"),
    ],
)
def test_a_source_that_is_not_understood_is_refused_in_one_line(options, reason):
    with pytest.raises((UsageError, CheckpointError), match=reason) as error:
        with_pretrained(TrainConfig(**options))

    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"architecture": 3}', '{"architecture": "x", "model_args": [1]}']
)
def test_a_config_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(CheckpointError, match=f"--pretrained {tmp_path}: .*config.json"):
        with_pretrained(TrainConfig(pretrained=str(tmp_path)))


def test_weights_are_never_trusted_to_run_code(tmp_path):
    """A pickle that would make a folder is refused, and the folder is not there."""
    path, victim = tmp_path / "w.pth", tmp_path / "victim"

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(victim),)

    torch.save({"model": Malice()}, path)

    with pytest.raises(CheckpointError, match="could run code"):
        with_pretrained(TrainConfig(pretrained=str(path), model="test_convnext"))
    assert not victim.exists()


@pytest.mark.parametrize("model", [None, "thumbnet", "test_convnext"])
def test_a_file_of_others_gives_the_pixels_of_its_model(tmp_path, model):
    """Of the default model, where none is named; a tag that the model lacks is one line."""
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")

    config = with_pretrained(TrainConfig(pretrained=str(tmp_path / "w.pth"), model=model))

    assert config.model == (model or DEFAULT_MODEL)
    assert config.image_size is not None and config.mean is not None
    with pytest.raises(UsageError, match="--model test_convnext.bogus"):
        with_pretrained(replace(config, model="test_convnext.bogus", mean=None))
