"""What one training step does: images in, loss out, and how the result is judged on held-out images."""

from .attention_alignment import AttentionAlignment
from .base import Task
from .classification import Classification, ClassificationConfig
from .distillation import Distillation, DistillationConfig
from .segmentation import Segmentation, SegmentationConfig

__all__ = [
    "AttentionAlignment",
    "Classification",
    "ClassificationConfig",
    "Distillation",
    "DistillationConfig",
    "Segmentation",
    "SegmentationConfig",
    "Task",
]
