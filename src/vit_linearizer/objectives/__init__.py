"""What a student is trained towards: one file an idea, each (student Features, teacher Features, mask) -> scalar."""

from .activation_matching import MatchedTokens, activation_map, activation_matching
from .attention_alignment import attention_alignment, attention_errors
from .feature_alignment import feature_alignment
from .feature_regression import FeatureRegression
from .masked_prediction import MaskedPrediction, Target, teacher_target
from .masking import Masking, masked_count, sample_mask

__all__ = [
    "FeatureRegression",
    "MaskedPrediction",
    "Masking",
    "MatchedTokens",
    "Target",
    "activation_map",
    "activation_matching",
    "attention_alignment",
    "attention_errors",
    "feature_alignment",
    "masked_count",
    "sample_mask",
    "teacher_target",
]
