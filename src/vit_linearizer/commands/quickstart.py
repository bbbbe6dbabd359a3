"""``quickstart``: the whole story on handwritten digits, on two CPU cores, without network.

A small ViT is trained on labels, a small Adventurer is distilled from it without labels, and both are judged on digits that
nothing was trained or tuned on, beside the same student untrained and the same student trained by plain regression. Then
both are timed on larger and larger images.
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

from ..data.datasets import CentreSet, SkippedList, centre_loader, split_held_out
from ..data.sources import DigitsSource
from ..data.views import ViewConfig
from ..evaluation import collect_features, few_shot_accuracy, knn_accuracy, linear_probe_accuracy
from ..models.loading import create_backbone, load
from ..recipes import find_recipe
from ..tasks import Classification
from ..training.config import OptimisationConfig, RuntimeConfig
from ..training.data import prepare_data
from ..training.loop import train
from ..training.machine import make_accelerator
from ..training.progress import console, show_messages
from ..training.run_folder import RunFolder, write_atomically
from .benchmark import BenchmarkConfig, benchmark
from .distill import DistillConfig, distill

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


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a small ViT on digits, distil it without labels, and compare.

    Attributes:
        out: folder for the runs, quickstart.json and benchmark.json, .md and .png.
        seed: of everything random.
        smoke: one epoch with tiny models, to see that everything runs.
        debug: show the traceback of an error.
    """

    out: str
    seed: int = 0
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
    teacher = _train_teacher(out / "teacher", config)
    seconds["teacher"], models["teacher"] = time.perf_counter() - started, load(teacher)

    baseline = asdict(find_recipe("regression", _STUDENT).objectives)
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
    logger.info(_in_words(results))
    logger.info(_speed_in_words(speed["rows"]))
    return results


def _shape(config: QuickstartConfig) -> dict[str, Any]:
    return _SMOKE_SHAPE if config.smoke else _SHAPE


def _train_teacher(path: Path, config: QuickstartConfig) -> Path:
    """A small ViT with supervision, by the ordinary loop."""
    optimisation = OptimisationConfig(
        epochs=1 if config.smoke else 28,
        batch_size=32,
        learning_rate=1e-3,
        minimum_learning_rate=1e-5,
        warmup_epochs=2,
    )
    views = ViewConfig(augmentation="affine", repeats=1)
    runtime = RuntimeConfig(seed=config.seed, evaluate_every=7, precision="fp32")  # bf16 is no faster for so small a ViT
    source = DigitsSource("train")
    train_numbers, held_out_numbers = split_held_out(len(source), config.seed)
    accelerator = make_accelerator(runtime)
    run = RunFolder(path, {"command": "quickstart", **asdict(optimisation), **asdict(views), **asdict(runtime)})
    torch.manual_seed(config.seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_heads=_shape(config)["embed_dim"] // 32, num_classes=10, **_shape(config)
    )
    # Attention alone does not know where a patch is; positions of timm's usual 0.02 cost a small set half of its epochs.
    nn.init.normal_(model.get_parameter("pos_embed"), std=0.5)
    run.prepare(resume="auto", writes=accelerator.is_main_process)
    data = prepare_data(
        source,
        train_numbers,
        held_out_numbers,
        image_size=(_SIZE, _SIZE),
        views=views,
        mask=None,
        seed=config.seed,
        batch_size=optimisation.batch_size,
        num_workers=0,
        skipped=SkippedList(run.skipped),
    )
    with run.logging_to_file():
        train(Classification(model), data, optimisation, runtime, run, accelerator, title="teacher")
    return path


def _judge(model: nn.Module, *, draws: int) -> dict[str, float]:
    """Accuracies of frozen features (and of the head, where there is one) on the test digits."""
    cpu = torch.device("cpu")
    loaders = {}
    for split in ("train", "test"):
        source = DigitsSource(split)
        loaders[split] = centre_loader(CentreSet(source, np.arange(len(source)), (_SIZE, _SIZE)), batch_size=64)
    train_set, test_set = (collect_features(model, loaders[split], cpu) for split in ("train", "test"))
    values = {}
    if getattr(model, "num_classes", 0) > 0:
        values["top1"] = Classification(model).evaluate(loaders["test"], None, cpu)["top1"]
    values["knn"] = knn_accuracy(*train_set, *test_set)
    values["linear_probe"] = linear_probe_accuracy(*train_set, *test_set)
    values["few_shot"] = few_shot_accuracy(*train_set, *test_set, draws=draws)
    return values


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="held-out digits, accuracy in %")
    table.add_column("")
    for heading in (*_COLUMNS.values(), "training"):
        table.add_column(heading, justify="right")
    for row, values in results.items():
        cells = [f"{values[name]:.1f}" if name in values else "-" for name in _COLUMNS]
        table.add_row(row, *cells, f"{values['train_seconds']:.0f} s")
    return table


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


def _speed_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the student stands to its teacher at the smallest and the largest size, whatever that is."""
    said = []
    for row in [row for row in rows if row.get("speedup")][:: max(1, len(_LARGER_SIZES) - 1)]:
        (speedup,), (memory,) = row["speedup"].values(), row["memory_ratio"].values()
        said.append(f"{speedup:.2f} times as fast with {memory:.2f} times the memory at {row['tokens']} tokens")
    return f"On this machine it is {', '.join(said)} (benchmark.png)."
