"""What every training command does between its flags and its run: a recipe with the flags' values, a model at its size."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch.nn as nn
from accelerate import Accelerator

from ..contracts import UserError
from ..models.adapters import check_plain
from ..models.loading import has_weights, open_model, probe_backbone
from ..recipes import Recipe
from ..training.config import RuntimeConfig
from ..training.optimiser import fit_batch
from .arguments import parse_model_args
from .training_flags import TunedModelFlags

logger = logging.getLogger("vit_linearizer")

R = TypeVar("R", bound=Recipe)


def apply_flags(recipe: R, config: Any, *, batch_size: int | None = None, **parsed: Any) -> R:
    """The recipe with the values that a command's configuration gives for it.

    Args:
        recipe: as the tables have it.
        config: of the command; fields of a recipe's names override it where they are not None.
        batch_size: instead of the configuration's.
        **parsed: values that flags give in another form; they take the place of the configuration's.
    """
    names = set(recipe.flat()) & {field.name for field in dataclasses.fields(config)}
    values = {name: getattr(config, name) for name in names}
    return recipe.override(**values | parsed | {"batch_size": batch_size or config.batch_size})


def fit_to_images(recipe: R, config: Any, *, images: int, parts: int, **parsed: Any) -> R:
    """`apply_flags`, with a batch no larger than the images are many and divisible by processes times accumulation."""
    wanted = apply_flags(recipe, config, **parsed)
    batch_size = fit_batch(wanted.optimisation.batch_size, images, parts)
    if batch_size == wanted.optimisation.batch_size:
        return wanted
    logger.info("batch size %d -> %d: there are %d training images", wanted.optimisation.batch_size, batch_size, images)
    return apply_flags(recipe, config, batch_size=batch_size, **parsed)


def resolved_runtime(config: RuntimeConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What ``config.json`` says of machine and run."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(RuntimeConfig)}
    return values | {"precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32"}


def resolved_data(data: str) -> str:
    """What ``config.json`` says of the data: a full path, or a built-in name as it is."""
    return data if data.startswith("builtin:") else str(Path(data).resolve())


def architecture_name(model: Any) -> str:
    """The timm name whose size decides what a recipe says; of a linear ViT, that of the ViT it was made of."""
    return getattr(model, "_model_args", {}).get("base") or model.pretrained_cfg["architecture"]


def probe_model(config: TunedModelFlags) -> nn.Module:
    """The model that is to be trained, without weights or memory, to ask for sizes and to refuse it early.

    Raises:
        UserError: unknown, or no plain backbone.
    """
    given = parse_model_args("--model-args", config.model_args)
    probe = probe_backbone(config.model, field="--model", architecture=config.model_arch, **given)
    check_plain(probe, config.model, field="--model")
    return probe


def resolved_model(config: TunedModelFlags) -> dict[str, Any]:
    """What ``config.json`` says of the model that is trained."""
    names = ("model", "model_arch", "model_args", "model_pretrained", "patch_size")
    return {name: getattr(config, name) for name in names}


def open_at_size(config: TunedModelFlags, image_size: tuple[int, int], **model_args: Any) -> nn.Module:
    """The model that a configuration names by ``model`` and its kin, for an image size and ``patch_size``.

    Args:
        config: of the command.
        image_size: (height, width) that its positions are made for.
        **model_args: of the training, before the user's; a ``drop_path_rate`` is not saved with the model.

    Raises:
        UserError: as `open_model`, or a model whose patches cannot be changed.
    """
    patch_size = config.patch_size
    resampled = has_weights(config.model) and config.model_pretrained and patch_size is not None
    if not resampled:
        model_args["img_size"] = image_size
        model_args |= {"patch_size": patch_size} if patch_size is not None else {}
    model: Any = open_model(
        config.model,
        field="--model",
        architecture=config.model_arch,
        pretrained=config.model_pretrained,
        **model_args | parse_model_args("--model-args", config.model_args),
    )
    if resampled and patch_size is not None:
        set_patch_size(model, patch_size, image_size)
    model._model_args.pop("drop_path_rate", None)  # a matter of this training, not of the model
    return model


def set_patch_size(model: Any, patch_size: int, image_size: tuple[int, int]) -> None:
    """Give a model patches of another size and positions for an image size, resampling both.

    Args:
        model: with timm's ``set_input_size``.
        patch_size: side of a patch.
        image_size: (height, width).

    Raises:
        UserError: it cannot.
    """
    if not hasattr(model, "set_input_size"):
        raise UserError("--patch-size", patch_size, f"{type(model).__name__} keeps the patch it was made with")
    if patch_size < 1:
        raise UserError("--patch-size", patch_size, "must be at least 1")
    if any(side % patch_size for side in image_size):
        given, near = ("x".join(str(side) for side in size) for size in (image_size, _nearest(image_size, patch_size)))
        raise UserError("--patch-size", patch_size, f"does not divide the image size {given}; try that at {near}")
    model.set_input_size(img_size=image_size, patch_size=(patch_size, patch_size))


def _nearest(image_size: tuple[int, int], patch_size: int) -> list[int]:
    return [max(1, round(side / patch_size)) * patch_size for side in image_size]
