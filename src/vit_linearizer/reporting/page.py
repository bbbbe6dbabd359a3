"""The page: one HTML file with everything in it, made of what lies in run folders, that needs neither network nor script.

All text goes through a template that escapes it; charts travel as JSON that no browser runs; the page's own policy allows
the two scripts by their digest and nothing else, so that even a mistake here could not run a name as code.
"""

import base64
import hashlib
import importlib.metadata
import io
import os
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from ..benchmarking.cases import patch_text, size_text, variant_name
from ..benchmarking.summary import sentences
from ..contracts import UserError
from ..training.run_folder import write_atomically
from .answer import did_it_work, how_close, is_it_faster, subjects
from .cards import card, settings_tables, what_was_done
from .charts import Chart
from .curves import run_charts, stage_chart
from .findings import find, grouped
from .map_pictures import MapPictures, map_pictures
from .records import BenchmarkRecord, Records, read_records
from .run_record import RunRecord, number
from .scores import ScoreTable, score_tables, trade_off, what_the_trade_off_lacks
from .speed_charts import benchmark_charts, trade_off_chart
from .wording import METRICS, NONE, listed, plain, shown

_MARKS = {"good": "✓", "partly": "◐", "bad": "✗", "open": "?"}
_PARTS = {
    "answer": "In short",
    "runs": "Runs",
    "curves": "Curves",
    "fidelity": "Likeness",
    "maps": "Maps",
    "accuracy": "Accuracies",
    "speed": "Speed",
    "trade-off": "Trade-off",
    "settings": "Settings",
    "findings": "Warnings",
}
#: Parts that there are only with training runs.
_OF_RUNS = ("runs", "curves", "fidelity", "maps", "settings")
#: So many students in the answer and in the chart by depth; more cannot be read.
_SUBJECTS = 6


def write_report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, maps: bool = True) -> Path:
    """Read run folders and write one self-contained HTML page on them; works on runs in progress.

    Args:
        runs: run folders, or folders that hold runs or a benchmark.
        out: the file; replaced once the new one is complete.
        maps: draw activation maps too, where teacher and student lie on this disk.

    Returns:
        The file.

    Raises:
        UserError: a folder holds nothing of this package, or the file cannot be written.
    """
    file = Path(out)
    if file.is_dir():
        raise UserError("--out", file, "is a folder; give a file, e.g. report.html in it")
    records = read_records([os.fspath(run) for run in runs])
    text = render(records, map_pictures(records.runs) if maps else MapPictures(missing="Maps were left out of this report."))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A file name may hold bytes that are no text; they are shown as escapes.
        write_atomically(file, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    except OSError as error:
        raise UserError("--out", file, f"cannot be written: {error.strerror}") from error
    return file


def render(records: Records, maps: MapPictures) -> str:
    """The page as text.

    Args:
        records: what was found.
        maps: pictures of activation maps.
    """
    import jinja2  # with plotly, when a page is written: the command line starts without both
    from plotly.offline import get_plotlyjs

    folder = Path(__file__).parent
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    scripts = {
        "plotly": _one_script(get_plotlyjs()),
        "script": _one_script((folder / "report.js").read_text(encoding="utf-8")),
    }
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts.values()]
    context = {**_content(records, maps), **{name: _Source(text) for name, text in scripts.items()}}
    return templates.get_template("report.html.jinja").render(script_hashes=hashes, **context)


class _Source(str):
    """Source of our own that stands in the page as it is."""

    def __html__(self) -> str:
        return str(self)


def _one_script(text: str) -> str:
    """A script as browsers read it from the page, which is what its digest is taken of."""
    return "\n" + text.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")


def _content(records: Records, maps: MapPictures) -> dict[str, Any]:
    """All that the template shows, in its order."""
    charts = _Numbered()
    tables = score_tables(records)
    found = find(records, tables)
    about = subjects(records)
    trade = trade_off(records, tables)
    distilled = [run for run in records.runs if run.command == "distill"]
    stages = stage_chart(sorted(distilled, key=lambda run: run.is_baseline)[:_SUBJECTS])
    settings = settings_tables(records.runs)
    parts = [(anchor, text) for anchor, text in _PARTS.items() if records.runs or anchor not in _OF_RUNS]
    return {
        "title": records.title,
        "version": importlib.metadata.version("vit-linearizer"),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "runs_in_words": _runs_in_words(records.runs),
        "parts": [(anchor, text) for anchor, text in parts if anchor != "settings" or settings],
        "marks": _MARKS,
        "worked": [did_it_work(run, records) for run in about[:_SUBJECTS]],
        "close": [how_close(run, records, tables) for run in about[:_SUBJECTS]],
        "faster": [is_it_faster(run, records) for run in about[:_SUBJECTS]],
        "cards": [card(run) for run in records.runs],
        "curves": [
            {
                "name": run.name,
                "what": what_was_done(run),
                "open": run in about,
                "charts": charts.numbered(run_charts(run)),
            }
            for run in records.runs
        ],
        "stages": charts.numbered([stages])[0] if stages is not None else None,
        "maps": {"pictures": [_picture(caption, webp) for caption, webp in maps.pictures], "missing": maps.missing},
        "score_tables": [_score_table(table) for table in tables],
        "class_tables": _class_tables(records.runs),
        "evaluate_command": f"vit-linearizer evaluate --models {_paths(records)} --data FOLDER",
        "benchmarks": [_benchmark(benchmark, records, charts) for benchmark in records.benchmarks],
        "benchmark_command": f"vit-linearizer benchmark --models TEACHER {_paths(records)} --out {_paths(records, 1)}",
        "trade": charts.numbered([trade_off_chart(trade)])[0] if trade is not None else None,
        "trade_lacks": what_the_trade_off_lacks(records, tables),
        "configurations": settings,
        "findings": {kind: grouped(found, kind) for kind in ("warning", "note", "good")},
    }


