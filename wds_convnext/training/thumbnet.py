"""ThumbNet: a small fast network for small images, registered with timm as `thumbnet`.

The network of cifar10-airbench94 (Jordan 2024, arXiv:2404.00498), which goes back to Page's
ResNet-9 for DAWNBench, in its form: a 2x2 convolution to begin with, three groups of
convolutions that each halve the image, a maximum over all places, a linear classifier whose
logits are scaled down. Different here: the first convolution's weights, which there come from
the training images, are fixed numbers (see `patch_filters`), and are trained.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

__all__ = ["ThumbNet"]


class ThumbNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes); H and W at least 16.

    Args:
        widths: channels of the groups. Each halves the image, rounded down, before its norm.
        depth: convolutions in a group; from the third on, they add to what comes in.
        logit_scale: factor of the logits, which keeps the first steps calm.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        widths: tuple[int, ...] = (64, 256, 256),
        depth: int = 2,
        logit_scale: float = 1 / 9,
    ):
        super().__init__()
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.logit_scale = logit_scale
        filters = patch_filters()
        self.stem = nn.Conv2d(in_chans, len(filters), 2)
        self.act = nn.GELU()
        ins = (len(filters), *widths[:-1])
        self.groups = nn.Sequential(*(Group(i, o, depth) for i, o in zip(ins, widths)))
        self.head = nn.Linear(self.num_features, num_classes, bias=False)
        if in_chans == 3:
            nn.init.zeros_(self.stem.get_parameter("bias"))
            with torch.no_grad():
                self.stem.weight.copy_(filters)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.groups(self.act(self.stem(images)))

    def forward_head(self, maps: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        features = maps.amax((2, 3))
        return features if pre_logits else self.head(features) * self.logit_scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, bias=False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^groups\.(\d+)"}


class Group(nn.Module):
    """Convolutions with norms; the image is halved after the first of them."""

    def __init__(self, in_channels: int, channels: int, depth: int):
        super().__init__()
        ins = (in_channels, *[channels] * (depth - 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, channels, 3, padding=1, bias=False) for i in ins)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, momentum=0.4) for _ in ins)
        self.pool = nn.MaxPool2d(2)
        self.act = nn.GELU()
        for conv in self.convs:
            # The first filters hand their channel on as it is, the others are random.
            weight = conv.get_parameter("weight")
            nn.init.dirac_(weight[: weight.shape[1]])

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = self.act(self.norms[0](self.pool(self.convs[0](maps))))
        for number, (conv, norm) in enumerate(zip(self.convs[1:], self.norms[1:])):
            new = norm(conv(maps))
            maps = self.act(new + maps if number else new)
        return maps


def patch_filters() -> torch.Tensor:
    """Filters (24, 3, 2, 2) whose outputs on photographs have about the same variance.

    The sums and differences of a 2x2 patch, each of the sum and differences of its colors, scaled,
    and each of these with both signs, as an activation follows that keeps the positive side.
    On photographs these are nearly the principal components of patches.
    """
    # Deviations by color and by place of normalized photographs, CIFAR-10's; differences of colors
    # that JPEG leaves hardly anything of (0.01 to 0.08) are not blown up to more than 0.1.
    deviations = torch.tensor([[3.5, 0.65, 0.7, 0.25], [1.0, 0.1, 0.1, 0.1], [0.45, 0.1, 0.1, 0.1]])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    places = torch.einsum("ab,cd->acbd", signs, signs).reshape(4, 2, 2) / 2
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    colors = colors / colors.norm(dim=1, keepdim=True)
    filters = torch.einsum("kc,pij->kpcij", colors, places) / deviations[:, :, None, None, None]
    filters = filters.flatten(0, 1)
    return torch.cat([filters, -filters])


default_cfgs = generate_default_cfgs(
    {"thumbnet": {"input_size": (3, 32, 32), "first_conv": "stem", "classifier": "head"}}
)


@register_model
def thumbnet(pretrained: bool = False, **kwargs: Any) -> ThumbNet:
    """64, 256 and 256 channels: 2.0 million parameters, 0.71 GFLOP of training per 32x32 image."""
    return build_model_with_cfg(ThumbNet, "thumbnet", pretrained, **kwargs)
