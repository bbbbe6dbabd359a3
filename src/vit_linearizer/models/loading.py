"""From what a user types to a model: timm names, ``hf-hub:`` and ``local-dir:`` sources, weight files, run folders.

Weights load as tensors only (safetensors, or ``torch.load`` with ``weights_only=True``); nothing is ever unpickled.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
from timm.models import save_for_hf

from ..contracts import UserError, did_you_mean

_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


def load(run: str | os.PathLike[str]) -> nn.Module:
    """The backbone of a run, in evaluation mode: the same as ``timm.create_model("local-dir:RUN/model", pretrained=True)``.

    Args:
        run: a run folder, or a folder in timm's format (``config.json`` and ``model.safetensors``).

    Raises:
        UserError: there is no model in it.
    """
    folder = model_folder(run)
    if folder is None:
        raise UserError("run", run, "holds no model/config.json; give a finished run folder or a timm model folder")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def model_folder(path: str | os.PathLike[str]) -> Path | None:
    """The timm model folder that a run folder or model folder stands for, or None."""
    candidates = (Path(path) / "model", Path(path))
    return next((folder for folder in candidates if (folder / "config.json").is_file() and _has_weights(folder)), None)


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHT_FILES for file in folder.iterdir())


def save_model_folder(model: nn.Module, folder: Path) -> None:
    """Write timm's folder format; a reader sees the old folder or the new one, never a half-written one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_for_hf(model, str(fresh), safe_serialization=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def create_backbone(
    name: str,
    *,
    field: str,
    architecture: str | None = None,
    pretrained: bool = False,
    **model_args: Any,
) -> nn.Module:
    """Create a timm model from whatever names one.

    Args:
        name: a timm name (with its tag), ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, a run or model folder, or a weight
            file (``.safetensors``, ``.pth``), which needs ``architecture``.
        field: the flag that this name came from, for messages.
        architecture: timm name that a weight file belongs to.
        pretrained: load weights; folders and files always do.
        **model_args: passed to ``timm.create_model``.

    Raises:
        UserError: unknown name, missing file, weights that do not fit, or no network to fetch them.
    """
    path = Path(name)
    if path.is_file():
        if architecture is None:
            raise UserError(field, name, f"is a weight file; name its architecture too: {field}-arch vit_base_patch16_224")
        _check_known(architecture, f"{field}-arch")
        model_args["pretrained_cfg_overlay"] = {"file": str(path), "source": None}
        name, pretrained = architecture, True
    elif path.is_dir():
        folder = model_folder(path)
        if folder is None:
            raise UserError(field, name, "is a folder without model/config.json and weights")
        name, pretrained = f"local-dir:{folder}", True
    elif name.startswith("local-dir:"):
        if model_folder(name.removeprefix("local-dir:")) is None:
            raise UserError(field, name, "no such folder with config.json and weights in it")
        name, pretrained = f"local-dir:{model_folder(name.removeprefix('local-dir:'))}", True
    elif path.suffix in _WEIGHT_FILES and path.suffix:
        raise UserError(field, name, "no such file")
    elif not name.startswith("hf-hub:"):
        _check_known(name, field)
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(field, name, f"could not be built: {error}") from error
    except Exception as error:  # the hub client has no common base class for being offline
        if not pretrained:
            raise
        if isinstance(error, RuntimeError) and "size mismatch" in str(error) or "Missing key" in str(error):
            raise UserError(field, name, f"its weights do not fit the architecture: {_first_lines(error)}") from error
        remedy = (
            f"its weights could not be loaded ({type(error).__name__}: {_first_lines(error)}); without network, give a local"
            f" weight file with {field}-arch, or {field.replace('--', '--no-')}-pretrained for random weights"
        )
        raise UserError(field, name, remedy) from error


def _check_known(name: str, field: str) -> None:
    if timm.is_model(name.partition(".")[0]):
        base, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}*") if known.startswith(f"{base}.")]
        if tag and tags and tag not in tags:
            raise UserError(field, name, f"unknown weights; {base} has {', '.join(tags)}")
        return
    raise UserError(field, name, f"unknown model{did_you_mean(name, timm.list_models() + timm.list_pretrained())}")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
