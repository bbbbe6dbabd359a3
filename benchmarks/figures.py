"""What the scripts of this folder share: cases timed in turn, and their figures in a file for write_docs.py."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vit_linearizer.benchmarking.record import describe_machine


def time_in_turn(cases: Mapping[str, Callable[[], object]], repeats: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each repeat of each case, A B C A B C; the first ``warm`` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + warm):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            if repeat >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(
    title: str,
    command: str,
    rows: Sequence[Mapping[str, Any]],
    out: str | None,
    *,
    device: str = "cpu",
) -> None:
    """Print the rows and, where a file is given, write them for write_docs.py."""
    print(title)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if out:
        content = {"title": title, "command": command, "machine": describe_machine(torch.device(device)), "rows": list(rows)}
        Path(out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
