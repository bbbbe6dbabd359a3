"""A training run as it lies in its folder, read for people: whatever is missing, cut off, older or unknown is passed over.

The files are those of `training.run_folder`. A run may be finished, in progress, or killed between any two bytes: a line
of the metrics that is no JSON is left out and counted, a file that cannot be read becomes a sentence in ``problems``.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.datasets import split_held_out

#: A run that has written nothing for so long is taken for stopped; progress lines come every half minute.
_SILENT_SECONDS = 600.0
#: Weights of the losses that make a distillation more than plain regression of the teacher's tokens.
_METHODS = ("activation_matching_weight", "masked_prediction_weight", "feature_alignment_weight")
_STARTED = re.compile(r" on \d+ images")
_HELD_OUT = re.compile(r"\((\d+) held out")
_DEVICE = re.compile(r"\), (\w+)$")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        path: its folder, as the user wrote it.
        name: what to call it, unlike that of any other run of the report.
        config: ``config.json``; empty where there is none.
        lines: of ``metrics.jsonl``; every one has an integer ``step``, and a ``split`` and a ``stage`` that are text.
        evaluation: ``evaluation.json``; empty where there is none.
        skipped: lines of ``skipped.txt``.
        log: lines of ``run.log``.
        problems: in sentences, what could not be read.
        silent_seconds: since something was last written, or None where nothing was.
    """

    path: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    silent_seconds: float | None = None

    @property
    def command(self) -> str:
        """``distill``, ``finetune``, ``segment``, or an empty text."""
        return _text(self.config.get("command"))

    @property
    def is_baseline(self) -> bool:
        """Whether it is the plain regression of the teacher's tokens that other distillations are held against."""
        regression = number(self.config.get("feature_regression_weight")) or 0
        parts = [self.config, *self._stage_settings]
        return regression > 0 and not any(number(part.get(key)) for part in parts for key in _METHODS)

    @property
    def teacher_is_random(self) -> bool:
        """Whether the teacher is a bare architecture, as far as the configuration says."""
        teacher = _text(self.config.get("teacher"))
        on_disk = Path(teacher.removeprefix("local-dir:")).exists() or self.config.get("teacher_arch") is not None
        return bool(teacher) and self.config.get("teacher_pretrained") is False and not on_disk

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Their names in the order of training; one of them, without a name, in runs older than stages."""
        return tuple(dict.fromkeys(line["stage"] for line in self.lines))

    def keys(self, split: str, stage: str | None = None) -> tuple[str, ...]:
        """Names of all numbers of a split, in the order in which they turn up; step and epoch left out."""
        found = dict.fromkeys(
            key for line in self._of(split, stage) for key, value in line.items() if number(value) is not None
        )
        return tuple(key for key in found if key not in ("step", "epoch"))

    def series(self, split: str, key: str, stage: str | None = None) -> list[tuple[int, float]]:
        """(step, value) of one number, finite values alone.

        Args:
            split: ``train`` or ``held_out``.
            key: of the number.
            stage: one stage, or None for all.
        """
        points = ((line["step"], number(line.get(key))) for line in self._of(split, stage))
        return [(step, value) for step, value in points if value is not None]

    def starts(self) -> dict[str, int]:
        """By stage, the first step of it that anything is known of."""
        found: dict[str, int] = {}
        for line in self.lines:
            found.setdefault(line["stage"], line["step"])
        return found

    @property
    def steps(self) -> int:
        """Optimisation steps that the metrics tell of."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, as far as configuration and metrics tell."""
        epochs, iterations = self._planned
        if iterations is not None:
            return round(iterations)
        for line in reversed(self.lines):
            epoch = number(line.get("epoch"))
            if epochs is not None and epoch:
                return round(epochs * line["step"] / epoch)
        return None

    @property
    def state(self) -> str:
        """``finished``, ``in progress``, ``stopped``, or ``unknown`` where nothing says how long it was to be."""
        held_out = [line for line in self.lines if line["split"] == "held_out"]
        epochs, iterations = self._planned
        if held_out and iterations is not None and held_out[-1]["step"] >= iterations:
            return "finished"
        if held_out and epochs is not None and (number(held_out[-1].get("epoch")) or 0) >= epochs - 1e-6:
            return "finished"
        if self.silent_seconds is not None and self.silent_seconds < _SILENT_SECONDS:
            return "in progress"
        return "unknown" if epochs is None and iterations is None else "stopped"

    @property
    def held_out_images(self) -> int | None:
        """How many images it is judged on, from the log, the scores or, for a distillation, the rule that splits them."""
        for line in reversed(self.log):
            if match := _HELD_OUT.search(line):
                return int(match[1])
        if (scored := number(self.evaluation.get("images"))) is not None:
            return int(scored)
        images, seed = number(self.config.get("images")), number(self.config.get("seed"))
        if self.command != "distill" or images is None or seed is None or images < 1 or seed < 0:
            return None
        return len(split_held_out(int(images), int(seed))[1])

    @property
    def device(self) -> str | None:
        """Kind of device it was trained on, as the log says."""
        for line in reversed(self.log):
            if _STARTED.search(line) and (match := _DEVICE.search(line)):
                return match[1]
        return None

    @property
    def seconds(self) -> float | None:
        """Wall-clock time by the log; the time between a kill and the next start is left out."""
        parts: list[list[datetime]] = []
        for line in self.log:
            stamp = _stamp(line)
            if stamp is not None:
                if _STARTED.search(line) or not parts:
                    parts.append([])
                parts[-1].append(stamp)
        spans = [(part[-1] - part[0]).total_seconds() for part in parts]
        return sum(max(0.0, span) for span in spans) if spans else None

    @property
    def started(self) -> str:
        """Time of the log's first line as text that sorts; ``9`` where there is no log."""
        return next((str(stamp) for stamp in map(_stamp, self.log) if stamp is not None), "9")

    @property
    def evaluations(self) -> tuple[Mapping[str, Any], ...]:
        """Records that ``evaluate`` has left in ``evaluation.json``."""
        records = self.evaluation.get("evaluate")
        return tuple(record for record in records if isinstance(record, dict)) if isinstance(records, list) else ()

    @property
    def _stage_settings(self) -> list[Mapping[str, Any]]:
        """Those of each stage, in a run whose stages have their own."""
        return [value for value in self.config.values() if isinstance(value, dict) and "learning_rate" in value]

    @property
    def _planned(self) -> tuple[float | None, float | None]:
        """Epochs or iterations of all stages together."""
        parts = self._stage_settings or [self.config]
        epochs, iterations = ([number(part.get(key)) for part in parts] for key in ("epochs", "iterations"))
        if all(value is not None for value in iterations):
            return None, sum(value for value in iterations if value is not None)
        if all(value is not None for value in epochs):
            return sum(value for value in epochs if value is not None), None
        return None, None

    def _of(self, split: str, stage: str | None) -> Iterator[Mapping[str, Any]]:
        return (line for line in self.lines if line["split"] == split and stage in (None, line["stage"]))