class _Numbered:
    """Gives charts their places in the page."""

    def __init__(self) -> None:
        self.count = 0

    def numbered(self, charts: Iterable[Chart]) -> list[dict[str, Any]]:
        """What the template needs of charts."""
        found = []
        for chart in charts:
            self.count += 1
            found.append(
                {
                    "id": f"chart-{self.count}",
                    "name": chart.name,
                    "caption": chart.caption,
                    "columns": chart.columns,
                    "rows": chart.rows,
                    "json": chart.figure.to_plotly_json(),
                }
            )
        return found


def _runs_in_words(runs: Sequence[RunRecord]) -> str:
    if not runs:
        return "No training runs, speeds or scores alone"
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {listed([run.name for run in runs], most=8)}"


def _paths(records: Records, most: int = 4) -> str:
    """Folders of the subjects, as a shell reads them."""
    return " ".join(shlex.quote(str(run.path)) for run in subjects(records)[:most]) or "RUN"


def _picture(caption: str, webp: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(webp)) as opened:
        width, height = opened.size
    return {
        "data": "data:image/webp;base64," + base64.b64encode(webp).decode(),
        "width": width,
        "height": height,
        "caption": caption,
        "alt": f"Activation maps of teacher and students, side by side, for {caption}",
    }


def _score_table(table: ScoreTable) -> dict[str, Any]:
    columns = table.columns
    rows = []
    for identity, values in table.ordered():
        cells = [
            {
                "text": shown(values.get(key), METRICS[key]),
                "best": values.get(key) is not None and values[key] == table.best(key),
            }
            for key in columns
        ]
        rows.append({"name": table.names[identity], "cells": cells})
    heads = [METRICS[key].title + (f", {METRICS[key].unit}" if METRICS[key].unit else "") for key in columns]
    return {"title": table.title, "note": table.note, "columns": heads, "rows": rows}


def _class_tables(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """IoU by class of segmentation runs, lowest first."""
    found = []
    for run in runs:
        scores = run.evaluation.get("iou")
        if isinstance(scores, dict) and scores:
            values = sorted(scores.items(), key=lambda item: (number(item[1]) is None, number(item[1]) or 0.0))
            rows = [(name, shown(value, METRICS["miou"])) for name, value in values]
            found.append({"title": f"IoU of every class, {run.name}", "columns": ("class", "IoU, %"), "rows": rows})
    return found


def _benchmark(benchmark: BenchmarkRecord, records: Records, charts: _Numbered) -> dict[str, Any]:
    config = benchmark.config
    work = ("forward and backward" if config.get("train") else "forward pass") + (
        ", compiled" if config.get("compile") else ""
    )
    batch = number(config.get("batch_size"))
    said = f"{work[0].upper()}{work[1:]}" + (f", {batch:.0f} image{'s' if batch > 1 else ''} at a time" if batch else "")
    renamed = [{**row, "model": records.name_of(row["model"], benchmark)} for row in benchmark.rows]
    summaries = [{**row, "model": records.name_of(row["model"], benchmark)} for row in benchmark.summaries]
    rows = []
    for row in renamed:
        ok = row["status"] == "ok"
        low, high = row["spread"] if ok else (0, 0)
        rows.append(
            (
                size_text(row["image_size"]),
                variant_name(row["model"], row["attention"]),
                row["precision"],
                patch_text(row["patch_size"]),
                f"{row['tokens']:,}",
                plain(row["images_per_second"]) if ok else row["status"],
                f"{plain(row['seconds_median'])} ({plain(low)} .. {plain(high)})" if ok else NONE,
                plain(row["memory_peak_mib"]) if ok else NONE,
            )
        )
    return {
        "machine": benchmark.machine,
        "settings": f"{said}; times are medians. Memory is the peak of weights and activations.",
        "sentences": sentences(summaries, renamed[0]),
        "charts": charts.numbered(benchmark_charts(benchmark, records)),
        "columns": ("pixels", "model", "precision", "patch", "tokens", "images/s", "seconds (min .. max)", "memory, MiB"),
        "rows": rows,
    }
