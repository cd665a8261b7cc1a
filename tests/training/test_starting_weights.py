"""A model's starting weights, of whatever trainer: those that fit are taken, others refused."""

import argparse
import copy
import re
import time

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from wds_convnext.errors import CheckpointError
from wds_convnext.training.checkpoint import save_checkpoint
from wds_convnext.training.ema import WeightAverage
from wds_convnext.training.model import create_model, init_from

HEAD = ["head.fc.weight", "head.fc.bias"]


def make(name="test_convnext", *, num_classes=4, seed=0) -> nn.Module:
    """A model whose weights depend on the seed."""
    torch.manual_seed(seed)
    return create_model(name, num_classes=num_classes)


def assert_same_weights(one: dict, other: dict, *, without=()) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - set(without):
        assert torch.equal(one[name], other[name]), name


def test_the_same_head_is_loaded_whole(tmp_path):
    """Every tensor, and it says so."""
    path = str(tmp_path / "weights.pth")
    source, model = make(seed=1), make(seed=2)
    torch.save(source.state_dict(), path)

    note = init_from(model, path)

    assert_same_weights(model.state_dict(), source.state_dict())
    num_tensors = len(source.state_dict())
    assert note == f"Started from {path}: {num_tensors} of {num_tensors} tensors."


@pytest.mark.parametrize(
    "name",
    [
        "test_convnext",
        "test_resnet",
        "test_vit",
        "test_efficientnet",
        "deit_tiny_distilled_patch16_224",
        "mobilenetv3_small_050",  # timm's own kind of linear layer
    ],
)
def test_a_head_of_another_size_starts_at_zero_and_the_note_says_so(tmp_path, name):
    """All the rest is loaded; whatever the head is called, and where there are two. All classes
    are as likely at first, so nothing random goes through what others trained."""
    path = str(tmp_path / "weights.pth")
    source, model = make(name, num_classes=9, seed=1), make(name, seed=2)
    torch.save(source.state_dict(), path)

    note = init_from(model, path)

    own, theirs = model.state_dict(), source.state_dict()
    head = [key for key in own if own[key].shape != theirs[key].shape]
    assert head
    assert not any(own[key].any() for key in head)
    assert_same_weights(own, theirs, without=head)
    assert note == (
        f"Started from {path}: {len(own) - len(head)} of {len(own)} tensors; "
        f"left fresh, at zero, being of another size: {', '.join(head)}."
    )


def test_a_head_of_several_layers_stays_random(tmp_path):
    """At zero, none of them would get a gradient."""
    path = str(tmp_path / "weights.pth")
    torch.save({k: v for k, v in make(seed=1).state_dict().items() if k not in HEAD}, path)
    model = make(seed=2)
    model.head.fc = nn.Sequential(nn.Linear(model.num_features, 8), nn.ReLU(), nn.Linear(8, 4))
    before = copy.deepcopy(model.head.fc.state_dict())

    note = init_from(model, path)

    assert_same_weights(model.head.fc.state_dict(), before)
    assert "; left fresh, being" in note


def test_weights_without_a_head_are_loaded(tmp_path):
    """As self-supervised training leaves them."""
    path = str(tmp_path / "weights.pth")
    weights = {k: v for k, v in make(seed=1).state_dict().items() if k not in HEAD}
    torch.save(weights, path)
    model = make(seed=2)

    note = init_from(model, path)

    assert note.endswith(f"left fresh, at zero, being of another size: {', '.join(HEAD)}.")
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("wrapped_as", [None, "model", "state_dict", "model_state_dict"])
def test_wrappers_around_weights_are_taken_off(tmp_path, prefix, wrapped_as):
    """torch.compile's and DistributedDataParallel's prefixes in any order, and usual nestings."""
    path = str(tmp_path / "weights.pth")
    source, model = make(seed=1), make(seed=2)
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({wrapped_as: weights, "epoch": 3} if wrapped_as else weights, path)

    init_from(model, path)

    assert_same_weights(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_a_checkpoint_of_ours_gives_its_average(tmp_path, name):
    """The averaged parameters, and the buffers of the model, which are not averaged."""
    path = str(tmp_path / "best.pt")
    source, model = make(name, seed=1), make(name, seed=2)
    average = WeightAverage(source, decay=0.5)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    save_checkpoint(path, {"model": source.state_dict(), "ema": average.state_dict(), "step": 3})

    init_from(model, path)

    assert_same_weights(model.state_dict(), source.state_dict() | average.state_dict())


@pytest.mark.parametrize(
    ("trained_for", "is_kept"),
    [
        (["ant", "bee", "cat", "dog"], True),
        (["ant", "bee", "dog", "cat"], False),
        (["emu", "fox", "gnu", "hen"], False),
        (None, True),  # a file that states no names
    ],
)
@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_a_head_is_kept_for_its_own_classes_only(tmp_path, name, trained_for, is_kept):
    """Names decide, not their number; all the rest is loaded in any case."""
    path = str(tmp_path / "best.pt")
    source, model = make(name, seed=1), make(name, seed=2)
    save_checkpoint(path, {"model": source.state_dict(), "facts": {"class_names": trained_for}})

    note = init_from(model, path, class_names=("ant", "bee", "cat", "dog"))

    weight = "head.fc.weight" if name == "test_convnext" else "head.weight"
    head = [weight, weight.replace("weight", "bias")]
    kept = source.state_dict()[weight]
    expected = kept if is_kept else torch.zeros_like(kept)
    assert torch.equal(model.state_dict()[weight], expected)
    assert ("of other classes (class " in note) == (not is_kept)
    assert_same_weights(model.state_dict(), source.state_dict(), without=head)


def test_safetensors_are_read(tmp_path):
    """The format of timm's weights on the Hugging Face hub."""
    path = str(tmp_path / "model.safetensors")
    source, model = make(seed=1), make(seed=2)
    save_file(source.state_dict(), path)

    init_from(model, path)

    assert_same_weights(model.state_dict(), source.state_dict())


def as_timms_script_saves(weights: dict) -> dict:
    """What timm's train.py writes with --model-ema."""
    args = argparse.Namespace(model="test_convnext", lr=0.1, mean=None, opt_betas=[0.9, 0.99])
    older = {key: value - 1 for key, value in weights.items()}
    return {"epoch": 3, "args": args, "state_dict": older, "state_dict_ema": weights, "version": 2}


def as_facebookresearch_saves(weights: dict) -> dict:
    """ConvNeXt's main.py: its names for the tensors, and its options."""
    rules = {
        r"^stem\.": "downsample_layers.0.",
        r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
        r"^stages\.(\d)\.blocks\.": r"stages.\1.",
        r"conv_dw": "dwconv",
        r"mlp\.fc": "pwconv",
        r"^head\.norm\.": "norm.",
        r"^head\.fc\.": "head.",
    }
    renamed = {}
    for key, value in weights.items():
        for pattern, name in rules.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return {"model": renamed, "args": argparse.Namespace(drop_path=0.1), "epoch": 299}


@pytest.mark.parametrize("saved", [as_timms_script_saves, as_facebookresearch_saves])
def test_checkpoints_of_other_trainers_are_read(tmp_path, saved):
    """With the options of their scripts inside, and their names for the same tensors."""
    path = str(tmp_path / "checkpoint.pth.tar")
    source, model = make(seed=1), make(seed=2)
    torch.save(saved(source.state_dict()), path)

    init_from(model, path)

    assert_same_weights(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("name", ["convnext_tiny", "resnet18"])
def test_torchvisions_weights_compute_what_they_do_there(tmp_path, name):
    """Logits equal to rounding, the names of the tensors translated."""
    path = str(tmp_path / "weights.pth")
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=3).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), path)
    model = create_model(name, num_classes=3)

    init_from(model, path)

    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), theirs(images), rtol=1e-3, atol=1e-4)


