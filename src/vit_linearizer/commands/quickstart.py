"""``quickstart``: the whole story on handwritten digits, on two CPU cores, without network.

A small ViT is trained on labels, a small Adventurer is distilled from it without labels, and both are judged on digits that
nothing was trained or tuned on, beside the same student untrained and the same student trained by plain regression. Then
the student is fine-tuned on all labels and on a tenth of them, beside one that starts from scratch, and student and teacher
are timed on larger and larger images.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from rich.table import Table
from torch.utils.data import DataLoader

from ..data.datasets import CentreSet, centre_loader
from ..data.sources import DigitsSource
from ..evaluation import class_scores, collect_features, few_shot_accuracy, knn_accuracy, linear_probe_accuracy
from ..models.loading import create_backbone, load, save_model_folder
from ..recipes import DISTILLATION, find_recipe
from ..training.progress import console, show_messages
from ..training.run_folder import write_atomically
from .benchmark import BenchmarkConfig, benchmark
from .distill import DistillConfig, distill
from .finetune import FinetuneConfig, finetune

logger = logging.getLogger("vit_linearizer")

_SIZE = 32
#: Teacher and student: the same width, depth and 64 patches.
_SHAPE = dict(img_size=_SIZE, patch_size=4, embed_dim=96, depth=4)
_SMOKE_SHAPE = dict(img_size=_SIZE, patch_size=8, embed_dim=32, depth=4)
_STUDENT = "adventurer_tiny_patch16_224"
_ROWS = ("teacher", "distilled", "untrained", "regression")
#: With patches of 4: 256 to 16,384 tokens.
_LARGER_SIZES = ("64", "128", "256", "512")
_COLUMNS = {"top1": "top-1", "knn": "kNN", "linear_probe": "linear probe", "few_shot": "5 labels a class"}
_TUNING_COLUMNS = {"finetuned_100_percent": "all labels", "finetuned_10_percent": "10 % of them"}
#: How students are fine-tuned with a share of the labels: the same for the distilled one and the one from scratch.
_TUNING: dict[float, dict[str, Any]] = {
    1.0: {"epochs": 12, "evaluate_every": 3},
    0.1: {"epochs": 60, "evaluate_every": 15},
}
_TUNED = ((1.0, "teacher"), (1.0, "distilled"), (0.1, "distilled"), (0.1, "supervised"))
_TUNED_ROWS = {
    "teacher": "teacher (a ViT from scratch)",
    "distilled": "distilled student",
    "supervised": "student from scratch",
}
_TUNED_IN_FULL = ((1.0, "supervised"), (0.1, "teacher"))


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a small ViT on digits, distil it without labels, and compare.

    Attributes:
        out: folder for the runs, quickstart.json and benchmark.json, .md and .png.
        seed: of everything random.
        full: fine-tune from scratch with all labels too, and a ViT with a tenth; some minutes more.
        smoke: one epoch with tiny models, to see that everything runs.
        debug: show the traceback of an error.
    """

    out: str
    seed: int = 0
    full: bool = False
    smoke: bool = False
    debug: bool = False


def quickstart(config: QuickstartConfig) -> dict[str, dict[str, float]]:
    """Run the whole story; see `QuickstartConfig`. A killed one goes on where it was.

    Returns:
        What ``quickstart.json`` holds: accuracies in percent and seconds, by model and metric.
    """
    show_messages()
    out = Path(config.out)
    seconds: dict[str, float] = {}
    models: dict[str, nn.Module] = {}

    console.rule("a ViT teacher, trained on labels")
    started = time.perf_counter()
    teacher = _train_teacher(out, config, evaluate_every=7)
    seconds["teacher"], models["teacher"] = time.perf_counter() - started, load(teacher)

    baseline = asdict(find_recipe(DISTILLATION, "regression", _STUDENT).objectives)
    for row, objectives in (("distilled", {}), ("regression", baseline)):
        console.rule(f"{row}: a linear-time student from the teacher, without labels")
        started = time.perf_counter()
        settings: dict[str, Any] = {"epochs": 1} if config.smoke else {}
        run = distill(
            DistillConfig(
                teacher=str(teacher),
                student=_STUDENT,
                student_args=tuple(f"{name}={value}" for name, value in _shape(config).items()),
                data="builtin:digits-train",
                out=str(out / row),
                recipe="digits",
                seed=config.seed,
                evaluate_every=4,
                **settings,
                **objectives,
            )
        )
        seconds[row], models[row] = time.perf_counter() - started, load(run)
    torch.manual_seed(config.seed)
    models["untrained"] = create_backbone(_STUDENT, field="--student", **_shape(config)).eval()
    seconds["untrained"] = 0.0

    console.rule("judged on digits that nothing was trained or tuned on")
    results = {row: _judge(models[row], draws=2 if config.smoke else 20) for row in _ROWS}
    for row, values in results.items():
        values["train_seconds"] = round(seconds[row], 1)
    for fraction, row in _TUNED + (_TUNED_IN_FULL if config.full else ()):
        name = f"finetuned_{fraction:.0%}".replace("%", "_percent")
        console.rule(f"{row}, fine-tuned on {fraction:.0%} of the labels")
        results.setdefault(row, {})[name] = _tune(row, fraction, teacher, out, config)
    write_atomically(out / "quickstart.json", json.dumps(results, indent=2) + "\n")
    console.rule("speed and memory on larger images")
    speed = benchmark(
        BenchmarkConfig(
            models=(str(teacher), str(out / "distilled")),
            image_sizes=_LARGER_SIZES,
            out=str(out),
            repeats=3,
            device="cpu",
            precision=("fp32",),
            smoke=config.smoke,
        )
    )
    console.print(_table(results))
    console.print(_tuning_table(results))
    logger.info(_in_words(results))
    logger.info(_tuning_in_words(results))
    logger.info(_speed_in_words(speed["rows"]))
    return results


