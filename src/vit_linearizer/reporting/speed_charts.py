"""Charts of speed: time and memory over tokens with the crossovers, and accuracy against throughput.

Source of the second: ViT-Linearizer (arXiv 2504.00037), figure 1.
"""

from typing import Any

from ..benchmarking.cases import size_text, variant_name
from .charts import SERIES, SYMBOLS, Chart, base_layout, label, make_logarithmic, mark
from .records import BenchmarkRecord, Records
from .scores import TradeOff
from .wording import METRICS, plain, shown

#: Points that an axis of accuracies spans at least.
_NARROWEST = 5.0


def benchmark_charts(benchmark: BenchmarkRecord, records: Records) -> list[Chart]:
    """Seconds an image and peak memory over tokens, on logarithmic axes, with the crossovers marked."""
    import plotly.graph_objects as go

    several = (
        len({row["precision"] for row in benchmark.rows}) > 1,
        len({str(row["patch_size"]) for row in benchmark.rows}) > 1,
    )
    lines: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in benchmark.measured:
        lines.setdefault((row["model"], row["attention"], row["precision"], str(row["patch_size"])), []).append(row)
    models = list(dict.fromkeys(model for model, *_ in lines))
    charts = []
    for key, axis in (("seconds_per_image", "seconds an image"), ("memory_peak_mib", "peak memory, MiB")):
        traces, rows = [], []
        for (model, attention, precision, patch), members in lines.items():
            members = sorted((row for row in members if row[key] > 0), key=lambda row: row["tokens"])
            name = variant_name(records.name_of(model, benchmark), attention)
            name += (f", {precision}" if several[0] else "") + (f", patch {patch}" if several[1] else "")
            place = models.index(model)
            traces.append(
                go.Scatter(
                    x=[row["tokens"] for row in members],
                    y=[row[key] for row in members],
                    name=label(name),
                    mode="lines+markers",
                    line={"dash": "dash" if attention == "eager" else "solid" if precision == "fp32" else "dot", "width": 2},
                    marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
                    meta={"series": place % SERIES},
                    customdata=[size_text(row["image_size"]) for row in members],
                    hovertemplate="%{y:.3g} at %{x:,} tokens (%{customdata} pixels)",
                )
            )
            rows += [(name, size_text(row["image_size"]), f"{row['tokens']:,}", plain(row[key])) for row in members]
        if not any(len(trace.x) for trace in traces):
            continue
        layout = base_layout("tokens (patches of one image)", axis)
        tokens = sorted({row["tokens"] for row in benchmark.measured})
        layout["xaxis"] |= {
            "type": "log",
            "tickvals": tokens,
            "ticktext": [f"{value:,}" for value in tokens],
            "tickangle": 0,
        }
        make_logarithmic(layout["yaxis"], [value for trace in traces for value in trace.y])
        crossed = _crossings(benchmark) if key == "seconds_per_image" else []
        for value in crossed:
            mark(layout, value, f"level at {value:,}", log=True)
        marked = (
            " The dotted upright line is where two models take equal time; right of it the later one is faster."
            if crossed
            else ""
        )
        charts.append(
            Chart(
                name=f"{axis[0].upper()}{axis[1:]} over tokens, {benchmark.machine.partition(';')[0]}",
                caption="Both axes are logarithmic: twice as steep is one power more. Lower is better." + marked,
                figure=go.Figure(data=traces, layout=layout),
                columns=("model", "pixels", "tokens", axis),
                rows=tuple(rows),
            )
        )
    return charts


def trade_off_chart(trade: TradeOff) -> Chart:
    """Accuracy over throughput, one line a model, one mark an image size."""
    import plotly.graph_objects as go

    metric = METRICS[trade.metric]
    traces, rows = [], []
    for place, (name, (accuracy, speeds)) in enumerate(trade.points.items()):
        texts = [size_text(size) for size, _ in speeds]
        traces.append(
            go.Scatter(
                x=[speed for _, speed in speeds],
                y=[accuracy] * len(speeds),
                name=label(name),
                mode="lines+markers",
                line={"width": 1.5},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": _growing(len(speeds)), "opacity": 1},
                meta={"series": place % SERIES},
                customdata=texts,
                hovertemplate="%{y:.1f} %, %{x:.3g} images/s at %{customdata} pixels",
            )
        )
        fast = [f"{plain(speed)} at {text}" for (_, speed), text in zip(speeds, texts, strict=True)]
        rows.append((name, shown(accuracy, metric), "; ".join(fast)))
    layout = base_layout("images a second", f"{metric.title}, %")
    make_logarithmic(layout["xaxis"], [speed for _, speeds in trade.points.values() for _, speed in speeds])
    values = [accuracy for accuracy, _ in trade.points.values()]
    middle, half = (max(values) + min(values)) / 2, max(_NARROWEST, 1.3 * (max(values) - min(values))) / 2
    layout["yaxis"]["range"] = [middle - half, middle + half]  # a tenth of a point should not look like a gulf
    layout["hovermode"] = "closest"
    layout["legend"]["itemsizing"] = "constant"
    return Chart(
        name=f"{metric.title} against images a second",
        caption="Up and to the right is better. Every mark is an image size, the largest mark the largest size; speeds were "
        f"measured at all of them ({trade.precision}), the accuracy once ({trade.table.title}), so lines are level.",
        figure=go.Figure(data=traces, layout=layout),
        columns=("model", f"{metric.title}, %", "images a second"),
        rows=tuple(rows),
    )


def _crossings(benchmark: BenchmarkRecord) -> list[int]:
    """Tokens at which a model takes as long as the first one, near ones told once."""
    found: list[int] = []
    for summary in benchmark.summaries:
        crossover = summary["crossover"]
        if crossover is not None and crossover["result"] == "reached":
            tokens = crossover["tokens"]
            if all(abs(tokens / other - 1) > 0.1 for other in found):
                found.append(tokens)
    return found


def _growing(count: int) -> list[float]:
    """Sizes of marks, from small to large."""
    return [8 + 14 * place / max(1, count - 1) for place in range(count)]
