"""Pictures with a class for every pixel: which there are, what is shown of them, and their batches."""

from .datasets import SegmentationEvaluationSet, SegmentationTrainingSet, evaluation_loader
from .masks import IGNORED
from .sets import SegmentationKind, SegmentationSource, open_segmentation
from .views import SegmentationView, SegmentationViewConfig, evaluation_view

__all__ = [
    "IGNORED",
    "SegmentationEvaluationSet",
    "SegmentationKind",
    "SegmentationSource",
    "SegmentationTrainingSet",
    "SegmentationView",
    "SegmentationViewConfig",
    "evaluation_loader",
    "evaluation_view",
    "open_segmentation",
]
