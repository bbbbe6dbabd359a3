"""What one training step does: images in, loss out, and how the result is judged on held-out images."""

from .base import Task
from .classification import Classification
from .distillation import Distillation, DistillationConfig

__all__ = ["Classification", "Distillation", "DistillationConfig", "Task"]