def _shape(config: QuickstartConfig) -> dict[str, Any]:
    return _SMOKE_SHAPE if config.smoke else _SHAPE


def _train_teacher(out: Path, config: QuickstartConfig, name: str = "teacher", **settings: Any) -> Path:
    """A small ViT with supervision."""
    start = out / "teacher-start"
    if not start.exists():
        torch.manual_seed(config.seed)
        shape = _shape(config)
        model = timm.create_model("vit_tiny_patch16_224", num_heads=shape["embed_dim"] // 32, num_classes=10, **shape)
        # Attention alone does not know where a patch is; timm's usual 0.02 for positions cost a small set half its epochs.
        nn.init.normal_(model.get_parameter("pos_embed"), std=0.5)
        save_model_folder(model, start)
    # bf16 is no faster for so small a ViT
    return _finetune(str(start), out / name, config, precision="fp32", **settings)


def _finetune(model: str, out: Path, config: QuickstartConfig, **settings: Any) -> Path:
    """The ordinary fine-tuning, on the digits' training part."""
    if config.smoke:
        settings["epochs"] = 1
    return finetune(
        FinetuneConfig(model=model, data="builtin:digits-train", out=str(out), recipe="digits", seed=config.seed, **settings)
    )


def _tune(row: str, fraction: float, teacher: Path, out: Path, config: QuickstartConfig) -> float:
    """Top-1 on the test digits of one way to a classifier with a share of the labels."""
    settings: dict[str, Any] = dict(_TUNING[fraction], label_fraction=fraction)
    place = out / f"{row}-{fraction:.0%}".replace("%", "-labels")
    if row == "teacher":
        run = teacher if fraction == 1 else _train_teacher(out, config, place.name, **settings)
    elif row == "distilled":
        run = _finetune(str(out / "distilled"), place, config, **settings)
    else:
        shape = tuple(f"{name}={value}" for name, value in _shape(config).items())
        settings |= {"model_args": shape, "model_pretrained": False, "global_pool": "avg"}
        run = _finetune(_STUDENT, place, config, **settings)
    return class_scores(load(run), _loader("test"), torch.device("cpu"))["top1"]


def _loader(split: str) -> DataLoader:
    source = DigitsSource(split)
    return centre_loader(CentreSet(source, np.arange(len(source)), (_SIZE, _SIZE)), batch_size=64)


def _judge(model: nn.Module, *, draws: int) -> dict[str, float]:
    """Accuracies of frozen features (and of the head, where there is one) on the test digits."""
    cpu = torch.device("cpu")
    train_set, test_set = (collect_features(model, _loader(split), cpu) for split in ("train", "test"))
    values = {}
    if getattr(model, "num_classes", 0) > 0:
        values["top1"] = class_scores(model, _loader("test"), cpu)["top1"]
    values["knn"] = knn_accuracy(*train_set, *test_set)
    values["linear_probe"] = linear_probe_accuracy(*train_set, *test_set)
    values["few_shot"] = few_shot_accuracy(*train_set, *test_set, draws=draws)
    return values


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="held-out digits, accuracy in %")
    table.add_column("frozen features")
    for heading in (*_COLUMNS.values(), "training"):
        table.add_column(heading, justify="right")
    for row in _ROWS:
        table.add_row(row, *_cells(results[row], _COLUMNS), f"{results[row]['train_seconds']:.0f} s")
    return table


def _tuning_table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="held-out digits, top-1 in %")
    table.add_column("fine-tuned")
    for heading in _TUNING_COLUMNS.values():
        table.add_column(heading, justify="right")
    for row, label in _TUNED_ROWS.items():
        table.add_row(label, *_cells(results[row], _TUNING_COLUMNS))
    return table


def _cells(values: Mapping[str, float], columns: Mapping[str, str]) -> list[str]:
    return [f"{values[name]:.1f}" if name in values else "-" for name in columns]


def _in_words(results: dict[str, dict[str, float]]) -> str:
    """The table in one line, whatever it says."""
    distilled, teacher, untrained, regression = (results[row] for row in ("distilled", "teacher", "untrained", "regression"))

    def against(other: dict[str, float]) -> str:
        knn, few = (distilled[name] - other[name] for name in ("knn", "few_shot"))
        return f"{knn:+.1f} kNN and {few:+.1f} with 5 labels"

    return (
        f"The distilled student, which saw no label, stands at {against(teacher)} against its teacher, {against(untrained)} "
        f"against itself untrained, and {against(regression)} against plain feature regression."
    )


def _tuning_in_words(results: dict[str, dict[str, float]]) -> str:
    """What fine-tuning gave, whatever that is."""
    most, tenth = _TUNING_COLUMNS
    distilled, teacher, supervised = (results[row] for row in ("distilled", "teacher", "supervised"))
    return (
        f"Fine-tuned on all labels the distilled student stands at {distilled[most] - teacher[most]:+.1f} points against "
        f"its teacher; on a tenth of them at {distilled[tenth] - supervised[tenth]:+.1f} against the same from scratch."
    )


def _speed_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the student stands to its teacher at the smallest and the largest size, whatever that is."""
    said = []
    for row in [row for row in rows if row.get("speedup")][:: max(1, len(_LARGER_SIZES) - 1)]:
        (speedup,), (memory,) = row["speedup"].values(), row["memory_ratio"].values()
        said.append(f"{speedup:.2f} times as fast with {memory:.2f} times the memory at {row['tokens']} tokens")
    return f"On this machine it is {', '.join(said)} (benchmark.png)."
