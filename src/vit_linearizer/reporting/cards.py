"""What was made of what, at which settings: a card a run, and the settings that differ between runs of one command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .run_record import RunRecord, number
from .wording import duration_words, key_words, plain, setting

_WHAT = {"distill": "distillation", "finetune": "fine-tuning on labels", "segment": "segmentation"}
#: Settings of a card, by what they are called there.
_FACTS = {
    "dataset": "data set",
    "recipe": "recipe",
    "label_fraction": "share of labels",
    "epochs": "epochs",
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "mask_ratio": "masked",
    "crop": "crop",
    "head": "head",
    "feature_map": "feature map",
    "seed": "seed",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One run in short.

    Attributes:
        name: of the run.
        what: was done.
        state: see `RunRecord.state`.
        state_words: the same in words, with the steps.
        facts: (name, value) pairs.
    """

    name: str
    what: str
    state: str
    state_words: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class SettingsTable:
    """Settings of all runs of one command.

    Attributes:
        command: that made them, with its stages where they have settings of their own.
        names: of the runs.
        different: (setting, value, value, ...) where values differ.
        all: the same for every setting.
    """

    command: str
    names: list[str]
    different: list[tuple[str, ...]]
    all: list[tuple[str, ...]]


def what_was_done(run: RunRecord) -> str:
    """``distillation``, with ``(baseline)`` for plain feature regression."""
    return _WHAT.get(run.command, "a run of an unknown command") + (
        " (baseline: plain feature regression)" if run.is_baseline else ""
    )


def card(run: RunRecord) -> Card:
    """The card of a run."""
    planned = run.planned_steps
    steps = f"{run.steps} steps" if run.state == "finished" or not planned else f"step {run.steps} of about {planned}"
    return Card(
        name=run.name,
        what=what_was_done(run),
        state=run.state,
        state_words=f"{run.state} ({steps})" if run.state != "unknown" else steps,
        facts=tuple((name, value) for name, value in _facts(run) if value),
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    config = run.config
    facts = [("teacher", _model(config, "teacher")), ("student", student(run)), ("model", _model(config, "model"))]
    images = number(config.get("images"))
    held_out = f", {run.held_out_images} held out" if run.held_out_images is not None else ""
    facts.append(("data", setting(config.get("data")) + (f" ({images:.0f} images{held_out})" if images is not None else "")))
    sizes = [setting(config[key]) for key in ("image_size", "teacher_image_size") if config.get(key) is not None]
    different = len(set(sizes)) > 1
    facts.append(("image size", f"{sizes[0]} (teacher {sizes[1]})" if different else sizes[0] if sizes else ""))
    facts += [(name, setting(config[key])) for key, name in _FACTS.items() if config.get(key) not in (None, 0.0)]
    facts += [("seed", "0")] if config.get("seed") == 0 else []
    weights = {key.removesuffix("_weight"): number(value) for key, value in config.items() if key.endswith("_weight")}
    facts.append(("losses", ", ".join(f"{key_words(k)} (weight {value:g})" for k, value in weights.items() if value)))
    facts += [(stage.replace("_", " "), text) for stage, text in _stages(config)]
    where = [text for text in (run.device, config.get("precision")) if isinstance(text, str)]
    facts.append(("ran on", ", ".join(where)))
    facts.append(("time", f"about {duration_words(run.seconds)}" if run.seconds else ""))
    speed = run.series("train", "images_per_second")
    included = ", teacher included" if run.command == "distill" else ""
    facts.append(("training speed", f"{plain(speed[-1][1])} images/s{included}" if speed else ""))
    return [*facts, ("folder", str(run.path))]


def student(run: RunRecord) -> str:
    """What was trained in a distillation, with its arguments."""
    if run.command != "distill":
        return ""
    if run.config.get("student") is None:
        return "the teacher itself with linear attention"
    return _model(run.config, "student")


def _model(config: Mapping[str, Any], key: str) -> str:
    """A model with what was said of it."""
    if not isinstance(config.get(key), str):
        return ""
    extra = [setting(config[f"{key}_{what}"]) for what in ("arch", "args") if config.get(f"{key}_{what}")]
    extra += ["random weights"] if config.get(f"{key}_pretrained") is False else []
    return config[key] + (f" ({', '.join(extra)})" if extra else "")


def _stages(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Length, batch and learning rate of stages that have their own."""
    found = []
    for stage, values in config.items():
        if isinstance(values, dict) and "learning_rate" in values:
            unit = "epochs" if values.get("epochs") is not None else "iterations"
            said = f"{setting(values.get(unit))} {unit}, batch {setting(values.get('batch_size'))}"
            found.append((stage, f"{said}, learning rate {setting(values['learning_rate'])}"))
    return found


def settings_tables(runs: Sequence[RunRecord]) -> list[SettingsTable]:
    """One table a command and kind of stages, since others share few settings; runs without a configuration are in none."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        if run.config:
            groups.setdefault((run.command or "(unknown)", *(stage for stage, _ in _stages(run.config))), []).append(run)
    tables = []
    for (command, *stages), members in groups.items():
        flat = [_flat(run.config) for run in members]
        keys = list(dict.fromkeys(key for settings in flat for key in settings))
        rows = [(key, *(setting(settings.get(key)) for settings in flat)) for key in keys]
        different = [row for row in rows if len(set(row[1:])) > 1]
        names = [run.name for run in members]
        title = command + (f" in stages ({', '.join(stages)})".replace("_", " ") if stages else "")
        tables.append(SettingsTable(command=title, names=names, different=different, all=rows))
    return tables


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """``{"stage": {"epochs": 5}}`` as ``{"stage.epochs": 5}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found
