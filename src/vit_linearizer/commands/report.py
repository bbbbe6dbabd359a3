"""``report``: run folders in, one self-contained HTML page out."""

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..contracts import UserError
from ..reporting.page import write_report
from ..training.progress import show_messages

logger = logging.getLogger("vit_linearizer")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page on runs: did it work, how close is the student, from which image size is it faster.

    The page needs no network and can be passed on as it is. Runs in progress are shown as far as they are.

    Attributes:
        runs: run folders, or folders that hold runs (as quickstart makes) or a benchmark.
        out: the HTML file; by default report.html in the first folder.
        maps: draw activation maps of teacher and students on held-out images, where both lie on this disk.
        debug: show the traceback of an error.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    out: str | None = None
    maps: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.runs, str):
            raise UserError("runs", self.runs, "give a list of folders")
        if not self.runs:
            raise UserError("runs", None, "name at least one run folder")


def report(config: ReportConfig) -> Path:
    """Write the page; see `ReportConfig`.

    Returns:
        The file.

    Raises:
        UserError: a folder holds nothing of this package, or the file cannot be written.
    """
    show_messages()
    file = write_report(config.runs, config.out or Path(config.runs[0]) / "report.html", maps=config.maps)
    logger.info("report: %s", file)
    return file
