"""The short causal depthwise convolution of Mamba-2, with its SiLU.

Source: Mamba-2 (arXiv 2405.21060): every channel sees its own last ``width`` tokens, itself included,

    y_{t,c} = SiLU(bias_c + sum_s weight_{c,s} x_{t - width + 1 + s, c}).
"""

import torch.nn.functional as F
from torch import Tensor

from .recording import exporting


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution over tokens, then SiLU.

    Args:
        x: ``[batch, L, channels]``, any strides.
        weight: ``[channels, 1, width]``, the parameter of a depthwise ``nn.Conv1d``.
        bias: ``[channels]``, or None.

    Returns:
        ``[batch, L, channels]``, contiguous.
    """
    channels, _, width = weight.shape
    padded = F.pad(x, [0, 0, width - 1, 0])
    if exporting():
        return F.silu(_shifted_sum(padded, weight, bias, x.shape[1]))
    # As a channels-last image one pixel wide the input needs no transpose. Padding it beforehand keeps the convolution
    # itself unpadded: on a CPU that form trains about three times faster than ``conv1d`` or a padded ``conv2d``.
    image = padded.unsqueeze(2).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight.unsqueeze(-1), bias, groups=channels)
    return F.silu(y.permute(0, 2, 3, 1).squeeze(2).contiguous())


def _shifted_sum(padded: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    """The same convolution as the equation says. An exported one would ask for the layout of its input: a guard on sizes."""
    y = padded.narrow(1, 0, length) * weight[:, 0, 0]
    for s in range(1, weight.shape[-1]):
        y = y + padded.narrow(1, s, length) * weight[:, 0, s]
    return y if bias is None else y + bias
