"""Pictures as batches: the training set by draws, the held-out part by numbers, and the loaders over them.

Unreadable files met on the way are replaced by the next readable one (the same one in every process) and listed.
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..contracts import UserError
from ..objectives import sample_mask
from .device_augmentation import apply_colours
from .images import UnreadableImageError
from .sampler import Draw, StepSampler
from .sources import ImageSource
from .views import MaskConfig, TrainingView, centre_transform

#: The held-out part: a twentieth of the pictures, no more than this.
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.05, 512


def split_held_out(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pictures to train on and of those held out; a single picture has to serve as both."""
    if images == 1:
        return np.zeros(1, dtype=int), np.zeros(1, dtype=int)
    order = np.random.default_rng([seed, images]).permutation(images)
    count = min(_HELD_OUT_MOST, max(1, round(_HELD_OUT_SHARE * images)))
    return np.sort(order[count:]), np.sort(order[:count])


class SkippedList:
    """``skipped.txt``: one line per file passed over, name and reason, appended by whoever meets it."""

    def __init__(self, path: Path | None):
        self.path = path
        self._known: set[str] = set()

    def add(self, name: str, reason: str) -> None:
        """Append a line, unless this process already did."""
        if self.path is not None and name not in self._known:
            line = " ".join(name.splitlines()) + f"\t{reason}\n"
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # names may be any bytes
                file.write(line)
        self._known.add(name)

    def tidy(self) -> list[str]:
        """Sort the file, drop what several workers wrote twice, and return its lines."""
        if self.path is None or not self.path.exists():
            return []
        lines = sorted(set(self.path.read_text(encoding="utf-8").splitlines()))
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        fresh.replace(self.path)
        return lines


class Readable(Protocol):
    """Whatever has pictures by number, alone or with masks."""

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Any: ...


def read_or_next(source: Readable, numbers: np.ndarray, place: int, skipped: SkippedList) -> tuple[Any, int]:
    """What stands in a place, or the next that can be read, the same one in every process; and its number.

    Args:
        source: of the pictures.
        numbers: of the pictures that take part.
        place: in ``numbers``.
        skipped: where unreadable ones are listed.

    Raises:
        UserError: none can be read.
    """
    for offset in range(len(numbers)):
        index = int(numbers[(place + offset) % len(numbers)])
        try:
            return source.read(index), index
        except UnreadableImageError as problem:
            skipped.add(source.name(index), str(problem))
    raise UserError("--data", source.name(int(numbers[place])), "none of the images can be read; see skipped.txt")


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Views by `Draw`, whose index counts within ``numbers``."""

    def __init__(self, source: ImageSource, numbers: np.ndarray, view: TrainingView, skipped: SkippedList):
        self.source, self.numbers, self.view, self.skipped = source, numbers, view, skipped

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:  # type: ignore[override]  # the sampler gives draws
        image, index = read_or_next(self.source, self.numbers, draw.place, self.skipped)
        item = self.view(image, draw)
        if self.source.labels is not None:
            item["labels"] = torch.tensor(self.source.labels[index])
        return item


class CentreSet(Dataset[dict[str, Tensor] | None]):
    """Centre views by number, with a fixed mask each when asked: what evaluations read. None for what cannot be read."""

    def __init__(
        self,
        source: ImageSource,
        numbers: Sequence[int] | np.ndarray,
        image_size: tuple[int, int],
        *,
        mask: MaskConfig | None = None,
        skipped: SkippedList | None = None,
    ):
        self.source, self.numbers, self.mask = source, np.asarray(numbers), mask
        self.transform = centre_transform(image_size)
        self.skipped = skipped or SkippedList(None)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Tensor] | None:
        index = int(self.numbers[place])
        try:
            image = self.source.read(index)
        except UnreadableImageError as problem:
            self.skipped.add(self.source.name(index), str(problem))
            return None
        item = {"images": self.transform(image), "numbers": torch.tensor(index)}
        if self.mask is not None:
            rng = np.random.default_rng([index, 2])
            item["mask"] = torch.from_numpy(sample_mask(self.mask.grid, self.mask.ratio, self.mask.masking, rng))
        if self.source.labels is not None:
            item["labels"] = torch.tensor(self.source.labels[index])
        return item


class ListedSet(Dataset[dict[str, Any]]):
    """Centre views by number, each picture or the reason why it cannot be read: for results that stand by name."""

    def __init__(self, source: ImageSource, numbers: Sequence[int] | np.ndarray, image_size: tuple[int, int]):
        self.source, self.numbers = source, np.asarray(numbers)
        self.transform = centre_transform(image_size)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = int(self.numbers[place])
        try:
            return {"number": number, "image": self.transform(self.source.read(number))}
        except UnreadableImageError as problem:
            return {"number": number, "problem": str(problem)}


def listed_loader(dataset: ListedSet, *, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches ``images`` (uint8, None where none could be read), their ``numbers``, and ``problems`` as (number, reason)."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate_listed,
        worker_init_fn=leave_signals_to_parent,
    )


def _collate_listed(items: list[dict[str, Any]]) -> dict[str, Any]:
    read = [item for item in items if "image" in item]
    return {
        "images": torch.stack([item["image"] for item in read]) if read else None,
        "numbers": [item["number"] for item in read],
        "problems": [(item["number"], item["problem"]) for item in items if "problem" in item],
    }


def training_loader(
    dataset: Dataset[dict[str, Tensor]], sampler: StepSampler, *, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches of this process in step order; images are uint8 ``[B, 3, H, W]``."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=leave_signals_to_parent,
    )


def leave_signals_to_parent(_worker: int) -> None:
    """For a loader's processes: Ctrl-C reaches all of a terminal; only the training one decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def centre_loader(dataset: CentreSet, *, batch_size: int, num_workers: int = 0) -> "ReadableLoader":
    """All readable pictures once, in order; others are left out, so that no score counts a picture twice."""
    return ReadableLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate_readable,
        worker_init_fn=leave_signals_to_parent,
    )


class ReadableLoader(DataLoader):
    """A loader that leaves out what is None.

    Attributes:
        read: pictures that the last pass gave.
    """

    read = 0

    def __iter__(self) -> Any:
        self.read = 0
        for batch in super().__iter__():
            if batch is not None:
                self.read += len(batch["images"])
                yield batch


def nothing_readable() -> UserError:
    """What to raise when a loader, over all processes, had no picture."""
    return UserError("--data", "held-out images", "none of them can be read")


def _collate_readable(items: list[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    read = [item for item in items if item is not None]
    return default_collate(read) if read else None


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch, turning uint8 images into float images in [0, 1], with the colours that views have drawn for them."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "colours"}
    moved["images"] = moved["images"].float() / 255
    if "colours" in batch:
        moved["images"] = apply_colours(moved["images"], batch["colours"])
    return moved
