"""Flags that several training commands share, each documented once."""

from dataclasses import dataclass

from ..data.views import Augmentation
from ..training.config import RuntimeConfig


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(RuntimeConfig):
    """Values of a recipe that every training may change.

    Attributes:
        batch_size: global, over all processes and accumulation steps; at most the number of images.
        learning_rate: peak; by default the recipe's, scaled by the square root of the batch size over the recipe's.
        minimum_learning_rate: at both ends of the schedule.
        weight_decay: of AdamW.
        clip_norm: largest gradient norm.
        drop_path: of the last block.
        report: end by writing report.html into the run's folder.
        dry_run: print models, images and steps, and stop.
        debug: show the traceback of an error.
    """

    batch_size: int | None = None
    learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    drop_path: float | None = None
    report: bool = True
    dry_run: bool = False
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class ViewFlags:
    """What is shown of a picture.

    Attributes:
        augmentation: three (ThreeAugment), rand (RandAugment), crop, affine (for pictures that a crop would change) or none.
        smallest_crop: smallest share of a picture that a crop keeps.
        horizontal_flip: probability of mirroring.
        repeats: repeated augmentation.
        device_augmentation: the loader draws the colours of three, the training device computes them.
    """

    augmentation: Augmentation | None = None
    smallest_crop: float | None = None
    horizontal_flip: float | None = None
    repeats: int | None = None
    device_augmentation: bool = False


@dataclass(frozen=True, kw_only=True)
class TunedModelFlags(TrainingFlags):
    """The model that is trained for a task.

    Attributes:
        model: run folder, timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, or a weight file (with --model-arch).
        model_arch: timm name of the architecture, when the model is a weight file.
        model_args: arguments of the architecture, as name=value (e.g. flip=released).
        model_pretrained: load a timm name's pretrained weights; --no-model-pretrained trains from scratch.
        patch_size: side of a patch; by default the model's. Other weights are resampled to it.
        layer_decay: factor on the learning rate from layer to layer, last to first; 1 for none.
    """

    model: str
    model_arch: str | None = None
    model_args: tuple[str, ...] = ()
    model_pretrained: bool = True
    patch_size: int | None = None
    layer_decay: float | None = None
