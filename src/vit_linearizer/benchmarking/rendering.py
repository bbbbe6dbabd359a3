"""The content of ``benchmark.json`` as Markdown for people, in a file and on the console, and as a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cases import patch_text, size_text, variant_name
from .summary import Row, sentences

_COLOURS = ("#d1495b", "#1f77b4", "#2e8b57", "#8e5ea2", "#e08e2b", "#4d4d4d", "#17a2a2", "#b5651d")
_STYLES = {"fused": "-", "none": "-", "eager": "--"}
_MARKERS = {"fp32": "o", "bf16": "s"}


def to_markdown(content: dict[str, Any]) -> str:
    """Machine, settings, table and what it says; the table's columns stand under each other in plain text too."""
    rows = content["rows"]
    references = list(dict.fromkeys(name for row in rows for name in row.get("speedup", {})))
    lines = ["# Benchmark", "", machine_text(content["machine"]), ""]
    settings = f"{_work_text(content['config'])}, batch {content['config']['batch_size']}; times are medians."
    memory = "Memory is the peak of weights and activations, without Python and PyTorch themselves."
    lines += [f"{settings} {memory} GFLOPs are those of one image's forward pass."]
    if references:
        lines[-1] += f" Ratios are against {rows[0]['model']}: speed above 1 is faster than it, memory below 1 is less."
    lines.append("")
    if not content["complete"]:
        lines += ["**Unfinished.** The same command goes on.", ""]
    lines += _table(_columns(references), rows)
    said = [f"{_subject(row)}: {row['status']}." for row in rows if ":" in row["status"]]
    said += sentences(content["summaries"], rows[0]) if rows else []
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in said)]).rstrip() + "\n"


def machine_text(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    versions = f"torch {machine['torch']}, timm {machine['timm']}, vit-linearizer {machine['vit_linearizer']}"
    return f"{where}, {machine['memory_gib']} GiB; {versions}; mixer: {machine['mixer']}"


def _columns(references: Sequence[str]) -> dict[str, Callable[[Row], str]]:
    """Heading and cell of each column; a cell that a row has no number for is empty."""

    def ratio(key: str, reference: str) -> Callable[[Row], str]:
        return lambda row: f"{row[key][reference]:.2f}" if reference in row.get(key, {}) else ""

    def speed(row: Row) -> str:
        return _plain(row["images_per_second"]) if row["status"] == "ok" else row["status"].partition(":")[0]

    def spread(row: Row) -> str:
        if row["status"] != "ok":
            return ""
        low, high = row["spread"]
        once = " (once, the first pass)" if row.get("from_warm_up") else " (once)"
        single = once if row["repeats"] == 1 else f" ({_plain(low)} .. {_plain(high)})"
        return _plain(row["seconds_median"]) + single

    return {
        "image": lambda row: size_text(row["image_size"]),
        "patch": lambda row: patch_text(row["patch_size"]),
        "tokens": lambda row: str(row["tokens"]),
        "model": lambda row: variant_name(row["model"], row["attention"]),
        "precision": lambda row: row["precision"],
        "images/s": speed,
        "seconds (min .. max)": spread,
        **{f"speed vs {_short(reference)}": ratio("speedup", reference) for reference in references},
        "memory MiB": lambda row: _plain(row["memory_peak_mib"]) if "memory_peak_mib" in row else "",
        **{f"memory vs {_short(reference)}": ratio("memory_ratio", reference) for reference in references},
        "GFLOPs": lambda row: _plain(row["flops_per_image"] / 1e9),
    }


def _subject(row: Row) -> str:
    return f"{variant_name(row['model'], row['attention'])}, {row['precision']}, at {size_text(row['image_size'])}"


def _short(reference: str) -> str:
    """The attention of a variant of the first model, which the text above the table names."""
    return reference.partition(" ")[2] or "it"


def _plain(value: float) -> str:
    """Three digits, never an exponent: 0.00123, 1.23, 123, 1234."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-4 else f"{value:.7f}"


def _table(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> list[str]:
    text = ("model", "precision")
    cells = [list(columns), *([cell(row).replace("|", "/") for cell in columns.values()] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    aligned = [
        "| "
        + " | ".join(c.ljust(w) if h in text else c.rjust(w) for c, w, h in zip(line, widths, columns, strict=True))
        + " |"
        for line in cells
    ]
    rule = [("-" * (w + 1) + " ") if h in text else ("-" * (w + 1) + ":") for w, h in zip(widths, columns, strict=True)]
    return [aligned[0], "|" + "|".join(rule) + "|", *aligned[1:]]


def draw(content: dict[str, Any], file: Path) -> None:
    """Seconds an image and peak memory over tokens, both axes logarithmic, one line a variant and precision."""
    from matplotlib.figure import Figure  # drawn without pyplot, so that no window system is asked for

    measured = [row for row in content["rows"] if row["status"] == "ok"]
    figure = Figure(figsize=(12, 6.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in measured))
    lines = dict.fromkeys((row["model"], row["attention"], row["precision"]) for row in measured)
    several = len({row["precision"] for row in measured}) > 1
    for axes, key, label in zip(panels, ("seconds_per_image", "memory_peak_mib"), ("seconds an image", "peak memory, MiB"),
                                strict=True):  # fmt: skip
        for model, attention, precision in lines:
            own = [
                row
                for row in measured
                if (row["model"], row["attention"], row["precision"]) == (model, attention, precision)
            ]
            points = sorted((row["tokens"], row[key]) for row in own if row[key] > 0)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=_COLOURS[models.index(model) % len(_COLOURS)],
                linestyle=_STYLES[attention],
                marker=_MARKERS[precision],
                markerfacecolor="white" if attention == "eager" else None,
                label=variant_name(model, attention) + (f", {precision}" if several else ""),
            )
        _label(axes, sorted({row["tokens"] for row in measured}), label)
    figure.suptitle(_title(content), fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=10, frameon=False)
    fresh = file.with_name(file.name + ".new")
    figure.savefig(fresh, format="png")
    fresh.replace(file)


def _label(axes: Any, tokens: Sequence[int], label: str) -> None:
    """Ticks at the sizes measured, where they leave each other room, and plain numbers instead of powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = [tokens[-1]]
    for value in reversed(tokens):
        if shown[-1] / value >= (tokens[-1] / tokens[0]) ** 0.08:
            shown.append(value)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.7g}"))
    axes.set_xlabel("tokens (patches of one image)")
    axes.set_ylabel(label)
    axes.grid(True, alpha=0.3)


def _work_text(config: dict[str, Any]) -> str:
    return ("forward + backward" if config["train"] else "forward") + (", compiled" if config["compile"] else "")


def _title(content: dict[str, Any]) -> str:
    config, machine = content["config"], content["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    precisions = ", ".join(dict.fromkeys(row["precision"] for row in content["rows"]))
    return f"{where}\n{_work_text(config)}, batch {config['batch_size']}, {precisions}, torch {machine['torch']}"
