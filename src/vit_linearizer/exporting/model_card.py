"""The model card: what a model is, what it was distilled from and under which licence, how well it does, how to use it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn

from ..models.adapters import nominal_size
from ..models.loading import is_file_name

#: Settings of a run that a reader of its card asks for, where it has them.
_SETTINGS = (
    "recipe",
    "images",
    "image_size",
    "teacher_image_size",
    "epochs",
    "batch_size",
    "learning_rate",
    "mask_ratio",
    "activation_matching_weight",
    "masked_prediction_weight",
    "feature_regression_weight",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of where a model comes from.

    Attributes:
        name: what to call it.
        settings: resolved configuration of the run it comes from, empty for a model that comes from none.
        figures: the run's evaluation, by metric.
        random: whether the weights are random.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False

    @property
    def teacher(self) -> str | None:
        """Its teacher, without the folders of the machine it was distilled on."""
        teacher = self.settings.get("teacher")
        if teacher is None or self._teacher_is_public:
            return teacher
        return Path(teacher.removeprefix("local-dir:")).name

    @property
    def licence(self) -> str | None:
        """Licence of the teacher's weights as timm knows it; a student is usually bound by it."""
        teacher = self.settings.get("teacher") or ""
        if not self._teacher_is_public or teacher.startswith("hf-hub:") or not self.settings.get("teacher_pretrained", True):
            return None
        if teacher != teacher.partition(".")[0] and teacher not in timm.list_pretrained():
            return None
        config = timm.get_pretrained_cfg(teacher)
        return config.license if config is not None else None

    @property
    def teacher_is_random(self) -> bool:
        """Whether the teacher was a bare architecture."""
        return self._teacher_is_public and not self.settings.get("teacher_pretrained", True)

    @property
    def _teacher_is_public(self) -> bool:
        teacher = self.settings.get("teacher") or ""
        if teacher.startswith("hf-hub:"):
            return True
        return (
            not self.settings.get("teacher_arch") and not is_file_name(teacher) and timm.is_model(teacher.partition(".")[0])
        )


def find_origin(model: str, *, random: bool = False) -> Origin:
    """Read the run that a name stands for, if it is one; ``random`` where nothing was loaded."""
    run = Path(model.removeprefix("local-dir:"))
    if run.name == "model" and (run.parent / "metrics.jsonl").exists():
        run = run.parent
    if not (run / "metrics.jsonl").exists():
        return Origin(name=run.resolve().name if run.exists() else model, random=random)
    settings, figures = ({}, {})
    if (run / "config.json").exists():
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    if (run / "evaluation.json").exists():
        figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    if settings.get("teacher") is None and isinstance(settings.get("model"), str):  # trained on from another run
        before = find_origin(settings["model"]).settings
        settings |= {name: before[name] for name in ("teacher", "teacher_arch", "teacher_pretrained") if name in before}
    return Origin(name=run.resolve().name, settings=settings, figures=figures)


def write_card(origin: Origin, model: nn.Module, program: Mapping[str, str] | None = None) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        origin: where the model comes from.
        model: the model.
        program: facts about an exported program, by name; None for timm's folder.
    """
    any_model: Any = model
    classes = getattr(any_model, "num_classes", 0)
    architecture = any_model.pretrained_cfg["architecture"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = nominal_size(model)
    facts = {
        "architecture": f"`{architecture}`, {parameters / 1e6:.1f} M parameters",
        "made for": f"{height}x{width} images",
        "gives": f"logits of {classes} classes" if classes else f"features of width {any_model.num_features}",
    }
    if hasattr(model, "flip"):
        facts["flip rule"] = f"`{model.flip}`"
    if origin.teacher:
        licence = origin.licence or "not known here: look at where the teacher comes from before you pass this model on"
        facts |= {"teacher": f"`{origin.teacher}`", "licence of the teacher": licence}
    sections = [
        _front_matter(origin, classes, library="timm" if program is None else None),
        f"# {_plain(origin.name)}\n",
        _about(origin) + "\n",
        _table(("", ""), facts),
    ]
    shown = {name: origin.settings[name] for name in _SETTINGS if origin.settings.get(name) is not None}
    if shown:
        sections.append("## How it was trained\n\n" + _table(("setting", "value"), shown))
    figures = {name: value for name, value in origin.figures.items() if isinstance(value, int | float | str)}
    if figures:
        sections.append(
            "## Figures\n\nOn held-out images of the run; `docs/metrics.md` of vit-linearizer says what each means.\n\n"
            + _table(("metric", "value"), figures)
        )
    sections.append("## Program\n\n" + _table(("", ""), program) if program else _use())
    return "\n".join(sections)


def _about(origin: Origin) -> str:
    if origin.teacher_is_random:
        return f"A trial, distilled with vit-linearizer from a `{origin.teacher}` with **random weights**: it knows nothing."
    if origin.teacher:
        then = " and then trained on labels," if origin.settings.get("command") in ("finetune", "segment") else ""
        return f"A linear-time vision backbone, distilled without labels from `{origin.teacher}`{then} with vit-linearizer."
    return "A vision model, exported with vit-linearizer" + (", with **random weights**." if origin.random else ".")


def _front_matter(origin: Origin, classes: int, *, library: str | None) -> str:
    kind = "image-classification" if classes else "image-feature-extraction"
    lines = ["---", *([f"library_name: {library}"] if library else []), f"pipeline_tag: {kind}"]
    lines += ["tags:", f"- {kind}", "- timm", "- vit-linearizer"]
    if origin.licence:
        lines.append(f"license: {json.dumps(origin.licence)}")
    return "\n".join([*lines, "---\n"])


def _use() -> str:
    return (
        "## Use\n\n```python\nimport timm\nimport vit_linearizer  # registers the architecture\n\n"
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()  # or hf-hub:OWNER/NAME\n'
        "config = timm.data.resolve_model_data_config(model)  # mean and deviation of its images\n```\n"
    )


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_plain(name)} | {_plain(_shown(value))} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(text: str) -> str:
    """Text that cannot end a table's cell or start a tag."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
