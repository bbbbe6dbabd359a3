"""The line that a user watches: how far, loss, images per second, time left, share of time spent waiting for data.

In a terminal it is a live bar; elsewhere (a log file, a batch system) one plain line every half minute.
"""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("vit_linearizer")

#: Where everything for the user's eyes goes, so that bars and messages do not tear each other.
console = Console()


_PLAIN_SECONDS = 30.0
#: Data wait above this share deserves a hint.
_WAIT_WORTH_A_HINT = 0.1


def show_messages() -> None:
    """Let the package's messages be seen: on the console, unless the caller has set up logging of their own."""
    if not logger.handlers and not logging.getLogger().handlers:
        rich = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        logger.addHandler(rich if console.is_terminal else _PlainHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


class _PlainHandler(logging.Handler):
    """One line a message, for files and pipes: a terminal's width means nothing there."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


class ProgressLine:
    """Context manager around a long loop.

    Args:
        title: what is being done.
        first: steps done before.
        total: steps of the whole run.
        shown: False in every process but the first.
        unit: what is counted.
        hint: what to try when the loop waits for data; nothing where it is empty.
    """

    def __init__(
        self,
        title: str,
        *,
        first: int,
        total: int,
        shown: bool = True,
        unit: str = "step",
        hint: str = "more --num-workers",
    ):
        self.title, self.first, self.total, self.shown, self.unit, self.hint = title, first, total, shown, unit, hint
        self.live: Progress | None = None
        if shown and console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.bar = self.live.add_task(title, total=total, completed=first, detail="")

    def __enter__(self) -> "ProgressLine":
        self.started = self.spoke = time.perf_counter()
        if self.live is not None:
            self.live.start()
        return self

    def rate(self, done: int) -> float:
        """Steps a second since the loop began, after ``done`` of all."""
        return (done - self.first) / max(1e-9, time.perf_counter() - self.started)

    def update(self, done: int, *, images_per_second: float, data_wait: float, loss: float | None = None) -> None:
        """Show the state after ``done`` steps; ``data_wait`` is a share of the time."""
        if not self.shown:
            return
        detail = f"{images_per_second:.{0 if images_per_second >= 10 else 1}f} img/s  data wait {data_wait:.0%}"
        if loss is not None:
            detail = f"loss {loss:.4g}  {detail}"
        if self.hint and data_wait > _WAIT_WORTH_A_HINT:
            detail += f" (try {self.hint})"
        if self.live is not None:
            self.live.update(self.bar, completed=done, detail=detail)
            return
        now = time.perf_counter()
        if now - self.spoke >= _PLAIN_SECONDS or done == self.total:
            self.spoke = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            logger.info("%s: %s %d of %d  %s  %s left", self.title, self.unit, done, self.total, detail, duration(left))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()


def duration(seconds: float) -> str:
    """``1:02:03`` or ``02:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
