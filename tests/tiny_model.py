"""A ConvNeXt of 5,000 parameters, by timm's name `tiny_convnext`, so that a run fits into git."""

from timm.models import is_model, register_model
from timm.models.convnext import ConvNeXt


def tiny_convnext(pretrained: bool = False, **options) -> ConvNeXt:
    """One block in each of the four stages."""
    for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(unused, None)
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **options)


if not is_model("tiny_convnext"):
    register_model(tiny_convnext)
