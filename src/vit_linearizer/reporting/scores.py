"""Accuracies of all evaluations that were found, as tables; and accuracy against throughput (the paper's figure 1).

Source of the figure: ViT-Linearizer (arXiv 2504.00037), figure 1. Numbers stand in one table only where they were taken on
the same data under the same settings, since nothing else compares.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .records import BenchmarkRecord, Records
from .run_record import RunRecord, number
from .wording import ACCURACIES, METRICS, listed, setting

#: A likeness above this is that of the teacher to itself, which wins nothing.
_ITSELF = 0.999
#: What a record of ``evaluate`` says of its settings, in words; other keys are told apart by, but not shown.
_SETTINGS = {"image_size": "images of {} pixels", "teacher": "teacher {}"}


@dataclass(kw_only=True)
class ScoreTable:
    """Scores that compare.

    Attributes:
        title: what was judged on.
        note: how to read it.
        rows: scores by model; keys are identities, see `Records.identity`.
        names: what the models are called.
    """

    title: str
    note: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, identity: str, name: str, values: Mapping[str, Any]) -> None:
        """Add the known numbers among ``values`` to a model's row."""
        found = {key: value for key in METRICS if (value := number(values.get(key))) is not None}
        if found:
            self.rows.setdefault(identity, {}).update(found)
            self.names[identity] = name

    @property
    def columns(self) -> list[str]:
        """Metrics that any row has, in the order of `METRICS`."""
        return [key for key in METRICS if any(key in row for row in self.rows.values())]

    def ordered(self) -> list[tuple[str, dict[str, float]]]:
        """(identity, scores), best first by the accuracy that most rows have; rows without it behind."""
        if not self.columns:
            return []
        key = commonest(self.rows.values()) or self.columns[0]
        sign = METRICS[key].better or 1
        return sorted(self.rows.items(), key=lambda item: (key not in item[1], -sign * item[1].get(key, 0.0)))

    def best(self, key: str) -> float | None:
        """The best of a column, where there is something to choose between."""
        values = [row[key] for row in self.rows.values() if key in row]
        if key in ("final_cosine", "cka"):
            values = [value for value in values if value < _ITSELF]
        better = METRICS[key].better
        if better == 0 or len(set(values)) < 2:
            return None
        return max(values) if better > 0 else min(values)


def commonest(rows: Iterable[Mapping[str, float]]) -> str | None:
    """The accuracy that most rows have; of equals the first of `ACCURACIES`."""
    rows = list(rows)
    counts = {key: sum(key in row for row in rows) for key in ACCURACIES}
    key = max(ACCURACIES, key=lambda key: counts[key])  # max takes the first of equals
    return key if counts[key] else None


def score_tables(records: Records) -> list[ScoreTable]:
    """All scores found: the quickstart's, those of `evaluate`, those that runs have of their own held-out images."""
    tables: dict[str, ScoreTable] = {}
    for comparison in records.comparisons:
        folder = comparison.file.parent
        if comparison.quickstart:
            table = tables.setdefault(
                f"quickstart {folder.resolve()}",
                ScoreTable(
                    title="quickstart: handwritten digits kept out of all training",
                    note="360 digits (one digit is 0.28 points; differences below about 1.1 points are noise). kNN, linear "
                    "probe and few labels read frozen features; top-1 and fine-tuned are classifiers.",
                ),
            )
            for model, values in comparison.models.items():
                run = records.run_of(str((folder / model).resolve()))
                table.add(str((folder / model).resolve()), run.name if run else model, values)
        else:
            table = _evaluated(tables, comparison.settings)
            for model, values in comparison.models.items():
                table.add(records.identity(model), records.name_of(model), values)
    for run in records.runs:
        for record in run.evaluations:
            _evaluated(tables, record).add(_identity(run), run.name, record)
    for run in records.runs:
        if table_of_own := _own_table(run, tables):
            table_of_own.add(_identity(run), run.name, run.evaluation)
    return [table for table in tables.values() if any(METRICS[key].better for key in table.columns)]


