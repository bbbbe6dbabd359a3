"""A student small enough to be tried in every way, and images for it."""

import timm
import torch

import vit_linearizer  # noqa: F401  # registers the students


def small(*, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(embed_dim=64, depth=4, img_size=64, num_classes=7)
    return timm.create_model("adventurer_tiny_patch16_224", **{**shape, **changes}).eval()


def images(height=64, width=64, *, batch=2, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))
