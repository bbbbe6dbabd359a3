"""What a training ends with: its report. A run is done by then, so nothing that goes wrong here may make it fail."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..reporting.page import write_report

logger = logging.getLogger("vit_linearizer")


def close_with_report(folders: Sequence[Path], file: Path) -> None:
    """Write a page on finished runs and say where it is, or say why there is none.

    Args:
        folders: of the runs, or holding them.
        file: of the page.
    """
    try:
        write_report([str(folder) for folder in folders], file)
    except Exception as error:  # whatever it is, the run stays
        logger.warning("no report (%s: %s); vit-linearizer report %s tries again", type(error).__name__, error, folders[0])
    else:
        logger.info("report: %s", file)
