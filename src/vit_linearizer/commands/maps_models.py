"""Which models ``maps`` shows: those asked for, a run's own teacher, each at the size where all have the same patches."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from ..contracts import UserError
from ..models.adapters import check_plain, nominal_size, patch_grid, patch_size, stage_ends
from ..models.loading import is_file_name, model_folder, open_model, probe_backbone
from .arguments import architectures_of, parse_size

if TYPE_CHECKING:
    from .maps import MapsConfig

logger = logging.getLogger("vit_linearizer")


@dataclass(frozen=True, kw_only=True)
class ShownModel:
    """A model that is going to be shown.

    Attributes:
        name: on the sheet.
        source: what `open_model` takes.
        architecture: timm name behind a weight file.
        pretrained: False for random weights.
        probe: itself without weights.
        image_size: (height, width) to make it for, or None where it takes its own alone.
    """

    name: str
    source: str
    architecture: str | None
    pretrained: bool
    probe: nn.Module
    image_size: tuple[int, int] | None

    def open(self) -> nn.Module:
        """Itself with its weights, in evaluation mode."""
        torch.manual_seed(0)  # of random weights
        size: dict[str, Any] = {} if self.image_size is None else {"img_size": self.image_size}
        return open_model(
            self.source, field="--models", architecture=self.architecture, pretrained=self.pretrained, **size
        ).eval()


def plan_models(config: "MapsConfig") -> tuple[tuple[int, int], tuple[int, int], list[ShownModel]]:
    """Image size (height, width), grid of patches (down, across), and the models, from their shapes alone.

    Raises:
        UserError: unknown or unfit models, a size that is no multiple of the first model's patch, too many stages.
    """
    architectures = architectures_of(config.models, config.models_arch)
    sources: dict[str, str | None] = {name: architectures.get(name) for name in config.models}
    first = _probe(config.models[0], sources[config.models[0]])
    size = parse_size("--image-size", config.image_size) or nominal_size(first)
    grid = patch_grid(first, size)
    teacher = _teacher_of(config.models[0]) if len(config.models) == 1 else None
    if teacher is not None:
        sources = {teacher[0]: teacher[1], **sources}
    names = _names(list(sources))
    models = []
    for source, architecture in sources.items():
        probe = _probe(source, architecture)
        stage_ends(len(probe.feature_info), config.stages)  # type: ignore[arg-type]  # timm's list
        height, width = patch_size(probe)
        wanted: tuple[int, int] | None = (grid[0] * height, grid[1] * width)
        try:
            _probe(source, architecture, img_size=wanted)
        except UserError:
            wanted = None
        sees = wanted or nominal_size(probe)
        remark = "" if wanted else "; it takes no other size, and is not compared"
        if not config.models_pretrained and not is_file_name(source):
            logger.warning("%s has random weights: its maps show how it is built, not what it has learnt", names[source])
        logger.info("%s sees %dx%d, %d x %d patches%s", names[source], *sees, *patch_grid(probe, sees), remark)
        models.append(
            ShownModel(
                name=names[source],
                source=source,
                architecture=architecture,
                pretrained=config.models_pretrained,
                probe=probe,
                image_size=wanted,
            )
        )
    return size, grid, models


def _probe(source: str, architecture: str | None, **model_args: Any) -> nn.Module:
    probe = probe_backbone(source, field="--models", architecture=architecture, **model_args)
    check_plain(probe, source, field="--models")
    return probe


def _teacher_of(run: str) -> tuple[str, str | None] | None:
    """The teacher that a run of distill was made from, and its architecture, where it lies on this disk."""
    try:
        noted = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(noted, dict) or noted.get("command") != "distill" or not isinstance(noted.get("teacher"), str):
        return None
    name = noted["teacher"]
    # A relative name was written from wherever the run was started: most likely here, or above the run.
    for base in (Path(), *Path(run).resolve().parents):
        found = base / name.removeprefix("local-dir:")
        if found.is_file() or model_folder(found) is not None:
            logger.info("%s was distilled from %s, which stands beside it", run, found)
            return str(found), noted.get("teacher_arch")
    logger.info("%s was distilled from %s, which is not on this disk; name it among --models to show it", run, name)
    return None


def _names(sources: Sequence[str]) -> dict[str, str]:
    """What models are called: the last part of a path where that tells them apart, else as they were given."""
    short = {}
    for source in sources:
        path = Path(source.removeprefix("local-dir:"))
        parts = [part for part in path.resolve().parts if part != "model"] if path.exists() else []
        short[source] = parts[-1] if parts else source
    return short if len(set(short.values())) == len(short) else {source: source for source in sources}