class Options:
    """A class of some script's own."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"model": {}, "cfg": Options()},
            f"it holds {__name__}.Options, which could run code",
        ),
        ({"model": {}, "when": time.gmtime()}, "it holds time.struct_time, which could run code"),
    ],
)
def test_what_torch_refuses_to_load_is_named(tmp_path, content, reason):
    """In one plain line, without the escape codes of torch's own message."""
    path = str(tmp_path / "weights.pth")
    torch.save(content, path)

    with pytest.raises(CheckpointError) as error:
        init_from(make(), path)

    assert reason in str(error.value) and "save its tensors alone" in str(error.value)
    assert str(error.value).isprintable() and "\\x1b" not in str(error.value)


def test_names_that_are_not_timms_are_said_to_be(tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({"encoder.layer.0.w": torch.ones(2)}, path)

    with pytest.raises(CheckpointError, match="give encoder.layer.0.w and all others the names"):
        init_from(make(), path)


def deeper() -> dict:
    """The model's own tensors, and those of one block more."""
    extra = {"stages.3.blocks.9.gamma": torch.ones(64)}
    return make(seed=1).state_dict() | extra


def narrower() -> dict:
    weights = make(seed=1).state_dict()
    return weights | {"stem.0.weight": weights["stem.0.weight"][:3]}


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (lambda: make("test_resnet").state_dict(), "(expected "),
        (deeper, "first stages.3.blocks.9.gamma (expected none, found (64,))"),
        (narrower, "first stem.0.weight (expected "),
        (dict, "first stem.0.weight (expected "),
        (lambda: {"epoch": 3}, "first stem.0.weight (expected "),
        (lambda: {3: torch.ones(1)}, "first stem.0.weight (expected "),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, weights, reason):
    """Also of a deeper one, whose first blocks would fit; nothing is loaded then."""
    path = str(tmp_path / "weights.pth")
    torch.save(weights(), path)
    model = make(seed=2)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(CheckpointError) as error:
        init_from(model, path)

    assert str(error.value).startswith(f"--init-from {path}: weights of another model: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert_same_weights(model.state_dict(), before)


@settings(max_examples=40)
@given(content=st.binary(max_size=60), extension=st.sampled_from(["pth", "safetensors"]))
def test_garbage_is_refused_in_one_line(tmp_path_factory, content, extension):
    """Whatever the bytes make the unpickler raise."""
    assert_refused(tmp_path_factory.getbasetemp() / f"garbage.{extension}", content)


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"\x80\x02.", b"PK\x03\x04", b"}", b"((("]
)
@pytest.mark.parametrize("extension", ["pt", "safetensors"])
def test_what_is_no_state_dict_is_refused(tmp_path, content, extension):
    """An empty file, text, half a pickle, half an archive."""
    assert_refused(tmp_path / f"garbage.{extension}", content)


def assert_refused(path, content: bytes) -> None:
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as error:
        init_from(nn.Identity(), str(path))

    assert str(error.value).startswith(f"--init-from {path}: not a readable state dict (")
    assert "\n" not in str(error.value)


def test_a_list_or_a_missing_file_is_refused(tmp_path):
    """With what was found."""
    torch.save([1, 2], tmp_path / "list.pt")

    with pytest.raises(CheckpointError, match="holds a list, no state dict"):
        init_from(make(), str(tmp_path / "list.pt"))
    with pytest.raises(CheckpointError, match="gone.pt: no such file. Give a timm state dict."):
        init_from(make(), str(tmp_path / "gone.pt"))
