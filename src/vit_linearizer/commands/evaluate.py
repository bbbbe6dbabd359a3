"""``evaluate``: models and labelled pictures in, every measurement of this project out, in one file."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..contracts import UserError
from ..data.labelled import LabelledData, open_labelled
from ..data.segmentation import SegmentationKind
from ..models.adapters import stage_ends
from ..models.loading import probe_backbone
from ..models.segmenter_folder import is_segmenter
from ..training.machine import choose_device
from ..training.progress import show_messages
from ..training.run_folder import write_atomically
from .arguments import architectures_of
from .evaluate_labels import Subject, add_corruptions, measure, teacher_size
from .evaluate_masks import measure_segmenters
from .resolution import resolved_data

logger = logging.getLogger("vit_linearizer")

Metric = Literal["top1", "top5", "knn", "linear_probe", "few_shot", "fidelity", "corruptions", "miou"]

#: Metrics that need labelled pictures to learn from.
_NEED_TRAINING = ("knn", "linear_probe", "few_shot")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure models on labelled pictures: their head, their frozen features, their likeness to a teacher, robustness.

    Attributes:
        models: run folders, timm names, hf-hub:OWNER/NAME, local-dir:FOLDER or published weight files.
        data: folder with train/ and val/ and a folder a class in each, a folder of class folders, or builtin:digits.
        dataset: ade20k, cityscapes or folder, for runs of segment: their data are pictures with masks, their metric is miou.
        out: JSON file for all results; each evaluated run's evaluation.json gets its own besides.
        metrics: what to measure; by default all that models and data allow, but corruptions.
        models_pretrained: load pretrained weights of timm names; --no-models-pretrained takes random ones.
        models_arch: timm names of the architectures of weight files among the models, in their order.
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
    dataset: SegmentationKind | None = None
    out: str | None = None
    metrics: tuple[Metric, ...] | None = None
    models_pretrained: bool = True
    models_arch: tuple[str, ...] = ()
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
        if isinstance(self.models, str):
            raise UserError("models", self.models, "give a list of models")
        if not self.models:
            raise UserError("--models", None, "name at least one")
        if len(set(self.models)) < len(self.models):
            raise UserError("--models", " ".join(self.models), "names a model twice")
        for name in ("shots", "draws", "stages", "corruption_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}", getattr(self, name), "must be at least 1")
        if self.dataset is not None and (self.metrics or ("miou",)) != ("miou",):
            raise UserError(
                "--metrics", " ".join(self.metrics or ()), "with --dataset (segmentation runs) the metric is miou"
            )
        if self.dataset is not None and self.models_arch:
            raise UserError("--models-arch", " ".join(self.models_arch), "with --dataset the models are runs of segment")
        if self.dataset is None and "miou" in (self.metrics or ()):
            raise UserError("--metrics", "miou", "is for segmentation runs; say what the data are by --dataset")
        if self.metrics and "fidelity" in self.metrics and self.teacher is None:
            raise UserError("--metrics", "fidelity", "needs a --teacher to compare with")


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Measure models; see `EvaluateConfig`.

    A model of a run folder has its results added to the run's ``evaluation.json``, to the list ``evaluate``, with
    the data and settings that they depend on.

    Returns:
        By model, what was measured: accuracies in percent; ``agreement_stage1..K``, ``final_cosine`` and ``cka`` of
        fidelity; ``corruption_top1``, ``corruption_drop``, ``corruption_relative_drop``, against a teacher
        ``corruption_drop_over_teacher``, and ``corruptions``, the accuracies by kind and severity.

    Raises:
        UserError: a metric that models or data do not allow, named before anything is measured.
    """
    show_messages()
    device = choose_device(config.device)
    if config.dataset is not None:
        results: dict[str, dict[str, Any]] = measure_segmenters(
            config.models,
            config.data,
            config.dataset,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            device=device,
        )
        _write(config, results)
        return results
    _refuse_segmenters(config)
    data = open_labelled(config.data)
    if data.validation is None:
        _refuse_own_training_pictures(config)
    architectures = architectures_of(config.models, config.models_arch)
    subjects = {name: Subject(name, config, device, architecture=architectures.get(name)) for name in config.models}
    metrics = config.metrics or _possible(config, data, subjects)
    everyone = dict(subjects)
    if "corruptions" in metrics and config.teacher is not None and config.teacher not in subjects:
        everyone[config.teacher] = Subject(
            config.teacher, config, device, field="--teacher", architecture=config.teacher_arch
        )
    _refuse(config, metrics, data, everyone)
    results = {name: {} for name in subjects}
    for name, subject in subjects.items():
        logger.info("%s at %dx%d", name, *subject.image_size)
        results[name] = measure(subject, metrics, config, data, device)
        logger.info("%s: %s", name, "  ".join(f"{key} {value:.4g}" for key, value in results[name].items()))
        _write(config, results)
    if "corruptions" in metrics:
        add_corruptions(results, everyone, config, data, device)
        for name, values in results.items():
            shown = {
                key: value for key, value in values.items() if key.startswith("corruption_") and isinstance(value, float)
            }
            logger.info("%s: %s", name, "  ".join(f"{key} {value:.4g}" for key, value in shown.items()))
        _write(config, results)
    return results