def _identity(run: RunRecord) -> str:
    return str(run.path.resolve())


def _evaluated(tables: dict[str, ScoreTable], record: Mapping[str, Any]) -> ScoreTable:
    """The table of what `evaluate` measured under the same settings."""
    names = ("data", "dataset", "image_size", "teacher", "stages", "shots", "draws")
    settings = {name: record.get(name) for name in names}
    said = [text.format(setting(record[name])) for name, text in _SETTINGS.items() if record.get(name)]
    title = ", ".join(["evaluate on " + setting(record.get("data")), *said])
    note = "Measured by vit-linearizer evaluate on the test part of these data."
    return tables.setdefault(
        "evaluate " + json.dumps(settings, sort_keys=True, default=str), ScoreTable(title=title, note=note)
    )


def _own_table(run: RunRecord, tables: dict[str, ScoreTable]) -> ScoreTable | None:
    """The table of runs that are judged by the same rule on held-out images of the same data."""
    if run.command not in ("distill", "finetune", "segment"):
        return None
    kind = {"distill": "distillation", "finetune": "fine-tuning", "segment": "segmentation"}[run.command]
    key = json.dumps([run.command, run.config.get("data"), run.config.get("seed"), run.config.get("mode")], default=str)
    return tables.setdefault(
        f"own {key}",
        ScoreTable(
            title=f"{kind} on {setting(run.config.get('data'))}: the run's own held-out images",
            note="The saved weights were chosen on these images, so the numbers are slightly too good. Final claims need "
            "other images: vit-linearizer evaluate."
            + (" kNN here has at most 512 neighbours to choose from." if run.command == "distill" else ""),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Accuracy against throughput of several models.

    Attributes:
        metric: key of the accuracy.
        table: it comes from.
        benchmark: the throughput comes from.
        precision: of the benchmark.
        points: by model name, the accuracy, and (image size, images a second) from small to large.
    """

    metric: str
    table: ScoreTable
    benchmark: BenchmarkRecord
    precision: str
    points: dict[str, tuple[float, list[tuple[tuple[int, int], float]]]]


def trade_off(records: Records, tables: list[ScoreTable]) -> TradeOff | None:
    """The comparison of most models that have both an accuracy and a speed; None with fewer than two."""
    best: TradeOff | None = None
    for benchmark in records.benchmarks:
        speeds: dict[tuple[str, str], dict[str, list[tuple[tuple[int, int], float]]]] = {}
        for row in benchmark.measured:
            if row["attention"] == "eager":  # the same model stands there with its faster attention
                continue
            line = speeds.setdefault((row["precision"], str(row["patch_size"])), {})
            size = (row["image_size"][0], row["image_size"][1])
            line.setdefault(records.identity(row["model"], benchmark), []).append((size, row["images_per_second"]))
        for table in tables:
            for (precision, _), line in speeds.items():
                both = {identity: table.rows[identity] for identity in line if identity in table.rows}
                metric = commonest(both.values())
                if metric is None:
                    continue
                points = {
                    table.names[identity]: (row[metric], sorted(line[identity], key=lambda point: point[0][0] * point[0][1]))
                    for identity, row in both.items()
                    if metric in row
                }
                if len(points) >= 2 and (best is None or len(points) > len(best.points)):
                    best = TradeOff(metric=metric, table=table, benchmark=benchmark, precision=precision, points=points)
    return best


def what_the_trade_off_lacks(records: Records, tables: list[ScoreTable]) -> str:
    """One sentence on what has to be measured for it."""
    if not records.benchmarks and not tables:
        return "Neither accuracies nor speeds were found: run vit-linearizer evaluate and benchmark on the models."
    if not records.benchmarks:
        return "No speeds were found: run vit-linearizer benchmark on the same models, with --out to one of these folders."
    fast = {records.name_of(row["model"], b) for b in records.benchmarks for row in b.measured}
    return (
        f"No two models have both a speed and an accuracy of the same kind. Speeds are there for {listed(sorted(fast))}; "
        "run vit-linearizer evaluate on them together."
    )
