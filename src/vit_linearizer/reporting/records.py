"""All that a report is made of: runs, benchmarks and comparisons, found in the folders that the user names.

A folder is a run, or holds runs one level down, beside which `quickstart` leaves ``quickstart.json``, `benchmark`
``benchmark.json`` and `evaluate` the file of its ``--out``. Models stand in these files under the name the user typed then;
`Records.identity` finds the run that is meant, even when the folder has been moved since.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..benchmarking.rendering import machine_text
from ..benchmarking.summary import Row, summarise
from ..contracts import UserError
from .run_record import RunRecord, number, read_json, read_run

_RUN_FILES = ("config.json", "metrics.jsonl", "evaluation.json", "benchmark.json", "quickstart.json")
_MEASURED = ("seconds_per_image", "seconds_median", "images_per_second", "memory_peak_mib")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    """One ``benchmark.json``.

    Attributes:
        folder: it lies in.
        complete: False while it is being measured, or where it was killed.
        machine: in one line.
        config: of the benchmark.
        rows: that can be used; numbers of measured ones are there and positive.
        summaries: of the rows, see `benchmarking.summary.summarise`.
    """

    folder: Path
    complete: bool
    machine: str
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    summaries: tuple[Row, ...]

    @property
    def measured(self) -> list[Row]:
        """Rows with numbers."""
        return [row for row in self.rows if row["status"] == "ok"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Scores of several models in one file.

    Attributes:
        file: it was read from.
        settings: what the scores depend on; empty for ``quickstart.json``.
        models: scores by model.
        quickstart: whether it is ``quickstart.json``.
    """

    file: Path
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    quickstart: bool


@dataclass(frozen=True, kw_only=True)
class Records:
    """What was found.

    Attributes:
        title: of the report: the folder's name, or the runs'.
        runs: in the order given, those of one folder by the time they began.
        benchmarks: each once.
        comparisons: each once.
        problems: in sentences, what could not be read beside the runs.
    """

    title: str
    runs: tuple[RunRecord, ...]
    benchmarks: tuple[BenchmarkRecord, ...]
    comparisons: tuple[Comparison, ...]
    problems: tuple[str, ...] = ()

    def identity(self, model: str, benchmark: BenchmarkRecord | None = None) -> str:
        """The same text for all names of one model: the full path of a run, or the model's name.

        Args:
            model: as typed then: run folder, ``local-dir:RUN/model``, timm name.
            benchmark: that the name comes from; its own folder tells where ``--out`` was.
        """
        path = Path(model.removeprefix("local-dir:"))
        path = path.parent if path.name == "model" else path
        known = {run.path.resolve() for run in self.runs}
        places = [path]
        if benchmark is not None and isinstance(benchmark.config.get("out"), str):
            out = Path(benchmark.config["out"])
            if path.is_relative_to(out):
                places.append(benchmark.folder / path.relative_to(out))
        for place in places:
            if place.resolve() in known:
                return str(place.resolve())
        return str(path.resolve()) if path.exists() else model

    def run_of(self, identity: str) -> RunRecord | None:
        """The run that `identity` gave."""
        return next((run for run in self.runs if str(run.path.resolve()) == identity), None)

    def name_of(self, model: str, benchmark: BenchmarkRecord | None = None) -> str:
        """What the report calls a model: the name of its run, or its own."""
        run = self.run_of(self.identity(model, benchmark))
        return run.name if run is not None else model


