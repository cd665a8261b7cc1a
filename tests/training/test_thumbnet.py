"""ThumbNet is a model like any of timm's: by name, from a seed, trained, evaluated, exported."""

import re

import pytest
import torch

import wds_convnext as wc
from wds_convnext.training.model import create_model, small_image_note
from wds_convnext.training.monitor import training_flops
from wds_convnext.training.stored import open_model
from wds_convnext.training.thumbnet import patch_filters

SMALL = ("widths=(8,16,16)",)


@pytest.mark.bits
def test_weights_depend_on_the_seed_but_for_the_first_filters():
    """Those are fixed numbers: the directions of a patch of 12 numbers, each with both signs."""
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(create_model("thumbnet", num_classes=5, model_args=SMALL).state_dict())

    same, other = models[1:]
    assert all(torch.equal(models[0][name], same[name]) for name in same)
    assert not torch.equal(same["head.weight"], other["head.weight"])
    assert torch.equal(other["stem.weight"], patch_filters())
    directions = torch.nn.functional.normalize(patch_filters().flatten(1))
    assert torch.allclose(directions[:12] @ directions[:12].T, torch.eye(12), atol=1e-6)
    assert torch.equal(directions[12:], -directions[:12])


@pytest.mark.parametrize("size", [16, 32, 47])
def test_images_of_any_size_give_logits(size):
    model = create_model("thumbnet", num_classes=5, model_args=[*SMALL, "depth=3"]).eval()
    images = torch.randn(2, 3, size, size)

    logits = model(images)

    assert logits.shape == (2, 5) and logits.isfinite().all()
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model.get_classifier()(features) * model.logit_scale, logits)


def test_its_flops_are_counted():
    """Three times those of the forward pass: multiplications and additions of 118 M weights."""
    model = create_model("thumbnet", num_classes=10)

    assert training_flops(model, 32) == pytest.approx(0.709e9, rel=0.01)


def test_a_run_is_exported_and_fine_tuned(shards, tmp_path):
    """With the widths it was made with, wherever it is read."""
    options = {"image_size": 32, "batch_size": 8, "epochs": 1, "workers": 0, "device": "cpu"}
    options |= {"shards": str(shards / "train.json"), "drop_path_rate": 0.0}
    out, folder = str(tmp_path / "run"), str(tmp_path / "model")
    wc.train(out=out, model="thumbnet", model_arg=SMALL, **options)

    wc.export(out, to=folder, device="cpu", workers=0, quiet=True)

    assert open_model(out).digest() == open_model(folder).digest()
    assert "import wds_convnext.training.thumbnet" in (tmp_path / "model/README.md").read_text()
    tuned = str(tmp_path / "tuned")
    wc.train(out=tuned, pretrained=f"local-dir:{folder}", max_steps=0, **options)
    one, other = (open_model(path).state for path in (out, tuned))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "model_args", "size", "expected"),
    [
        ("convnext_atto", [], 32, "1 x 1 places of it, .*patch_size=1"),
        ("convnext_atto", [], 127, "3 x 3"),
        ("convnext_atto", [], 128, None),
        ("convnext_atto", ["patch_size=1"], 32, None),
        ("resnet18", [], 32, "1 x 1 places of it, 4 x 4 are usual"),
        ("thumbnet", SMALL, 32, None),
    ],
)
def test_images_too_small_for_a_model_are_named(name, model_args, size, expected):
    """Too small are those of which the last stage sees less than 4 x 4 places."""
    note = small_image_note(create_model(name, num_classes=2, model_args=model_args), size)

    assert (note is None) == (expected is None)
    assert expected is None or re.search(expected, note)
