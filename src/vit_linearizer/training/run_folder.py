"""A run's folder on disk: who may write there, its metrics, its log.

    config.json  metrics.jsonl  run.log  skipped.txt  checkpoints/  model/  evaluation.json  tensorboard/

A folder holds one configuration and is written by one run at a time. The metrics are cut back to the checkpoint on resume,
so no step stands twice.
"""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ..contracts import UserError
from ..models.loading import recover_model_folder

logger = logging.getLogger("vit_linearizer")

#: Fields that may differ between the parts of one run: they change where and how it runs, not what comes out.
NOT_COMPARED = ("out", "resume", "num_workers", "device", "debug", "dry_run")


class RunFolder:
    """The folder of one run. Made in two steps: looking at it first, opening it once all else has been checked.

    Args:
        path: where; need not exist.
        config: resolved configuration.

    Raises:
        UserError: the folder holds a run of another configuration.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]):
        self.path = Path(path)
        self.writes = False
        self.config = json.loads(json.dumps(config))
        self._refuse_other_configuration()

    @contextlib.contextmanager
    def opened(self, *, resume: str, writes: bool = True) -> Iterator[None]:
        """Create the folder and its ``config.json``, and send the package's log to ``run.log`` too; other runs are kept out.

        Args:
            resume: ``auto`` keeps what is there, ``never`` removes this configuration's earlier results.
            writes: False in every process but the first.

        Raises:
            UserError: another run is writing there, or has written another configuration meanwhile.
        """
        self.writes = writes
        if not writes:
            yield
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with self._others_kept_out():
            self._refuse_other_configuration()
            recover_model_folder(self.model)
            if resume == "never":
                self._start_over()
            write_atomically(self.path / "config.json", json.dumps(self.config, indent=2) + "\n")
            with self._logging_to_file():
                yield
                if self.skipped.exists():
                    count = len(self.skipped.read_text(encoding="utf-8").splitlines())
                    logger.info("%d files were passed over: %s", count, self.skipped)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.txt"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def _refuse_other_configuration(self) -> None:
        file = self.path / "config.json"
        if self.config.get("data") == str(self.path.resolve()):
            raise UserError("--out", self.path, "is the folder of the images (--data); give another")
        if self.path.exists() and not self.path.is_dir():
            raise UserError("--out", self.path, "is a file; give a folder")
        if not file.exists():
            return
        try:
            other = json.loads(file.read_text())
        except ValueError as error:
            raise UserError("--out", self.path, "its config.json cannot be read; use another folder") from error
        here, there = _flat(self.config), _flat(other)
        different = sorted(
            key for key in here.keys() | there.keys() if key not in NOT_COMPARED and here.get(key) != there.get(key)
        )
        if different:
            shown = ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in different[:8])
            raise UserError("--out", self.path, f"holds a run of another configuration: {shown}; use another folder")

    @contextlib.contextmanager
    def _others_kept_out(self) -> Iterator[None]:
        """A lock that the system takes back when this process ends, however it ends."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if not isinstance(lock, SoftFileLock):
                remedy = "another run is writing there now; wait until it ends, or use another folder"
                raise UserError("--out", self.path, remedy) from error
        except (NotImplementedError, OSError) as error:
            logger.warning("%s cannot be locked (%s): start no second run there", self.path, error)
        # On file systems without locks filelock leaves a file instead, which a kill would leave for ever.
        if isinstance(lock, SoftFileLock):
            lock.release()
            logger.warning("%s lies on a file system without locks: start no second run there", self.path)
        try:
            yield
        finally:
            lock.release()

    def _start_over(self) -> None:
        for folder in (self.checkpoints, self.model, self.path / "tensorboard"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics_file, self.skipped, self.path / "run.log", self.path / "evaluation.json"):
            file.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True)

    def cut_metrics(self, step: int, stages: Sequence[str]) -> None:
        """Drop every line beyond a step, of stages that have not begun, and one that a kill left half-written.

        Args:
            step: the last that is kept.
            stages: names of those that have begun.
        """
        if not self.writes or not self.metrics_file.exists():
            return
        kept = []
        for text in self.metrics_file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if line["step"] <= step and line.get("stage", stages[0]) in stages:  # old runs had one stage, unnamed
                    kept.append(text + "\n")
        write_atomically(self.metrics_file, "".join(kept))

    def write_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """``evaluation.json``: results that belong to the weights in ``model/``."""
        if self.writes:
            write_atomically(self.path / "evaluation.json", json.dumps(metrics, indent=2) + "\n")

    def read_evaluation(self) -> dict[str, Any]:
        """What `write_evaluation` wrote last."""
        return json.loads((self.path / "evaluation.json").read_text())

    @contextlib.contextmanager
    def _logging_to_file(self) -> Iterator[None]:
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()


class MetricsWriter:
    """Appends to ``metrics.jsonl``, and to tensorboard where it is installed.

    Args:
        run: its folder.
        stage: name of the stage that all lines belong to.
        first_step: of the run where it begins or goes on.
    """

    def __init__(self, run: RunFolder, stage: str, first_step: int):
        self.stage = stage
        self.file = run.metrics_file.open("a", encoding="utf-8") if run.writes else None
        self.board: Any = None
        if run.writes and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step + 1 if first_step else 0)

    def write(self, step: int, split: str, values: Mapping[str, float | int]) -> None:
        """One line: ``{"step": ..., "stage": ..., "split": ..., ...}``, on disk before this returns."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, "stage": self.stage, "split": split, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{split}/{name}".replace(" ", "-"), value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a stage by the stage's name and their own."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key} {name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader or a kill meets the old text or the new one."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)
