"""``evaluate``: models and labelled pictures in, every measurement of this project out, in one file."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import UserError
from ..data.datasets import CentreSet, SkippedList, centre_loader, to_device
from ..data.labelled import LabelledData, open_labelled
from ..data.sources import ImageSource
from ..evaluation import (
    FidelityMeter,
    class_scores,
    collect_features,
    few_shot_accuracy,
    fit_linear_probe,
    knn_accuracy,
    linear_probe_accuracy,
)
from ..evaluation.robustness import Reader, corrupted_accuracies, summarise_corruptions
from ..models.adapters import check_plain, extract_features, nominal_size, normalize, patch_grid
from ..models.loading import open_model
from ..models.teacher import Teacher, agreeing_size, load_teacher
from ..training.machine import choose_device
from ..training.progress import ProgressLine, show_messages
from ..training.run_folder import write_atomically
from .arguments import parse_size
from .resolution import resolved_data

logger = logging.getLogger("vit_linearizer")

Metric = Literal["top1", "top5", "knn", "linear_probe", "few_shot", "fidelity", "corruptions"]

#: Metrics that need labelled pictures to learn from.
_NEED_TRAINING = ("knn", "linear_probe", "few_shot")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure models on labelled pictures: their head, their frozen features, their likeness to a teacher, robustness.

    Attributes:
        models: run folders, timm names, hf-hub:OWNER/NAME, local-dir:FOLDER or published weight files.
        data: folder with train/ and val/ and a folder a class in each, a folder of class folders, or builtin:digits.
        out: JSON file for all results; each evaluated run's evaluation.json gets its own besides.
        metrics: what to measure; by default all that models and data allow, but corruptions.
        teacher: for fidelity, and to compare robustness with.
        teacher_arch: timm name of the architecture, when the teacher is a weight file.
        image_size: 224 or HEIGHTxWIDTH; by default each model's nominal size.
        shots: labels a class of few_shot.
        draws: of which labels, in few_shot.
        stages: of fidelity, whose activation maps are compared.
        corruption_images: test pictures that are corrupted, evenly spread; the work is 75 times theirs.
        batch_size: images at a time.
        device: where to run.
        num_workers: processes that load images.
        debug: show the traceback of an error.
    """

    models: tuple[str, ...]
    data: str
    out: str | None = None
    metrics: tuple[Metric, ...] | None = None
    teacher: str | None = None
    teacher_arch: str | None = None
    image_size: str | None = None
    shots: int = 5
    draws: int = 20
    stages: int = 4
    corruption_images: int = 1000
    batch_size: int = 64
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_workers: int = 0
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("--models", None, "name at least one")
        if len(set(self.models)) < len(self.models):
            raise UserError("--models", " ".join(self.models), "names a model twice")
        for name in ("shots", "draws", "stages", "corruption_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}", getattr(self, name), "must be at least 1")
        if self.metrics and "fidelity" in self.metrics and self.teacher is None:
            raise UserError("--metrics", "fidelity", "needs a --teacher to compare with")


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Measure models; see `EvaluateConfig`.

    A model of a run folder has its results added to the run's ``evaluation.json``, under ``evaluate`` and the data's name.

    Returns:
        By model, what was measured: accuracies in percent; ``agreement_stage1..K``, ``final_cosine`` and ``cka`` of
        fidelity; ``corruption_top1``, ``corruption_drop``, ``corruption_relative_drop``, against a teacher
        ``corruption_drop_over_teacher``, and ``corruptions``, the accuracies by kind and severity.

    Raises:
        UserError: a metric that models or data do not allow, named before anything is measured.
    """
    show_messages()
    device = choose_device(config.device)
    data = open_labelled(config.data)
    subjects = {name: _Subject(name, config, device) for name in config.models}
    metrics = config.metrics or _possible(config, data, subjects)
    _refuse(config, metrics, data, subjects)
    results: dict[str, dict[str, Any]] = {name: {} for name in subjects}
    for name, subject in subjects.items():
        logger.info("%s at %dx%d", name, *subject.image_size)
        results[name] = _measure(subject, metrics, config, data, device)
        logger.info("%s: %s", name, "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()))
        _write(config, results)
    if "corruptions" in metrics:
        _add_corruptions(results, subjects, config, data, device)
        _write(config, results)
    return results


class _Subject:
    """One model, ready to be measured."""

    def __init__(self, name: str, config: EvaluateConfig, device: torch.device, field: str = "--models"):
        self.name = name
        given = parse_size("--image-size", config.image_size)
        size = {"img_size": given} if given else {}
        architecture = config.teacher_arch if field == "--teacher" else None
        model: Any = open_model(name, field=field, architecture=architecture, **size)
        check_plain(model, name, field=field)
        self.model: nn.Module = model.eval().to(device)
        self.image_size = given or nominal_size(model)
        patch_grid(model, self.image_size)
        self.classes = int(getattr(model, "num_classes", 0))

    def loader(self, source: ImageSource, config: EvaluateConfig, numbers: Sequence[int] | None = None) -> DataLoader:
        pictures = CentreSet(source, range(len(source)) if numbers is None else numbers, self.image_size)
        return centre_loader(pictures, batch_size=config.batch_size, num_workers=config.num_workers)


def _test_part(data: LabelledData) -> ImageSource:
    """What models are judged on; of a folder without ``train/`` and ``val/`` all of it."""
    return data.validation or data.training


def _possible(config: EvaluateConfig, data: LabelledData, subjects: dict[str, _Subject]) -> tuple[Metric, ...]:
    """All metrics but the slow one, as far as data and models allow."""
    possible = []
    for metric in get_args(Metric):
        if metric == "corruptions" or (metric == "fidelity" and config.teacher is None):
            continue
        if metric in _NEED_TRAINING and data.validation is None:
            continue
        if metric in ("top1", "top5") and not any(s.classes == len(data.classes) for s in subjects.values()):
            continue
        if metric == "top5" and len(data.classes) <= 5:
            continue
        possible.append(metric)
    return tuple(possible)


def _refuse(
    config: EvaluateConfig, metrics: Sequence[Metric], data: LabelledData, subjects: dict[str, _Subject]
) -> None:
    """Raise for what was asked for and cannot be."""
    asked = config.metrics or ()
    for metric in _NEED_TRAINING:
        if metric in asked and data.validation is None:
            remedy = "needs labelled pictures to learn from; give a folder with train/ and val/, or builtin:digits"
            raise UserError("--metrics", metric, remedy)
    for metric in ("top1", "top5"):
        for name, subject in subjects.items():
            if metric in asked and subject.classes != len(data.classes):
                has = f"has {subject.classes} outputs" if subject.classes else "has no classifier"
                remedy = f"{name} {has}, the data {len(data.classes)} classes; fine-tune it first, or leave this metric out"
                raise UserError("--metrics", metric, remedy)
    if "top5" in asked and len(data.classes) <= 5:
        raise UserError("--metrics", "top5", f"says nothing of {len(data.classes)} classes")
    if "corruptions" in metrics and data.validation is None:
        for name, subject in subjects.items():
            if subject.classes != len(data.classes):
                remedy = f"{name} has no classifier for these {len(data.classes)} classes, and there is no train/ to fit one on"
                raise UserError("--metrics", "corruptions", remedy)
    if not metrics:
        raise UserError("--data", config.data, "allows no metric for these models; give train/ and val/, or a --teacher")


def _measure(
    subject: _Subject, metrics: Sequence[Metric], config: EvaluateConfig, data: LabelledData, device: torch.device
) -> dict[str, Any]:
    """Everything but corruptions."""
    values: dict[str, Any] = {}
    test = subject.loader(_test_part(data), config)
    if subject.classes == len(data.classes) and {"top1", "top5"} & set(metrics):
        scores = class_scores(subject.model, test, device)
        values |= {name: scores[name] for name in ("top1", "top5") if name in metrics and name in scores}
    if set(_NEED_TRAINING) & set(metrics):
        training = collect_features(subject.model, subject.loader(data.training, config), device)
        judged = collect_features(subject.model, test, device)
        if "knn" in metrics:
            values["knn"] = knn_accuracy(*training, *judged)
        if "linear_probe" in metrics:
            values["linear_probe"] = linear_probe_accuracy(*training, *judged)
        if "few_shot" in metrics:
            values["few_shot"] = few_shot_accuracy(*training, *judged, shots=config.shots, draws=config.draws)
    if "fidelity" in metrics:
        values |= _fidelity(subject, test, config, device)
    return values


@torch.no_grad()
def _fidelity(subject: _Subject, test: DataLoader, config: EvaluateConfig, device: torch.device) -> dict[str, float]:
    assert config.teacher is not None
    grid = patch_grid(subject.model, subject.image_size)
    size = agreeing_size(config.teacher, student_grid=grid, architecture=config.teacher_arch)
    teacher: Teacher = load_teacher(config.teacher, image_size=size, architecture=config.teacher_arch).to(device)
    meter = FidelityMeter(len(test.dataset))  # type: ignore[arg-type]  # it has a length
    for batch in test:
        images = to_device(batch, device)["images"]
        student = extract_features(subject.model, images, stages=config.stages)
        meter.update(student, teacher.features(images, stages=config.stages))
    return meter.scores()


def _add_corruptions(
    results: dict[str, dict[str, Any]],
    subjects: dict[str, _Subject],
    config: EvaluateConfig,
    data: LabelledData,
    device: torch.device,
) -> None:
    """Accuracies on corrupted pictures, by the head where it fits the classes, else by a linear probe on the features."""
    reference = subjects.get(config.teacher or "")
    if config.teacher is not None and reference is None:
        reference = _Subject(config.teacher, config, device, "--teacher")
    everyone = {**subjects, **({reference.name: reference} if reference else {})}
    test = _test_part(data)
    numbers = np.linspace(0, len(test) - 1, min(len(test), config.corruption_images)).astype(int).tolist()
    readers = {name: _reader(subject, config, data, device) for name, subject in everyone.items()}
    tables: dict[str, dict[str, list[float]]] = {}
    clean: dict[str, float] = {}
    for size in dict.fromkeys(subject.image_size for subject in everyone.values()):
        some = {name: readers[name] for name, subject in everyone.items() if subject.image_size == size}
        loader = next(iter(everyone[name] for name in some)).loader(test, config, numbers)
        clean |= _clean_accuracies(some, loader, device)
        with ProgressLine("corruptions", first=0, total=len(loader), unit="batch") as line:
            tick = _Ticker(line, config.batch_size)
            tables |= corrupted_accuracies(some, loader, device, done=tick)
    for name, values in results.items():
        values |= summarise_corruptions(clean[name], tables[name])
        if reference is not None and name != reference.name:
            lost = summarise_corruptions(clean[reference.name], tables[reference.name])["corruption_drop"]
            if lost > 0:
                values["corruption_drop_over_teacher"] = values["corruption_drop"] / lost
        values["corruption_images"] = len(numbers)
        values["corruptions"] = tables[name]


class _Ticker:
    """Counts batches for a progress line."""

    def __init__(self, line: ProgressLine, batch_size: int):
        self.line, self.batch_size, self.count = line, batch_size, 0

    def __call__(self) -> None:
        self.count += 1
        self.line.update(self.count, images_per_second=self.line.rate(self.count) * self.batch_size, data_wait=0.0)


def _reader(subject: _Subject, config: EvaluateConfig, data: LabelledData, device: torch.device) -> Reader:
    if subject.classes == len(data.classes):
        return lambda images: subject.model(normalize(subject.model, images)).float().argmax(1).cpu()  # type: ignore[no-any-return]
    probe = fit_linear_probe(*collect_features(subject.model, subject.loader(data.training, config), device))

    def read(images: Tensor) -> Tensor:
        return torch.from_numpy(probe.predict(extract_features(subject.model, images).pooled.float().cpu().numpy()))

    return read


@torch.no_grad()
def _clean_accuracies(readers: dict[str, Callable], loader: DataLoader, device: torch.device) -> dict[str, float]:
    right, images = dict.fromkeys(readers, 0), 0
    for batch in loader:
        pictures = to_device(batch, device)["images"]
        images += len(pictures)
        for name, read in readers.items():
            right[name] += int((read(pictures) == batch["labels"]).sum())
    return {name: 100 * count / images for name, count in right.items()}


def _write(config: EvaluateConfig, results: dict[str, dict[str, Any]]) -> None:
    """All results to ``--out``, and each run's to its own ``evaluation.json``."""
    place = resolved_data(config.data)
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps({"data": place, "teacher": config.teacher, "models": results}, indent=2) + "\n")
    for name, values in results.items():
        folder = Path(name)
        if not values or not (folder / "config.json").is_file() or not (folder / "model").is_dir():
            continue
        file = folder / "evaluation.json"
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before = held.get("evaluate", {}).get(place, {})
        held.setdefault("evaluate", {})[place] = {**before, **values}
        write_atomically(file, json.dumps(held, indent=2) + "\n")
