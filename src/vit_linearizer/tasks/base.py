"""What the training loop needs to know of a task, and nothing more."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import LossOutput
from ..models.layer_groups import layers_below
from ..models.loading import save_model_folder


class Task(nn.Module, ABC):
    """A module whose parameters that require gradients, once it has begun, are all that training changes.

    Attributes:
        uses_every_parameter: False when some parameter gets no gradient (distributed training must then look for them).
        score: the metric of `evaluate` that decides which weights are best, and whether lower is better.
    """

    uses_every_parameter: bool = True
    score: tuple[str, bool] = ("loss", True)

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The model that a run leaves behind."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> LossOutput:
        """Loss of one batch (images in [0, 1]); all terms are means over the batch."""

    @abstractmethod
    def evaluate(self, held_out: DataLoader, bank: DataLoader | None, device: torch.device) -> dict[str, Any]:
        """Metrics on held-out pictures; ``bank`` holds labelled training pictures where there are labels.

        Numbers go into the run's metrics; what else there is (a score of every class) into its ``evaluation.json`` alone.
        """

    @abstractmethod
    def compile_blocks(self) -> None:
        """Put ``torch.compile`` around the mixers and MLPs of all blocks, see `compile_each_block`."""

    def begin(self, device: torch.device) -> None:
        """Called before the first step: say which parameters train, and move what is no part of the module (a teacher)."""

    def save(self, folder: Path) -> None:
        """Write what the run leaves behind, in timm's folder format."""
        save_model_folder(self.backbone, folder)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond norms and biases (timm's convention): the backbone's."""
        return {self._backbone_prefix + name for name in self.backbone.no_weight_decay()}  # type: ignore[operator]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float]]:
        """Layer of each parameter, for a learning rate that decays from layer to layer (timm's convention).

        The backbone's layers are its own; all else stands behind its last one.
        """
        return layers_below(self._backbone_prefix, self.backbone, coarse=coarse)

    @property
    def _backbone_prefix(self) -> str:
        return next(name for name, module in self.named_modules() if module is self.backbone) + "."


def train_only(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let these parameters of a module require gradients, and no others."""
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def compile_each_block(model: nn.Module, **options: Any) -> None:
    """``torch.compile`` on the mixers (or attentions) and MLPs of a timm backbone: compiled once, used by every block.

    Whole blocks would be compiled anew for each: their drop path and reading order are constants that differ.

    Args:
        model: with ``layers`` (Adventurer) or ``blocks`` (ViT).
        **options: of ``torch.compile``.
    """
    for block in getattr(model, "layers", None) or getattr(model, "blocks"):  # noqa: B009  # either is a ModuleList
        for part in ("mixer", "attn", "mlp"):
            if hasattr(block, part):
                getattr(block, part).compile(**options)
