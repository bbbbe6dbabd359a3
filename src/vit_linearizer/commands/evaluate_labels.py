"""What ``evaluate`` does with labelled pictures: heads, frozen features, likeness to a teacher, robustness."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.datasets import CentreSet, ReadableLoader, centre_loader, nothing_readable, to_device
from ..data.labelled import LabelledData
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
from ..training.progress import ProgressLine
from .arguments import parse_size

if TYPE_CHECKING:
    from .evaluate import EvaluateConfig


class Subject:
    """One model, ready to be measured."""

    def __init__(
        self,
        name: str,
        config: "EvaluateConfig",
        device: torch.device,
        *,
        field: str = "--models",
        architecture: str | None = None,
    ):
        self.name = name
        given = parse_size("--image-size", config.image_size)
        size: dict[str, Any] = {"img_size": given} if given else {}
        pretrained = config.models_pretrained or field == "--teacher"
        torch.manual_seed(0)  # of random weights
        model: Any = open_model(name, field=field, architecture=architecture, pretrained=pretrained, **size)
        check_plain(model, name, field=field)
        self.model: nn.Module = model.eval().to(device)
        self.image_size = given or nominal_size(model)
        patch_grid(model, self.image_size)
        self.classes = int(getattr(model, "num_classes", 0))
        self.class_names = tuple(model.pretrained_cfg.get("label_names") or ())

    def reads(self, classes: tuple[str, ...]) -> bool:
        """Whether its head is one for these classes, as far as it says."""
        return self.classes == len(classes) and self.class_names in ((), classes)

    def loader(self, source: ImageSource, config: "EvaluateConfig", numbers: Sequence[int] | None = None) -> ReadableLoader:
        pictures = CentreSet(source, range(len(source)) if numbers is None else numbers, self.image_size)
        return centre_loader(pictures, batch_size=config.batch_size, num_workers=config.num_workers)


def test_part(data: LabelledData) -> ImageSource:
    """What models are judged on; of a folder without ``train/`` and ``val/`` all of it."""
    return data.validation or data.training


def measure(
    subject: Subject, metrics: Sequence[str], config: "EvaluateConfig", data: LabelledData, device: torch.device
) -> dict[str, Any]:
    """Everything but corruptions, by the names of the metrics."""
    values: dict[str, Any] = {}
    test = subject.loader(test_part(data), config)
    if subject.reads(data.classes) and {"top1", "top5"} & set(metrics):
        scores = class_scores(subject.model, test, device)
        values |= {name: scores[name] for name in ("top1", "top5") if name in metrics and name in scores}
    if {"knn", "linear_probe", "few_shot"} & set(metrics):
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
    if test.read:
        values["skipped"] = len(test.dataset) - test.read  # type: ignore[arg-type]  # it has a length
    return values


@torch.no_grad()
def _fidelity(subject: Subject, test: DataLoader, config: "EvaluateConfig", device: torch.device) -> dict[str, float]:
    assert config.teacher is not None
    size = teacher_size(subject, config)
    teacher: Teacher = load_teacher(config.teacher, image_size=size, architecture=config.teacher_arch).to(device)
    meter = FidelityMeter(len(test.dataset))  # type: ignore[arg-type]  # it has a length
    for batch in test:
        images = to_device(batch, device)["images"]
        student = extract_features(subject.model, images, stages=config.stages)
        meter.update(student, teacher.features(images, stages=config.stages))
    return meter.scores()


def teacher_size(subject: Subject, config: "EvaluateConfig") -> tuple[int, int]:
    assert config.teacher is not None
    grid = patch_grid(subject.model, subject.image_size)
    return agreeing_size(config.teacher, student_grid=grid, architecture=config.teacher_arch)


def add_corruptions(
    results: dict[str, dict[str, Any]],
    everyone: dict[str, Subject],
    config: "EvaluateConfig",
    data: LabelledData,
    device: torch.device,
) -> None:
    """Accuracies on corrupted pictures, by the head where it fits the classes, else by a linear probe on the features."""
    reference = everyone.get(config.teacher or "")
    test = test_part(data)
    numbers = np.linspace(0, len(test) - 1, min(len(test), config.corruption_images)).astype(int).tolist()
    readers = {name: _reader(subject, config, data, device) for name, subject in everyone.items()}
    tables: dict[str, dict[str, list[float]]] = {}
    clean: dict[str, float] = {}
    read: dict[tuple[int, int], int] = {}
    for size in dict.fromkeys(subject.image_size for subject in everyone.values()):
        some = {name: readers[name] for name, subject in everyone.items() if subject.image_size == size}
        loader = next(iter(everyone[name] for name in some)).loader(test, config, numbers)
        clean |= _clean_accuracies(some, loader, device)
        read[size] = loader.read
        with ProgressLine("corruptions", first=0, total=len(loader), unit="batch") as line:
            tick = _Ticker(line, config.batch_size)
            tables |= corrupted_accuracies(some, loader, device, done=tick)
    for name, values in results.items():
        values |= summarise_corruptions(clean[name], tables[name])
        if reference is not None and name != reference.name:
            lost = summarise_corruptions(clean[reference.name], tables[reference.name])["corruption_drop"]
            if lost > 0:
                values["corruption_drop_over_teacher"] = values["corruption_drop"] / lost
        values["corruption_images"] = read[everyone[name].image_size]
        values["corruption_reader"] = "head" if everyone[name].reads(data.classes) else "linear_probe"
        values["corruptions"] = tables[name]


class _Ticker:
    """Counts batches for a progress line."""

    def __init__(self, line: ProgressLine, batch_size: int):
        self.line, self.batch_size, self.count = line, batch_size, 0

    def __call__(self) -> None:
        self.count += 1
        self.line.update(self.count, images_per_second=self.line.rate(self.count) * self.batch_size, data_wait=0.0)


def _reader(subject: Subject, config: "EvaluateConfig", data: LabelledData, device: torch.device) -> Reader:
    if subject.reads(data.classes):
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
    if images == 0:
        raise nothing_readable()
    return {name: 100 * count / images for name, count in right.items()}
