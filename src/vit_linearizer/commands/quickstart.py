"""``quickstart``: the whole story on handwritten digits, on two CPU cores, without network.

A small ViT is trained on labels; a small Adventurer is distilled from it without labels, and the ViT itself is turned to
linear attention. All are judged on digits that nothing was trained or tuned on, beside the Adventurer untrained and trained
by plain regression. Then it is fine-tuned on all labels and on a tenth of them, beside one that starts from scratch, and
all three are timed on larger and larger images.
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

from ..data.datasets import CentreSet, centre_loader, to_device
from ..data.sources import DigitsSource
from ..evaluation import (
    FidelityMeter,
    class_scores,
    collect_features,
    few_shot_accuracy,
    knn_accuracy,
    linear_probe_accuracy,
)
from ..models.adapters import extract_features
from ..models.loading import create_backbone, load, save_model_folder
from ..models.teacher import Teacher
from ..recipes import DISTILLATION, find_recipe
from ..training.progress import console, show_messages
from ..training.run_folder import write_atomically
from .benchmark import BenchmarkConfig, benchmark
from .closing import close_with_report
from .distill import DistillConfig, distill
from .finetune import FinetuneConfig, finetune

logger = logging.getLogger("vit_linearizer")

_SIZE = 32
#: Teacher and student: the same width, depth and 64 patches.
_SHAPE = dict(img_size=_SIZE, patch_size=4, embed_dim=96, depth=4)
_SMOKE_SHAPE = dict(img_size=_SIZE, patch_size=8, embed_dim=32, depth=4)
_STUDENT = "adventurer_tiny_patch16_224"
_ROWS = ("teacher", "distilled", "adala", "untrained", "regression")
#: With patches of 4: 256 to 16,384 tokens.
_LARGER_SIZES = ("64", "128", "256", "512")
#: What is made of the teacher without labels.
_DISTILLED = {
    "distilled": "a linear-time student from the teacher",
    "adala": "the teacher itself with linear attention",
    "regression": "the first student by plain feature regression",
}
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
        out: folder for the runs, quickstart.json, benchmark.json, .md and .png, and report.html.
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

    for row, title in _DISTILLED.items():
        console.rule(f"{row}: {title}, without labels")
        started = time.perf_counter()
        run = _distill(row, teacher, out, config)
        seconds[row], models[row] = time.perf_counter() - started, load(run)
    torch.manual_seed(config.seed)
    models["untrained"] = create_backbone(_STUDENT, field="--student", **_shape(config)).eval()
    seconds["untrained"] = 0.0

    console.rule("judged on digits that nothing was trained or tuned on")
    frozen = Teacher(create_backbone(str(teacher), field="--teacher", pretrained=True), (_SIZE, _SIZE))
    results = {row: _judge(models[row], draws=2 if config.smoke else 20) for row in _ROWS}
    for row in _ROWS[1:]:
        results[row] |= _fidelity(models[row], frozen)
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
            models=(str(teacher), str(out / "distilled"), str(out / "adala")),
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
    close_with_report([out], out / "report.html")
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


def _distill(row: str, teacher: Path, out: Path, config: QuickstartConfig) -> Path:
    """One of the `_DISTILLED` rows."""
    settings: dict[str, Any] = {"epochs": 1} if config.smoke else {}
    if row == "adala":
        settings |= {"recipe": "adala_digits", "evaluate_every": 4}
    else:
        shape = tuple(f"{name}={value}" for name, value in _shape(config).items())
        settings |= {"recipe": "digits", "student": _STUDENT, "student_args": shape, "evaluate_every": 4}
    if row == "regression":
        settings |= asdict(find_recipe(DISTILLATION, "regression", _STUDENT).objectives)
    return distill(DistillConfig(teacher=str(teacher), out=str(out / row), **_of_every_run(config), **settings))


def _finetune(model: str, out: Path, config: QuickstartConfig, **settings: Any) -> Path:
    """The ordinary fine-tuning, on the digits' training part."""
    if config.smoke:
        settings["epochs"] = 1
    return finetune(FinetuneConfig(model=model, out=str(out), recipe="digits", **_of_every_run(config), **settings))


def _of_every_run(config: QuickstartConfig) -> dict[str, Any]:
    return {"data": "builtin:digits-train", "seed": config.seed, "report": False}  # one report on all


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


@torch.no_grad()
def _fidelity(model: nn.Module, teacher: Teacher) -> dict[str, float]:
    """How well the teacher's final tokens can be read from a student's, on the test digits."""
    test = _loader("test")
    meter = FidelityMeter(len(test.dataset))  # type: ignore[arg-type]  # it has a length
    for batch in test:
        images = to_device(batch, torch.device("cpu"))["images"]
        meter.update(extract_features(model, images), teacher.features(images))
    return {"final_cosine": meter.scores()["final_cosine"]}


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="held-out digits, accuracy in %")
    table.add_column("frozen features")
    for heading in (*_COLUMNS.values(), "fidelity", "training"):
        table.add_column(heading, justify="right")
    for row in _ROWS:
        values = results[row]
        fidelity = f"{values['final_cosine']:.3f}" if "final_cosine" in values else "-"
        table.add_row(row, *_cells(values, _COLUMNS), fidelity, f"{values['train_seconds']:.0f} s")
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
    """The table in two lines, whatever it says."""

    def against(row: str, other: str) -> str:
        knn, few = (results[row][name] - results[other][name] for name in ("knn", "few_shot"))
        return f"{knn:+.1f} kNN and {few:+.1f} with 5 labels"

    return (
        f"The distilled student, which saw no label, stands at {against('distilled', 'teacher')} against its teacher, "
        f"{against('distilled', 'untrained')} against itself untrained, and {against('distilled', 'regression')} against "
        f"plain feature regression.\nThe teacher with linear attention stands at {against('adala', 'teacher')} against "
        f"what it was, and its old head at {results['adala']['top1'] - results['teacher']['top1']:+.1f} top-1."
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
    """How both students stand to the teacher at the smallest and the largest size, whatever that is."""
    compared = [row for row in rows if row.get("speedup")]
    lines = []
    for model in dict.fromkeys(row["model"] for row in compared):
        said = []
        for row in [row for row in compared if row["model"] == model][:: max(1, len(_LARGER_SIZES) - 1)]:
            (speedup,), (memory,) = row["speedup"].values(), row["memory_ratio"].values()
            said.append(f"{speedup:.2f} times as fast with {memory:.2f} times the memory at {row['tokens']} tokens")
        lines.append(f"On this machine {Path(model).name} is {', '.join(said)} (benchmark.png).")
    return "\n".join(lines)
