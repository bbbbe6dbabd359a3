"""The parent: drives the children of one image size in turn, A B C A B C, so that a disturbance falls on all alike.

A child that runs out of memory, is killed or fails becomes a row that says so, and the rest goes on.
"""

import contextlib
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..training.progress import duration
from .cases import Case, size_text

logger = logging.getLogger("vit_linearizer")

Row = dict[str, Any]

OK = "ok"
OUT_OF_MEMORY = "out of memory"
TOO_LARGE = "skipped: a smaller size did not fit"
#: The kernel ends a process that takes the last memory by this signal.
_DID_NOT_FIT = (OUT_OF_MEMORY, TOO_LARGE, "killed by signal 9")

#: Part of the machine's free memory that a case on a CPU may take.
_MEMORY_SHARE = 0.9
#: A case whose repeat is expected to take more than this many times its time is not begun.
_PATIENCE = 10
#: Seconds until a child has imported and built its model, about.
_START_SECONDS = 8.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every case is measured.

    Attributes:
        device: cpu, cuda or mps.
        threads: of torch in a child.
        batch_size: images at a time.
        train: forward and backward instead of forward alone.
        compile: through ``torch.compile``.
        repeats: timed repeats of a case, at most.
        seconds_per_case: after which no further repeat is begun.
    """

    device: str
    threads: int
    batch_size: int
    train: bool
    compile: bool
    repeats: int
    seconds_per_case: float


def measure(groups: Sequence[Sequence[Case]], settings: Settings, done: Sequence[Row]) -> Iterator[list[Row]]:
    """Measure group after group; yields the rows of each as soon as it is through.

    Args:
        groups: as `cases.plan_cases` makes them, fewest tokens first.
        settings: how.
        done: rows of an earlier part of the same benchmark; their cases are not measured again.
    """
    rows, known = list(done), {_key(row) for row in done}
    todo = [[case for case in group if _key(case_facts(case)) not in known] for group in groups]
    for number, group in enumerate(todo):
        if not group:
            continue
        left = _time_left(todo[number:], settings, rows)
        sizes = f"{size_text(group[0].image_size)}, {max(case.tokens for case in group)} tokens"
        cases = f"{len(group)} case{'s' if len(group) > 1 else ''}"
        logger.info("size %d of %d: %s, %s%s", number + 1, len(groups), sizes, cases, left)
        fresh = _measure_group(group, settings, rows)
        rows += fresh
        yield fresh


def case_facts(case: Case) -> Row:
    """What a row says of its case, as it stands in JSON."""
    return {
        "model": case.model,
        "image_size": list(case.image_size),
        "patch_size": list(case.patch_size),
        "precision": case.precision,
        "attention": case.attention,
        "tokens": case.tokens,
        "flops_per_image": case.flops,
        "parameters": case.parameters,
    }


def predict_seconds(case: Case, rows: Sequence[Row]) -> float | None:
    """Seconds of one repeat, from the two largest sizes below; quadratic growth is assumed where there is but one."""
    below = {row["tokens"]: row["seconds_median"] for row in _smaller(case, rows) if row["status"] == OK}
    if not below:
        return None
    *others, largest = sorted(below)
    power = 2.0
    if others:
        slope = math.log(below[largest] / below[others[-1]]) / math.log(largest / others[-1])
        power = min(2.0, max(1.0, slope))
    return below[largest] * (case.tokens / largest) ** power


def reason_to_skip(case: Case, settings: Settings, rows: Sequence[Row]) -> str | None:
    """Why a case is not tried at all, or None."""
    if any(row["status"] in _DID_NOT_FIT for row in _smaller(case, rows)):
        return TOO_LARGE
    seconds = predict_seconds(case, rows)
    if seconds is None or seconds <= _PATIENCE * settings.seconds_per_case:
        return None
    enough = math.ceil(seconds / _PATIENCE)
    return f"skipped: a repeat would take about {duration(seconds)}; give --seconds-per-case {enough} to wait for it"


def _measure_group(group: Sequence[Case], settings: Settings, rows: Sequence[Row]) -> list[Row]:
    children: dict[Case, Child] = {}
    skipped = {case: reason_to_skip(case, settings, rows) for case in group}
    with contextlib.ExitStack() as stack:
        for case in group:
            if skipped[case] is None:
                children[case] = stack.enter_context(Child(case, settings))
        for child in children.values():
            child.wait_until_started()  # all of them, before the first one is timed
        for case, child in children.items():
            logger.info("  %s", case.title)
            child.warm_up()
        for _ in range(settings.repeats):
            for child in children.values():
                child.repeat()
        for child in children.values():
            child.finish()
    found = []
    for case in group:
        result = children[case].result() if case in children else {"status": skipped[case]}
        found.append({**case_facts(case), **result})
        logger.info("  %s: %s", case.title, _in_short(found[-1]))
    return found


class Child:
    """One case in its process, from its start to its end; a context manager that leaves no process behind."""

    def __init__(self, case: Case, settings: Settings):
        self.settings = settings
        self.order = {
            **case_facts(case),
            "patch_argument": case.patch_argument,
            "device": settings.device,
            "threads": settings.threads,
            "batch_size": settings.batch_size,
            "train": settings.train,
            "compile": settings.compile,
            "memory_share": _MEMORY_SHARE,
        }
        self.status = OK
        self.seconds: list[float] = []
        self.warm_up_seconds = 0.0
        self.memory: dict[str, float] = {}

    def __enter__(self) -> "Child":
        self.said = tempfile.TemporaryFile()  # closed in __exit__
        command = [sys.executable, "-m", "vit_linearizer.benchmarking.worker"]
        self.process = subprocess.Popen(  # noqa: S603  # our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, bufsize=1
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.said):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]  # both were asked for

    def wait_until_started(self) -> None:
        """Python and its libraries are there."""
        self._answer()

    def warm_up(self) -> None:
        """Build the model and let it run once. A warm-up beyond the case's time counts as its one repeat."""
        answer = self._ask(json.dumps(self.order)) if self.status == OK else None
        if answer is not None:
            self.warm_up_seconds = answer["seconds"]
            self.memory |= {name: answer[name] for name in ("memory_model_mib", "cuda_graph") if name in answer}
            if self._time_is_up():
                self.seconds.append(self.warm_up_seconds)

    def repeat(self) -> None:
        """One timed repeat, while there is time."""
        if self.status != OK or self._time_is_up():
            return
        answer = self._ask("go")
        if answer is not None:
            self.seconds.append(answer["seconds"])

    def finish(self) -> None:
        """Ask for the peak of the memory."""
        answer = self._ask("end") if self.status == OK else None
        if answer is not None:
            self.memory["memory_peak_mib"] = answer["memory_peak_mib"]

    def result(self) -> Row:
        """The measured part of the row."""
        if self.status != OK:
            return {"status": self.status}
        median = statistics.median(self.seconds)
        return {
            "status": OK,
            "images_per_second": self.settings.batch_size / median,
            "seconds_median": median,
            "seconds_per_image": median / self.settings.batch_size,
            "spread": [min(self.seconds), max(self.seconds)],
            "repeats": len(self.seconds),
            "from_warm_up": self.warm_up_seconds > self.settings.seconds_per_case,
            "seconds": self.seconds,
            **self.memory,
        }

    def _time_is_up(self) -> bool:
        return self.warm_up_seconds + sum(self.seconds) > self.settings.seconds_per_case

    def _ask(self, line: str) -> dict[str, Any] | None:
        """Send one line and wait for the answer; None, and another status, where the case has come to its end."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        answer = json.loads(text) if text.endswith("\n") else {"event": "gone"}
        if answer["event"] == "gone":
            code = self.process.wait()
            self.status = f"killed by signal {-code}" if code < 0 else f"failed: {self._last_words()}"
        elif answer["event"] == "failed":
            self.status = f"failed: {answer['reason']}"
        elif answer["event"] == OUT_OF_MEMORY:
            self.status = OUT_OF_MEMORY
        return answer if self.status == OK else None

    def _last_words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it ended without a word"


def _key(row: Row) -> tuple[Any, ...]:
    return (row["model"], *row["image_size"], *row["patch_size"], row["precision"], row["attention"])


def _smaller(case: Case, rows: Sequence[Row]) -> list[Row]:
    """Rows of the same model, precision and attention with fewer tokens."""
    same = (case.model, case.precision, case.attention)
    return [r for r in rows if (r["model"], r["precision"], r["attention"]) == same and r["tokens"] < case.tokens]


def _in_short(row: Row) -> str:
    if row["status"] != OK:
        return row["status"]
    low, high = row["spread"]
    span = f"{row['seconds_median']:.3g} s ({low:.3g} .. {high:.3g})"
    return f"{row['images_per_second']:.3g} images/s, {span}, {row['memory_peak_mib']:.0f} MiB"


def _time_left(groups: Sequence[Sequence[Case]], settings: Settings, rows: Sequence[Row]) -> str:
    """An upper estimate of the time that the cases ahead take, in words; without one where nothing is measured yet."""
    if not rows:
        return ""
    seconds = 0.0
    for case in (case for group in groups for case in group):
        if reason_to_skip(case, settings, rows) is None:
            expected = predict_seconds(case, rows) or 0.0
            seconds += _START_SECONDS + max(2 * expected, min((settings.repeats + 1) * expected, settings.seconds_per_case))
    return f"; at most about {duration(seconds)} left"
