"""Charts of training: losses, likeness to the teacher and accuracies over the steps of a run, and likeness by depth."""

from collections.abc import Iterable, Sequence
from typing import Any

from .charts import DASHES, SERIES, SYMBOLS, Chart, base_layout, label, make_logarithmic, mark
from .run_record import RunRecord
from .wording import NONE, key_words, listed, percent, plain

#: Points of a line; more are thinned out, the last one stays.
_POINTS = 500
#: Values whose largest is so many times the smallest stand on a logarithmic axis.
_DECADES = 20.0

Points = list[tuple[float, float]]


def run_charts(run: RunRecord) -> list[Chart]:
    """Losses, likeness to the teacher, accuracies and errors of blocks over the steps of a run; those that there are."""
    losses = _losses(run)
    return [chart for chart in (losses, _fidelity(run), _accuracies(run), _blocks(run)) if chart is not None]


def _losses(run: RunRecord) -> Chart | None:
    skipped = ("learning_rate", "step_seconds", "images_per_second", "data_wait", "memory_gib", "gradient_norm")
    keys = [key for key in run.keys("train") if key not in skipped]
    single = sum(key != "loss" for key in keys) == len(run.stages)  # one term a stage says what the loss says
    if (single and "loss" in keys) or not keys:  # none before the first step
        keys = ["loss"]
    traces, rows = [], []
    for place, key in enumerate(keys):
        for split, name in (("held_out", "held out"), ("train", "training")):
            parts = _by_stage(run, split, key)
            if any(parts):
                held_out = split == "held_out"
                traces.append(
                    _curve(f"{key_words(key)}, {name}", parts, place, dash="solid" if held_out else "dot", marks=held_out)
                )
                rows.append(_first_and_last(f"{key_words(key)}, {name}", parts))
    if not traces:
        return None
    thinned = " Long curves are thinned out." if any(len(run.series("train", key)) > _POINTS for key in keys) else ""
    return Chart(
        name=f"Losses of {run.name} over training steps",
        caption="Lower is better. Judge by the held-out lines (with marks): they should fall and stay down. Training "
        "lines (dotted) are noisy and, with augmentation, may lie above them." + _boundaries_in_words(run) + thinned,
        figure=_over_steps(traces, run, "loss", log=_spans_decades(traces)),
        columns=("curve", "at the start", "now"),
        rows=tuple(rows),
    )


def _fidelity(run: RunRecord) -> Chart | None:
    keys = [
        k for k in run.keys("held_out") if k in ("final_cosine", "cka", "masked_cosine") or k.startswith("agreement_stage")
    ]
    keys.sort(key=lambda key: (key.startswith("agreement_stage"), key != "final_cosine"))
    caption = (
        "Is it working? Likeness to the teacher on held-out images; 1 is equal. Every line should end above its own start."
    )
    return _held_out_chart(
        run, keys, f"Likeness of {run.name} to its teacher over training steps", caption, "likeness, 1 is equal"
    )


def _accuracies(run: RunRecord) -> Chart | None:
    keys = [key for key in run.keys("held_out") if key in ("top1", "top5", "knn", "miou", "pixel_accuracy", "mean_accuracy")]
    caption = (
        "Is it working? Accuracy on held-out images; more is better. Steps of a few points are chance where images are few."
    )
    return _held_out_chart(run, keys, f"Held-out accuracy of {run.name} over training steps", caption, "accuracy, %")