def read_records(paths: Sequence[str | Path]) -> Records:
    """Read what lies in folders.

    Args:
        paths: run folders, or folders that hold runs or a benchmark.

    Raises:
        UserError: none given, one is no folder, or holds nothing of this package.
    """
    if not paths:
        raise UserError("runs", None, "name at least one run folder")
    folders = list({Path(path).resolve(): Path(path) for path in paths}.values())
    found: list[RunRecord] = []
    benchmarks: list[BenchmarkRecord] = []
    comparisons: list[Comparison] = []
    problems: list[str] = []
    for folder in folders:
        if not folder.exists():
            raise UserError("runs", folder, "no such folder; give the --out folder of a run, or one that holds runs")
        if not folder.is_dir():
            raise UserError("runs", folder, "is a file; give the folder of a run, or one that holds runs")
        runs, beside = _look_into(folder)
        for place in beside:
            benchmarks += _read_benchmark(place, problems)
            comparisons += _read_comparisons(place, problems)
        if (
            not runs
            and not any(b.folder == folder for b in benchmarks)
            and not any(c.file.parent == folder for c in comparisons)
        ):
            remedy = "holds no run: neither config.json and metrics.jsonl, nor folders with them, nor a benchmark.json"
            raise UserError("runs", folder, remedy)
        found += runs
    unlike = list({run.path.resolve(): run for run in found}.values())
    titles = [folder.resolve().name or str(folder) for folder in folders]
    return Records(
        title=", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else ""),
        runs=tuple(_told_apart(unlike)),
        benchmarks=tuple(benchmarks),
        comparisons=tuple(comparisons),
        problems=tuple(problems),
    )


def _look_into(folder: Path) -> tuple[list[RunRecord], list[Path]]:
    """Runs of a folder, and the folders in which comparisons may lie."""
    own = read_run(folder, folder.resolve().name)
    if own is not None:
        return [own], [folder]
    places = sorted(place for place in folder.iterdir() if place.is_dir() and any((place / f).is_file() for f in _RUN_FILES))
    runs = [run for place in places if (run := read_run(place, place.name)) is not None]
    return sorted(runs, key=lambda run: (run.started, run.name)), [folder, *(run.path for run in runs)]


def _told_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of one name get the folder above it too, and a number where that is the same as well."""
    names = [run.name for run in runs]
    longer = ["/".join(run.path.resolve().parts[-2:]) if names.count(run.name) > 1 else run.name for run in runs]
    return [
        replace(run, name=f"{name} ({longer[:at].count(name) + 1})" if longer.count(name) > 1 else name)
        for at, (run, name) in enumerate(zip(runs, longer, strict=True))
    ]


def _read_benchmark(folder: Path, problems: list[str]) -> list[BenchmarkRecord]:
    content = read_json(folder / "benchmark.json", problems)
    rows, config = content.get("rows"), content.get("config")
    usable = [row for row in rows if _is_row(row)] if isinstance(rows, list) else []
    if not isinstance(rows, list) or not usable:
        return []
    if len(usable) < len(rows):
        problems.append(f"{len(rows) - len(usable)} rows of {folder.name}/benchmark.json could not be read.")
    try:
        machine = machine_text(content["machine"])
    except (KeyError, TypeError):
        machine = "the machine was not recorded"
    return [
        BenchmarkRecord(
            folder=folder,
            complete=content.get("complete") is True,
            machine=machine,
            config=config if isinstance(config, dict) else {},
            rows=tuple(usable),
            summaries=tuple(summarise(usable)),
        )
    ]


def _is_row(row: Any) -> bool:
    """Whether all that the report reads of a benchmark's row is there."""
    if not isinstance(row, dict) or not all(
        isinstance(row.get(k), str) for k in ("model", "precision", "attention", "status")
    ):
        return False
    for key in ("image_size", "patch_size"):
        sides = row.get(key)
        if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            return False
    if type(row.get("tokens")) is not int or row["tokens"] < 1:
        return False
    if row["status"] != "ok":
        return True
    spread = row.get("spread")
    pair = isinstance(spread, list) and len(spread) == 2 and all(number(end) is not None for end in spread)
    return (
        pair and all((number(row.get(key)) or 0) > 0 for key in _MEASURED[:3]) and number(row.get(_MEASURED[3])) is not None
    )


def _read_comparisons(folder: Path, problems: list[str]) -> list[Comparison]:
    """``quickstart.json`` and whatever `evaluate` was told to write there."""
    found = []
    for file in sorted(folder.glob("*.json")):
        if file.name in _RUN_FILES[:4]:
            continue
        quickstart = file.name == "quickstart.json"
        content = read_json(file, problems if quickstart else [])
        models = content if quickstart else content.get("models")
        if isinstance(models, dict) and (rows := {name: v for name, v in models.items() if isinstance(v, dict)}):
            settings = {} if quickstart else {key: value for key, value in content.items() if key != "models"}
            found.append(Comparison(file=file, settings=settings, models=rows, quickstart=quickstart))
    return found
