"""Measurements on frozen features: nearest neighbours, linear probes, and fidelity to a teacher. Accuracies in percent."""

from .classification import class_scores
from .features import collect_features
from .fidelity import FidelityMeter, activation_agreement, linear_cka, readout_cosine
from .held_out import StudentMeter
from .knn import knn_accuracy
from .linear_probe import few_shot_accuracy, fit_linear_probe, linear_probe_accuracy

__all__ = [
    "FidelityMeter",
    "StudentMeter",
    "activation_agreement",
    "class_scores",
    "collect_features",
    "few_shot_accuracy",
    "fit_linear_probe",
    "knn_accuracy",
    "linear_cka",
    "linear_probe_accuracy",
    "readout_cosine",
]
