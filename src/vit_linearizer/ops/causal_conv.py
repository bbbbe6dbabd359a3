"""The short causal depthwise convolution of Mamba-2, with its SiLU.

Source: Mamba-2 (arXiv 2405.21060): every channel sees its own last ``width`` tokens, itself included,

    y_{t,c} = SiLU(bias_c + sum_s weight_{c,s} x_{t - width + 1 + s, c}).
"""

import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal depthwise convolution over tokens, then SiLU.

    Args:
        x: ``[batch, L, channels]``, any strides.
        weight: ``[channels, 1, width]``, the parameter of a depthwise ``nn.Conv1d``.
        bias: ``[channels]``.

    Returns:
        ``[batch, L, channels]``, contiguous.
    """
    channels, _, width = weight.shape
    # As a channels-last image one pixel wide the input needs no transpose. Padding it beforehand keeps the convolution
    # itself unpadded: on a CPU that form trains about three times faster than ``conv1d`` or a padded ``conv2d``.
    image = F.pad(x, (0, 0, width - 1, 0)).unsqueeze(2).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight.unsqueeze(-1), bias, groups=channels)
    return F.silu(y.permute(0, 2, 3, 1).squeeze(2).contiguous())
