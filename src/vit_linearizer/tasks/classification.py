"""Supervised classification: cross-entropy on the logits of a timm model.

Source: ViT-Linearizer (arXiv 2504.00037, table 9), which names label smoothing without its value; 0.1 is a choice.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import LossOutput, UserError
from ..evaluation import class_scores
from ..models.adapters import normalize
from .base import Task, compile_each_block


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """What a classifier is trained towards.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError("--label-smoothing", self.label_smoothing, "must be in [0, 1)")


class Classification(Task):
    """A timm model with its head, trained on labels.

    Args:
        model: a timm model with ``num_classes`` outputs.
        config: the loss.
    """

    score = ("top1", False)

    def __init__(self, model: nn.Module, config: ClassificationConfig):
        super().__init__()
        self.model = model
        self.config = config

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def compile_blocks(self) -> None:
        compile_each_block(self.model)

    def forward(self, batch: dict[str, Tensor]) -> LossOutput:
        """Loss of images ``[B, 3, H, W]`` in [0, 1] with labels ``[B]``."""
        logits = self.model(normalize(self.model, batch["images"]))
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.config.label_smoothing)
        return LossOutput(loss=loss, terms={"cross_entropy": loss.detach()})

    def evaluate(self, held_out: DataLoader, bank: DataLoader | None, device: torch.device) -> dict[str, float]:
        """``loss`` (cross-entropy without smoothing), ``top1`` and, of more than five classes, ``top5`` in percent."""
        self.eval()
        values = class_scores(self.model, held_out, device)
        self.train()
        return values
