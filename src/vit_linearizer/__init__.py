"""vit-linearizer: turn a pretrained Vision Transformer into a linear-time backbone, from a folder of unlabelled images.

Importing this registers the students with timm. Every command of the command line is a function here, with its
configuration dataclass: ``distill(DistillConfig(...))``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import models as models
from .contracts import UserError
from .models.linear_vit import linearize
from .models.loading import load

if TYPE_CHECKING:
    from .commands.benchmark import BenchmarkConfig, benchmark
    from .commands.distill import DistillConfig, distill
    from .commands.doctor import DoctorConfig, doctor
    from .commands.embed import EmbedConfig, embed
    from .commands.evaluate import EvaluateConfig, evaluate
    from .commands.export import ExportConfig, export
    from .commands.finetune import FinetuneConfig, finetune
    from .commands.maps import MapsConfig, maps
    from .commands.predict import PredictConfig, predict
    from .commands.quickstart import QuickstartConfig, quickstart
    from .commands.report import ReportConfig, report
    from .commands.segment import SegmentConfig, segment

__version__ = "0.1.0"

#: Where the commands live; they are imported on first use, since training brings a good deal along.
_COMMANDS = {
    "BenchmarkConfig": "benchmark",
    "DistillConfig": "distill",
    "DoctorConfig": "doctor",
    "EmbedConfig": "embed",
    "EvaluateConfig": "evaluate",
    "ExportConfig": "export",
    "FinetuneConfig": "finetune",
    "MapsConfig": "maps",
    "PredictConfig": "predict",
    "QuickstartConfig": "quickstart",
    "ReportConfig": "report",
    "SegmentConfig": "segment",
    "benchmark": "benchmark",
    "distill": "distill",
    "doctor": "doctor",
    "embed": "embed",
    "evaluate": "evaluate",
    "export": "export",
    "finetune": "finetune",
    "maps": "maps",
    "predict": "predict",
    "quickstart": "quickstart",
    "report": "report",
    "segment": "segment",
}

__all__ = [
    "BenchmarkConfig",
    "DistillConfig",
    "DoctorConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "MapsConfig",
    "PredictConfig",
    "QuickstartConfig",
    "ReportConfig",
    "SegmentConfig",
    "UserError",
    "benchmark",
    "distill",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "linearize",
    "load",
    "maps",
    "predict",
    "quickstart",
    "report",
    "segment",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return getattr(importlib.import_module(f".commands.{_COMMANDS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