def _blocks(run: RunRecord) -> Chart | None:
    keys = [key for key in run.keys("held_out") if key.startswith("attention_error_block")]
    if len(keys) > 2 * SERIES:
        keys = keys[:: -(-len(keys) // SERIES)]
    caption = (
        "How far each block's linear attention is from the softmax attention it replaces: 0 is the same answer, 1 is what "
    )
    caption += "answering zero gives. Every line should fall."
    return _held_out_chart(
        run, keys, f"Attention errors of the blocks of {run.name} over training steps", caption, "error", log=True
    )


def _held_out_chart(
    run: RunRecord, keys: Sequence[str], name: str, caption: str, axis: str, log: bool = False
) -> Chart | None:
    traces, rows = [], []
    for place, key in enumerate(keys):
        points = dict(run.series("held_out", key))  # of a boundary the later stage's line, the same weights
        parts = [[(float(step), value) for step, value in points.items()]]
        dash = DASHES[place // SERIES % len(DASHES)]
        traces.append(_curve(key_words(key), parts, place, dash=dash, marks=True, symbol=SYMBOLS[place % len(SYMBOLS)]))
        rows.append(_first_and_last(key_words(key), parts))
    if not traces:
        return None
    return Chart(
        name=name,
        caption=caption + _boundaries_in_words(run),
        figure=_over_steps(traces, run, axis, log=log and _spans_decades(traces)),
        columns=("curve", "at the start", "now"),
        rows=tuple(rows),
    )


def stage_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Agreement of the activation maps by stage, at the start and now, one colour a run."""
    import plotly.graph_objects as go  # with the chart, since the command line starts without it

    traces, rows = [], []
    for place, run in enumerate(runs):
        keys = sorted(
            (k for k in run.keys("held_out") if k.startswith("agreement_stage")), key=lambda k: int(k.rpartition("e")[2])
        )
        ends = {key: [value for _, value in run.series("held_out", key)] for key in keys}
        if not keys:
            continue
        names = [f"stage {key.rpartition('e')[2]}" for key in keys]
        for when, at, dash in (("at the start", 0, "dot"), ("now", -1, "solid")):
            traces.append(
                go.Scatter(
                    x=names,
                    y=[ends[key][at] for key in keys],
                    name=f"{label(run.name)}, {when}",
                    mode="lines+markers",
                    line={"dash": dash, "width": 2},
                    marker={"symbol": "circle-open" if at == 0 else SYMBOLS[place % len(SYMBOLS)], "size": 9},
                    meta={"series": place % SERIES},
                    hovertemplate="%{y:.3f} at %{x}",
                )
            )
        for key, name in zip(keys, names, strict=True):
            first, last = ends[key][0], ends[key][-1]
            closed = percent((last - first) / (1 - first)) if first < 1 - 1e-9 else NONE
            rows.append((run.name, name, f"{first:.3f}", f"{last:.3f}", closed))
    if not traces:
        return None
    return Chart(
        name="Agreement of activation maps with the teacher's, by stage of depth",
        caption="How alike the activation maps of student and teacher are, from the first part of the depth to the last. "
        "Dotted is the start, solid is now; 1 is equal. It starts high by nature: look at how much of the gap to 1 closed.",
        figure=go.Figure(data=traces, layout=base_layout("stage", "agreement, 1 is equal")),
        columns=("run", "stage", "at the start", "now", "gap closed"),
        rows=tuple(rows),
    )


def _by_stage(run: RunRecord, split: str, key: str) -> list[Points]:
    return [thin([(float(step), value) for step, value in run.series(split, key, stage)]) for stage in run.stages]


def thin(points: Points) -> Points:
    """At most about `_POINTS` of them, evenly chosen, first and last among them."""
    stride = -(-len(points) // _POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _curve(name: str, parts: Sequence[Points], place: int, *, dash: str, marks: bool, symbol: str = "circle") -> Any:
    """A line over steps, open between stages."""
    import plotly.graph_objects as go

    x: list[float | None] = []
    y: list[float | None] = []
    for part in (part for part in parts if part):
        if x:
            x, y = [*x, None], [*y, None]
        x, y = [*x, *(step for step, _ in part)], [*y, *(value for _, value in part)]
    return go.Scatter(
        x=x,
        y=y,
        name=label(name),
        mode="lines+markers" if marks else "lines",
        line={"dash": dash, "width": 2 if marks else 1.5},
        marker={"size": 7, "symbol": symbol},
        meta={"series": place % SERIES},
        connectgaps=False,
        hovertemplate="%{y:.4g}",
    )


def _first_and_last(name: str, parts: Iterable[Points]) -> tuple[str, ...]:
    points = [point for part in parts for point in part]
    return name, *(f"{plain(value)} (step {step:.0f})" for step, value in (points[0], points[-1]))


def _spans_decades(traces: Iterable[Any]) -> bool:
    values = [value for trace in traces for value in trace.y if value is not None]
    return min(values) > 0 and max(values) / min(values) > _DECADES


def _over_steps(traces: list[Any], run: RunRecord, axis: str, *, log: bool) -> Any:
    import plotly.graph_objects as go

    layout = base_layout("step", axis)
    layout["xaxis"]["unifiedhovertitle"] = {"text": "step %{x}"}
    if log:
        make_logarithmic(layout["yaxis"], [value for trace in traces for value in trace.y if value is not None])
    for stage, step in list(run.starts().items())[1:]:
        mark(layout, step, label(stage), log=False)
    return go.Figure(data=traces, layout=layout)


def _boundaries_in_words(run: RunRecord) -> str:
    starts = list(run.starts().items())
    if len(starts) < 2:
        return ""
    said = listed([f"{stage} at step {step}" for stage, step in starts[1:]])
    return f" The run begins with {starts[0][0]}; the dotted upright line marks the start of {said}."
