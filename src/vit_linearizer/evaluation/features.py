"""The features that every accuracy reads: the mean final patch token of each centre view, with its label."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.datasets import nothing_readable, to_device
from ..models.adapters import extract_features


@torch.no_grad()
def collect_features(model: nn.Module, loader: DataLoader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Run a backbone over a labelled loader, in evaluation mode.

    Returns:
        ``[N, D]`` fp32 features and ``[N]`` labels, on the CPU.

    Raises:
        UserError: not one picture could be read.
    """
    was_training = model.training
    model.eval()
    features, labels = [], []
    for batch in loader:
        moved = to_device(batch, device)
        features.append(extract_features(model, moved["images"]).pooled.float().cpu())
        labels.append(moved["labels"].cpu())
    model.train(was_training)
    if not features:
        raise nothing_readable()
    return torch.cat(features), torch.cat(labels)