def _refuse_segmenters(config: EvaluateConfig) -> None:
    for name in config.models:
        if is_segmenter(name):
            raise UserError("--models", name, "is a segmentation run; say what the data are by --dataset")


def _possible(config: EvaluateConfig, data: LabelledData, subjects: dict[str, Subject]) -> tuple[Metric, ...]:
    """All metrics but the slow one, as far as data and models allow."""
    possible = []
    for metric in get_args(Metric):
        if metric in ("corruptions", "miou") or (metric == "fidelity" and config.teacher is None):
            continue
        if metric in _NEED_TRAINING and data.validation is None:
            continue
        if metric in ("top1", "top5") and not any(s.reads(data.classes) for s in subjects.values()):
            continue
        if metric == "top5" and len(data.classes) <= 5:
            continue
        possible.append(metric)
    return tuple(possible)


def _refuse(config: EvaluateConfig, metrics: Sequence[Metric], data: LabelledData, everyone: dict[str, Subject]) -> None:
    """Raise for what was asked for and cannot be; ``everyone`` is the models, and the teacher where it is measured too."""
    subjects = {name: everyone[name] for name in config.models}
    asked = config.metrics or ()
    for metric in _NEED_TRAINING:
        if metric in asked and data.validation is None:
            remedy = "needs labelled pictures to learn from; give a folder with train/ and val/, or builtin:digits"
            raise UserError("--metrics", metric, remedy)
    for metric in ("top1", "top5"):
        for name, subject in subjects.items():
            if metric in asked and not subject.reads(data.classes):
                has = f"has {subject.classes} outputs" if subject.classes else "has no classifier"
                has = "has classes of other names" if subject.classes == len(data.classes) else has
                remedy = f"{name} {has}, the data {len(data.classes)} classes; fine-tune it first, or leave this metric out"
                raise UserError("--metrics", metric, remedy)
    if "top5" in asked and len(data.classes) <= 5:
        raise UserError("--metrics", "top5", f"says nothing of {len(data.classes)} classes")
    if "corruptions" in metrics and data.validation is None:
        for name, subject in everyone.items():
            if not subject.reads(data.classes):
                remedy = f"{name} has no classifier for these {len(data.classes)} classes, and no train/ to fit one on"
                raise UserError("--metrics", "corruptions", remedy)
    if "fidelity" in metrics and config.teacher is not None:
        teacher: Any = probe_backbone(config.teacher, field="--teacher", architecture=config.teacher_arch)
        for subject in subjects.values():
            for model in (subject.model, teacher):
                stage_ends(len(model.feature_info), config.stages)  # type: ignore[arg-type]  # timm's list
            teacher_size(subject, config)
    if not metrics:
        raise UserError("--data", config.data, "allows no metric for these models; give train/ and val/, or a --teacher")


def _write(config: EvaluateConfig, results: dict[str, dict[str, Any]]) -> None:
    """All results to ``--out``, and each run's to its own ``evaluation.json``, with what they depend on."""
    settings = {"data": resolved_data(config.data)}
    settings |= {name: getattr(config, name) for name in ("dataset", "image_size", "teacher", "stages", "shots", "draws")}
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps({**settings, "models": results}, indent=2) + "\n")
    for name, values in results.items():
        folder = Path(name)
        if not values or not (folder / "config.json").is_file() or not (folder / "model").is_dir():
            continue
        file = folder / "evaluation.json"
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        records = held.setdefault("evaluate", [])
        same = [record for record in records if {key: record.get(key) for key in settings} == settings]
        if not same:
            records.append(dict(settings))
        (same or records)[-1].update(values)  # the same measured again takes the place of what was there
        write_atomically(file, json.dumps(held, indent=2) + "\n")


def _refuse_own_training_pictures(config: EvaluateConfig) -> None:
    """A run whose training pictures these are has seen most of them, and nobody could tell which."""
    for name in config.models:
        file = Path(name) / "config.json"
        made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if made.get("command") == "finetune" and made.get("data") == resolved_data(config.data):
            remedy = "was trained on most of these pictures; keep others apart, as DATA/train and DATA/val"
            raise UserError("--models", name, remedy)
    logger.warning("%s has no val/: all its pictures are judged on; models that saw them do too well", config.data)
