"""Measurements on frozen features: nearest neighbours, linear probes, and fidelity to a teacher. Accuracies in percent."""

from .features import collect_features
from .fidelity import activation_agreement, readout_cosine
from .knn import knn_accuracy
from .linear_probe import few_shot_accuracy, linear_probe_accuracy

__all__ = [
    "activation_agreement",
    "collect_features",
    "few_shot_accuracy",
    "knn_accuracy",
    "linear_probe_accuracy",
    "readout_cosine",
]