def number(value: Any) -> float | None:
    """A finite number as it is; None for anything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def read_run(folder: Path, name: str) -> RunRecord | None:
    """Read a folder; None where it holds no run of this package.

    Args:
        folder: with a ``config.json`` that names a command, or a ``metrics.jsonl`` with steps, or both.
        name: what to call the run.
    """
    problems: list[str] = []
    config = read_json(folder / "config.json", problems)
    lines, broken = _read_lines(folder / "metrics.jsonl", problems)
    if not lines and not isinstance(config.get("command"), str):
        return None
    if broken:
        problems.append(f"{broken} line{'s' if broken > 1 else ''} of metrics.jsonl could not be read and were left out.")
    touched = [file.stat().st_mtime for file in (folder / "metrics.jsonl", folder / "run.log") if file.is_file()]
    return RunRecord(
        path=folder,
        name=name,
        config=config,
        lines=lines,
        evaluation=read_json(folder / "evaluation.json", problems),
        skipped=tuple(line for line in _read_text(folder / "skipped.txt", problems).splitlines() if line.strip()),
        log=tuple(_read_text(folder / "run.log", problems).splitlines()),
        problems=tuple(problems),
        silent_seconds=max(0.0, time.time() - max(touched)) if touched else None,
    )


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file, or none in it. What is wrong is added to ``problems``."""
    text = _read_text(file, problems)
    if not text:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{file.name} holds no JSON object and was left out.")
        return {}
    return content


def _read_lines(file: Path, problems: list[str]) -> tuple[tuple[Mapping[str, Any], ...], int]:
    """The lines that can be used, and how many cannot; a last one without an end is being written."""
    text = _read_text(file, problems)
    found, broken = [], 0
    texts: Sequence[str] = text.split("\n")
    for place, line in enumerate(texts):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            step, split, stage = values["step"], values["split"], values.get("stage", "")
            usable = (
                isinstance(step, int) and not isinstance(step, bool) and isinstance(split, str) and isinstance(stage, str)
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            usable = False
        if usable:
            found.append({**values, "stage": stage})
        elif place < len(texts) - 1:
            broken += 1
    return tuple(found), broken


def _read_text(file: Path, problems: list[str]) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError as error:
        problems.append(f"{file.name} could not be read: {error.strerror}.")
        return ""


def _stamp(line: str) -> datetime | None:
    """The time a line of the log begins with."""
    try:
        return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")  # in local time
    except ValueError:
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
