"""What the rows say together: ratios to the first model, how time grows with tokens, from which size a model is ahead."""

import math
from collections.abc import Sequence
from typing import Any

from .cases import patch_text, size_text, variant_name

Row = dict[str, Any]

#: Below so many tokens, time is that of launching operators rather than of computing.
_MANY_TOKENS = 1000
#: What is less than this many times as fast is not called faster at every size: measurements differ by as much.
_CLEARLY = 1.03


def add_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``speedup`` and ``memory_ratio`` against each variant of the first model, by its name.

    A speedup is images a second over those of the reference, at the same image size, patch and precision; a memory ratio
    is the peak over that of the reference. The first model's first variant is no subject, only a reference.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    found = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("speedup", "memory_ratio")}
        if row["status"] == "ok":
            others = [o for o in measured if o["model"] == rows[0]["model"] and _place(o) == _place(row)]
            if row["model"] == rows[0]["model"]:
                others = [o for o in others if o["attention"] == rows[0]["attention"] != row["attention"]]
            names = [variant_name(o["model"], o["attention"]) for o in others]
            speed, memory = "images_per_second", "memory_peak_mib"
            kept["speedup"] = {name: row[speed] / o[speed] for name, o in zip(names, others, strict=True)}
            kept["memory_ratio"] = {
                name: row[memory] / o[memory] for name, o in zip(names, others, strict=True) if o[memory]
            }
        found.append(kept)
    return found


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each model, attention, precision and patch: ``exponent`` and ``crossover``, see `fit_exponent`, `find_crossover`.

    ``crossover`` is against the first model's first variant of the same precision and patch, and None for the first model.
    """
    summaries: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        members = summaries.setdefault(_line(row), [])
        if row["status"] == "ok":
            members.append(row)
    found = []
    for (model, attention, precision, patch), members in summaries.items():
        reference = summaries.get((rows[0]["model"], rows[0]["attention"], precision, patch), [])
        found.append(
            {
                "model": model,
                "attention": attention,
                "precision": precision,
                "patch_size": list(patch),
                "exponent": fit_exponent([(row["tokens"], row["seconds_per_image"]) for row in members]),
                "crossover": None if model == rows[0]["model"] else find_crossover(members, reference),
            }
        )
    return found


def fit_exponent(points: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """The power of the tokens that time grows with: the least-squares slope of log seconds over log tokens.

    Args:
        points: (tokens, seconds an image). Those of at least 1000 tokens count where there are two such sizes, else all.

    Returns:
        ``value``, and ``tokens``: the smallest and largest that count; None with fewer than two sizes.
    """
    many = [point for point in points if point[0] >= _MANY_TOKENS]
    counted = many if len({tokens for tokens, _ in many}) >= 2 else list(points)
    sizes = sorted({tokens for tokens, _ in counted})
    if len(sizes) < 2:
        return None
    x, y = [math.log(tokens) for tokens, _ in counted], [math.log(seconds) for _, seconds in counted]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return {"value": covariance / sum((a - mean_x) ** 2 for a in x), "tokens": [sizes[0], sizes[-1]]}


def find_crossover(rows: Sequence[Row], reference: Sequence[Row]) -> Row | None:
    """From which size on a model is faster than the reference, at this and every larger size where both were measured.

    Returns:
        ``result``: ``already at the smallest size measured``, ``not reached``, or ``reached``; then also ``image_size``,
        the first of the sizes where it is ahead to the end, and ``tokens``, where the times meet between that size and
        the one below, on straight lines in log time over log tokens. ``smallest`` and ``largest`` say how it stands at
        either end: image size, and how many times as fast. None where no size was measured with both.
    """
    sizes = {tuple(row["image_size"]): row["seconds_per_image"] for row in reference}
    common = sorted((row for row in rows if tuple(row["image_size"]) in sizes), key=lambda row: row["tokens"])
    if not common:
        return None
    # The log of how many times as slow: negative where the model is ahead.
    slower = [math.log(row["seconds_per_image"] / sizes[tuple(row["image_size"])]) for row in common]
    ends = {
        name: {"image_size": common[at]["image_size"], "speedup": math.exp(-slower[at])}
        for name, at in (("smallest", 0), ("largest", -1))
    }
    if slower[-1] >= 0:
        return {"result": "not reached", **ends}
    first = max((number + 1 for number, value in enumerate(slower) if value >= 0), default=0)
    if first == 0:
        return {"result": "already at the smallest size measured", **ends}
    low, high = math.log(common[first - 1]["tokens"]), math.log(common[first]["tokens"])
    share = slower[first - 1] / (slower[first - 1] - slower[first])
    tokens = math.exp(low + share * (high - low))
    return {"result": "reached", "image_size": common[first]["image_size"], "tokens": round(tokens), **ends}


def sentences(summaries: Sequence[Row], first: Row) -> list[str]:
    """The summaries in words, whatever they say; ``first`` is the first row."""
    said = []
    versus = variant_name(first["model"], first["attention"])
    for summary in summaries:
        name = f"{variant_name(summary['model'], summary['attention'])} ({summary['precision']}, "
        name += f"patch {patch_text(summary['patch_size'])})"
        exponent, crossover = summary["exponent"], summary["crossover"]
        if exponent is not None:
            low, high = exponent["tokens"]
            said.append(f"{name}: time grows with tokens to the power {exponent['value']:.2f} from {low} to {high} tokens.")
        if crossover is not None:
            said.append(f"{name}: {_crossover_in_words(crossover, versus)}.")
        elif summary["model"] != first["model"]:
            said.append(f"{name}: never measured at the same size and patch as {versus}, so there is no comparison.")
    return said


def _crossover_in_words(crossover: Row, versus: str) -> str:
    def standing(end: str) -> str:
        return f"{crossover[end]['speedup']:.2f} times as fast at {size_text(crossover[end]['image_size'])}"

    ends = ", ".join(dict.fromkeys((standing("smallest"), standing("largest"))))
    if crossover["result"] == "not reached":
        return f"no faster than {versus} at the largest size: {ends}"
    if crossover["result"] == "reached":
        start = f"faster than {versus} from {size_text(crossover['image_size'])} on"
        return f"{start} (equal at about {crossover['tokens']} tokens), slower just below that: {ends}"
    if crossover["smallest"]["speedup"] < _CLEARLY:
        return f"no slower than {versus} at any size measured: {ends}"
    return f"faster than {versus} at every size measured: {ends}"


def _place(row: Row) -> tuple[Any, ...]:
    return (*row["image_size"], *row["patch_size"], row["precision"])


def _line(row: Row) -> tuple[Any, ...]:
    return (row["model"], row["attention"], row["precision"], tuple(row["patch_size"]))
