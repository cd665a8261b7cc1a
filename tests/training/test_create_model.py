"""Models by name: with the classes asked for, or an answer in one line."""

import pytest
import timm
import torch
from test_starting_weights import make

from wds_convnext.errors import UsageError
from wds_convnext.training.model import check_image_size, create_model
from wds_convnext.training.modelnames import check_model_name, model_names


@pytest.mark.bits
def test_a_model_has_the_classes_asked_for():
    """And fresh weights that depend on torch's seed alone."""
    images = torch.randn(2, 3, 32, 32)

    logits = make(num_classes=7)(images)

    assert logits.shape == (2, 7)
    assert torch.equal(logits, make(num_classes=7)(images))
    assert not torch.equal(logits, make(num_classes=7, seed=1)(images))


def test_stochastic_depth_rises_to_the_rate_asked_for():
    """Linearly over the blocks; none where the rate is 0."""
    model = create_model("convnext_atto", num_classes=2, drop_path_rate=0.2)

    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]

    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)
    assert not any(type(m).__name__ == "DropPath" for m in make().modules())


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("convnext_bsae", "convnext_base"),
        ("convnext-atto", "convnext_atto"),
        ("resnet_50", "resnet50"),
    ],
)
def test_an_unknown_model_names_the_nearest(name, suggestion):
    """In one line, with the option that named it."""
    with pytest.raises(UsageError) as error:
        create_model(name, num_classes=2)

    assert str(error.value).startswith(f"--model {name}: timm has no such model. Did you mean ")
    assert suggestion in str(error.value)


def test_a_model_without_stochastic_depth_says_so():
    """Rather than train without what was asked for."""
    with pytest.raises(UsageError, match="--model vgg11: does not take --drop-path-rate 0.2"):
        create_model("vgg11", num_classes=2, drop_path_rate=0.2)


def test_an_image_size_that_a_model_cannot_take_is_found_at_once():
    """A vision transformer takes the one it was made for; a convolutional network is lenient."""
    for name, size, made_for in [("test_vit", 31, 160), ("vit_tiny_patch16_224", 64, 224)]:
        with pytest.raises(UsageError, match=f"--image-size {size}: .*Use {made_for}, which it"):
            check_image_size(make(name), size)
    check_image_size(make("test_vit"), 160)
    check_image_size(make(), 64)


def test_names_of_models_are_known_without_importing_them():
    """Exactly timm's and ours; a tag, and a name that timm still maps to another, are taken."""
    names, _ = model_names()
    packages = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}

    assert names - {"thumbnet"} == {n for n, where in packages.items() if where.startswith("timm.")}
    check_model_name("thumbnet")
    check_model_name("convnext_tiny.fb_in22k")
    check_model_name("convnext_tiny_in22ft1k")
    with pytest.raises(UsageError, match="timm has no such model. Did you mean convnext_base"):
        check_model_name("convnext_bas")
