"""From what a user types to a model: timm names, ``hf-hub:`` and ``local-dir:`` sources, weight files, run folders.

Weights load as tensors only (safetensors, or ``torch.load`` with ``weights_only=True``); nothing is ever unpickled.
"""

import contextlib
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
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
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file() and _has_weights(folder):
            return folder
    return None


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHT_FILES for file in folder.iterdir())


def save_model_folder(model: nn.Module, folder: Path) -> None:
    """Write timm's folder format; a reader sees the old folder or the new one, never a half-written one."""
    fresh, old = folder.with_name(folder.name + ".new"), _old(folder)
    recover_model_folder(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_for_hf(model, str(fresh), safe_serialization=True)
    for file in fresh.iterdir():  # safetensors are written for their owner alone
        file.chmod((fresh / "config.json").stat().st_mode)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_model_folder(folder: Path) -> None:
    """Put the old folder back where a kill came between the two renames of `save_model_folder`."""
    if not folder.exists() and _old(folder).exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def create_backbone(
    name: str,
    *,
    field: str,
    architecture: str | None = None,
    pretrained: bool = False,
    **model_args: Any,
) -> nn.Module:
    """Create a timm backbone, without classifier, from whatever names one; its weights load completely or not at all.

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
    timm_name, brings_weights, overlay = _resolve(name, field, architecture)
    model: Any = _create(name, field, timm_name, pretrained or brings_weights, **overlay, **model_args)
    model.reset_classifier(0)
    return model


def probe_backbone(name: str, *, field: str, architecture: str | None = None, **model_args: Any) -> nn.Module:
    """`create_backbone` without weights or memory (on the meta device), to ask for sizes and to check a name early."""
    timm_name, _, _ = _resolve(name, field, architecture)
    return _create(name, field, timm_name, False, device="meta", **model_args)


def _resolve(name: str, field: str, architecture: str | None) -> tuple[str, bool, dict[str, Any]]:
    """What timm calls it, whether it brings its own weights, and arguments that say where they are."""
    path = Path(name.removeprefix("local-dir:"))
    if path.is_file():
        if architecture is None:
            raise UserError(field, name, f"is a weight file; name its architecture too: {field}-arch vit_base_patch16_224")
        _check_known(architecture, f"{field}-arch")
        return architecture, True, {"pretrained_cfg_overlay": {"file": str(path)}}
    if path.is_dir() or name.startswith("local-dir:"):
        folder = model_folder(path)
        if folder is None:
            raise UserError(field, name, "no config.json with weights there; give a run folder or a timm model folder")
        return f"local-dir:{folder}", True, {}
    if path.suffix in _WEIGHT_FILES:
        raise UserError(field, name, "no such file")
    if not name.startswith("hf-hub:"):
        _check_known(name, field)
    return name, False, {}


def _create(name: str, field: str, timm_name: str, pretrained: bool, **model_args: Any) -> nn.Module:
    try:
        with _offline_when_unreachable():
            return timm.create_model(timm_name, pretrained=pretrained, **model_args)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(field, name, f"could not be built: {_one_line(error)}") from error
    except Exception as error:  # the hub client has no common base class for being offline
        if isinstance(error, RuntimeError) and "state_dict" in str(error):
            if _only_classifier_differs(str(error), timm_name) and "num_classes" not in model_args:
                return _create(name, field, timm_name, pretrained, num_classes=0, **model_args)
            raise UserError(field, name, f"its weights do not fit the architecture: {_one_line(error)}") from error
        if isinstance(error, Warning) or not (pretrained or timm_name.startswith("hf-hub:")):
            raise
        if timm_name.startswith("local-dir:") or "pretrained_cfg_overlay" in model_args:
            remedy = f"cannot be read ({_one_line(error)}); save it as safetensors or as a plain state dict"
            raise UserError(field, name, remedy) from error
        remedy = f"its weights could not be fetched ({type(error).__name__}); without network, give a file with {field}-arch"
        remedy += ", or --no-teacher-pretrained for random weights" if field == "--teacher" else ""
        raise UserError(field, name, remedy) from error


def _only_classifier_differs(message: str, timm_name: str) -> bool:
    """Whether a strict load failed for nothing but the classifier: a file without one, or with one for other classes.

    timm would load leniently if it were asked for another number of classes at once, and then pass over any other gap too.
    """
    known = not timm_name.startswith(("local-dir:", "hf-hub:"))
    classifier = (timm.models.get_pretrained_cfg_value(timm_name, "classifier") if known else None) or "head"
    prefixes = tuple([classifier] if isinstance(classifier, str) else classifier)
    keys = re.findall(r'"([^"]+)"', message) + re.findall(r"size mismatch for ([\w.]+):", message)
    return "Unexpected key" not in message and bool(keys) and all(key.startswith(prefixes) for key in keys)


@contextlib.contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Where the hub's name cannot be resolved, use its local cache at once instead of retrying for most of a minute."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    if not before and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _check_known(name: str, field: str) -> None:
    if timm.is_model(name.partition(".")[0]):
        base, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}*") if known.startswith(f"{base}.")]
        if tag and tags and tag not in tags:
            raise UserError(field, name, f"unknown weights; {base} has {', '.join(tags)}")
        return
    raise UserError(field, name, f"unknown model{did_you_mean(name, timm.list_models() + timm.list_pretrained())}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
