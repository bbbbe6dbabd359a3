"""Supervised classification: cross-entropy on the logits of a timm model."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import LossOutput
from ..data.datasets import to_device
from ..models.adapters import normalize
from .base import Task, compile_each_block


class Classification(Task):
    """A timm model with its head, trained on labels.

    Args:
        model: a timm model with ``num_classes`` outputs.
        label_smoothing: of the cross-entropy.
    """

    score = ("loss", True)

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def compile_blocks(self) -> None:
        compile_each_block(self.model)

    def no_weight_decay(self) -> set[str]:
        return {f"model.{name}" for name in self.model.no_weight_decay()}  # type: ignore[operator]

    def forward(self, batch: dict[str, Tensor]) -> LossOutput:
        """Loss of images ``[B, 3, H, W]`` in [0, 1] with labels ``[B]``."""
        logits = self.model(normalize(self.model, batch["images"]))
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.label_smoothing)
        return LossOutput(loss=loss, terms={"cross_entropy": loss.detach()})

    @torch.no_grad()
    def evaluate(self, held_out: DataLoader, bank: DataLoader | None, device: torch.device) -> dict[str, float]:
        """``loss`` (cross-entropy) and ``top1`` in percent."""
        self.eval()
        loss, right, images = 0.0, 0, 0
        for batch in held_out:
            batch = to_device(batch, device)
            logits = self.model(normalize(self.model, batch["images"])).float()
            loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
            right += int((logits.argmax(1) == batch["labels"]).sum())
            images += len(logits)
        self.train()
        return {"loss": loss / images, "top1": 100 * right / images}
