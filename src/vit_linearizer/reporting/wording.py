"""What numbers are called on the page, how they are written, and which way is better. Their meaning: docs/metrics.md."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..benchmarking.cases import size_text
from .run_record import number


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that models are compared by.

    Attributes:
        title: in the head of a table.
        unit: ``%``, ``points``, ``s``, or empty.
        decimals: that are shown.
        better: 1 where more is better, -1 where less is, 0 where neither.
    """

    title: str
    unit: str = "%"
    decimals: int = 1
    better: int = 1


#: In the cell of a table that has nothing to show.
NONE = "-"

#: In the order of a table's columns.
METRICS = {
    "top1": Metric(title="top-1"),
    "top5": Metric(title="top-5"),
    "finetuned_100_percent": Metric(title="fine-tuned, all labels"),
    "finetuned_10_percent": Metric(title="fine-tuned, 10 % of the labels"),
    "miou": Metric(title="mIoU"),
    "pixel_accuracy": Metric(title="pixel accuracy"),
    "mean_accuracy": Metric(title="mean class accuracy"),
    "knn": Metric(title="kNN"),
    "linear_probe": Metric(title="linear probe"),
    "few_shot": Metric(title="few labels a class"),
    "corruption_top1": Metric(title="top-1, corrupted"),
    "corruption_drop": Metric(title="lost by corruption", unit="points", better=-1),
    "corruption_relative_drop": Metric(title="lost by corruption, relative", better=-1),
    "corruption_drop_over_teacher": Metric(title="loss over the teacher's", unit="", decimals=2, better=-1),
    "final_cosine": Metric(title="final cosine", unit="", decimals=3),
    "cka": Metric(title="CKA", unit="", decimals=3),
    "train_seconds": Metric(title="training", unit="s", decimals=0, better=0),
}
#: Any of them can stand on the accuracy axis of the trade-off; the first that most models have is taken.
ACCURACIES = ("finetuned_100_percent", "top1", "miou", "linear_probe", "knn", "few_shot", "finetuned_10_percent")

_WORDS = {
    "activation_matching": "activation matching",
    "masked_prediction": "masked prediction",
    "feature_regression": "feature regression",
    "feature_alignment": "feature alignment",
    "attention_alignment": "attention alignment",
    "cross_entropy": "cross entropy",
    "auxiliary_cross_entropy": "auxiliary cross entropy",
    "masked_cosine": "masked cosine",
}


def key_words(key: str) -> str:
    """A key of the metrics in words: ``agreement_stage2`` is ``agreement, stage 2``."""
    if key in METRICS:
        return METRICS[key].title
    if match := re.fullmatch(r"(agreement_stage|attention_error_block)(\d+)", key):
        return f"agreement, stage {match[2]}" if match[1] == "agreement_stage" else f"attention error, block {match[2]}"
    return _WORDS.get(key, key.replace("_", " "))


def shown(value: Any, metric: Metric | None = None) -> str:
    """A number as it stands in a table; a dash for none."""
    found = number(value)
    if found is None:
        return NONE
    if metric is None:
        return plain(found)
    return f"{found:.{metric.decimals}f}"


def plain(value: float) -> str:
    """Three digits without an exponent, as far as that can be read: 0.00123, 1.23, 123, 12,345."""
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2g}"


def percent(share: float) -> str:
    """``88 %`` for 0.88."""
    return f"{100 * share:.0f} %"


def times(value: float) -> str:
    """``1.05 times``, ``16 times``."""
    return f"{value:.0f} times" if value >= 20 else f"{value:.1f} times" if value >= 9.95 else f"{value:.2f} times"


def setting(value: Any) -> str:
    """A value of a configuration: a size as 224x224, a list with commas, nothing as a dash."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if len(value) == 2 and all(type(side) is int for side in value):
            return size_text(value)
        return ", ".join(setting(part) for part in value) or NONE
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def listed(words: Sequence[str], most: int = 4) -> str:
    """``a, b and c``; ``a, b, c, d and 3 more``."""
    words = [*words[:most], f"{len(words) - most} more"] if len(words) > most else list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def duration_words(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
